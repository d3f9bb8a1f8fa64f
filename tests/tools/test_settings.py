"""`megascale config` as it is typed: keys by any of their names, JSON, a schema, and readers that stop early."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pytest

from megascale_moe.cli import main
from megascale_moe.config import Config, fields
from megascale_moe.presets import PRESETS


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints."""
    assert main(["config", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(printed(capsys, *arguments, "--json"))
    return found


def test_json_has_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys)
    assert list(found) == list(fields())
    for name, about in found.items():
        assert set(about) == {"type", "default", "range", "meaning", "also", "choices"}
        section, _, key = name.partition(".")
        default = getattr(getattr(Config(), section), key)
        assert about["default"] == (list(default) if isinstance(default, tuple) else default)
        assert all(isinstance(about[text], str) and about[text] for text in ("type", "range", "meaning"))
    assert found["train.clip_norm"]["range"] == "0 to 1e+30; 0: no clipping"
    assert "max_grad_norm" in found["train.clip_norm"]["also"]
    assert found["parallel.ffn"]["choices"] == ["ep", "tp", "ep+tp"]
    assert found["model.preset"]["choices"] == ["", *PRESETS]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("train.steps", ["train.steps"]),
        ("steps", ["train.steps"]),
        ("lr", ["train.learning_rate"]),
        ("Max-Grad-Norm", ["train.clip_norm"]),
        ("gradient accumulation", ["train.micro_batch"]),
        ("attention", ["model.attention", "parallel.attention"]),
        ("wire", ["wire.gradients", "wire.activations", "wire.parameters"]),
        ("warm", ["train.warmup"]),
    ],
)
def test_a_key_is_found_by_any_of_its_names(capsys: pytest.CaptureFixture[str], key: str, names: Sequence[str]) -> None:
    assert list(document(capsys, key)) == names


def test_text_says_what_the_json_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    text = printed(capsys)
    assert max(map(len, text.splitlines())) <= 70
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    assert len(paragraphs) == len(fields())
    for paragraph, field in zip(paragraphs, fields().values(), strict=True):
        assert paragraph.startswith(f"{field.name} = ")
        assert field.meaning in paragraph
        assert all(name in paragraph for name in field.also)
    assert 'run.folder = "runs/latest"' in text
    assert "parallel.stage_layers = []" in text
    assert "model.rope_interleaved = false" in text


def test_the_schema_knows_presets(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "--schema"))
    model = schema["properties"]["model"]["properties"]
    assert model["preset"]["enum"] == ["", *PRESETS]
    assert (model["layers"]["minimum"], model["layers"]["maximum"], model["layers"]["default"]) == (1, 10_000, 4)


def test_a_name_that_nothing_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "train.stepz"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "megascale: config key 'train.stepz' is unknown; did you mean 'train.steps'?\n"


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `megascale config | head -3`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["config"]) == 0
