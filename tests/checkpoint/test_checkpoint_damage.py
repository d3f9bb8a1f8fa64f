"""Damage is refused in one line that names the file; so is what is no checkpoint, or one of another model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.checkpoint import Checkpoint, TensorPiece, save
from megascale_moe.checkpoint.manifest import _checksum
from megascale_moe.config import ConfigError
from tests.checkpoint.checkpoints import (
    COLUMNS,
    ROWS,
    W13,
    assert_holds,
    make_state,
    save_alone,
    save_state,
)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_flipped_byte_anywhere_in_data_is_refused(tmp_path: Path, small_blocks: None) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=2)
    for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = tmp_path / "step-1" / file
        original = path.read_bytes()
        for at in [*range(0, len(original), 37), len(original) - 1]:
            flip(path, at)
            with pytest.raises(ConfigError, match=f"{file} is damaged"):
                Checkpoint(tmp_path / "step-1").verify()
            path.write_bytes(original)
    assert_holds(tmp_path / "step-1", state)


def test_reading_refuses_damage_without_being_told_to_verify(tmp_path: Path, small_blocks: None) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=2)
    flip(tmp_path / "step-1" / "rank-00001.safetensors", -1)  # the last weight of the last expert
    checkpoint = Checkpoint(tmp_path / "step-1")
    assert torch.equal(checkpoint.read(W13, (0, 0, 0), (4, ROWS, COLUMNS)), state[W13][:4])
    with pytest.raises(ConfigError, match=r"step-1/rank-00001\.safetensors is damaged"):
        checkpoint.read(W13, (7, 0, 0), (1, ROWS, COLUMNS))


def test_flipped_byte_anywhere_in_the_manifest_is_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1, make_state()) / "manifest.json"
    original = path.read_bytes()
    for at in range(0, len(original), 7):
        flip(path, at)
        with pytest.raises(ConfigError, match=r"manifest\.json"):
            Checkpoint(tmp_path / "step-1")
        path.write_bytes(original)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    save_state(tmp_path, 1, make_state(), ep=2)
    path = tmp_path / "step-1" / "rank-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ConfigError, match=r"rank-00001\.safetensors has [\d,]+ bytes instead of .* incomplete"):
        Checkpoint(tmp_path / "step-1")
    path.unlink()
    with pytest.raises(ConfigError, match=r"rank-00001\.safetensors is missing: the checkpoint is incomplete"):
        Checkpoint(tmp_path / "step-1")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"is not a checkpoint: it has no manifest\.json"):
            Checkpoint(folder)
    for text, message in [
        ("", "not JSON"),
        ("\x80", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not the manifest"),
        ('{"format": "other"}', "not the manifest"),
        ('{"format": "megascale_moe.checkpoint", "version": 9}', "has format version 9, this program reads version 1"),
        ('{"format": "megascale_moe.checkpoint", "version": 1}', "checksum"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body["tensors"]["w"]["pieces"].pop(), r"step-1: w: element \[2\] of \[4\] is missing"),
        (lambda body: body["tensors"]["w"]["pieces"][0].update(at=10**6), "lies outside of rank-00000"),
        (lambda body: body["tensors"]["w"].update(dtype="F2"), "unknown dtype F2"),
        (lambda body: body["files"].update({"../../secret": {"size": 1, "blocks": [0]}}), "unexpected file name"),
        (lambda body: body.pop("step"), "damaged: KeyError"),
    ],
)
def test_manifests_of_other_programs(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    """The checksum is right, so this was no accident: nothing may be read that was not meant to be."""
    value = torch.arange(4.0)
    parts = [TensorPiece("w", (4,), (offset,), (2,), 0, value[offset : offset + 2]) for offset in (0, 2)]
    path = save(tmp_path, 1, parts, {}, rank=0, world=1, barrier=lambda: None) / "manifest.json"
    document = json.loads(path.read_text())
    change(document["body"])
    path.write_text(json.dumps(document | {"crc32": _checksum(document["body"])}))
    with pytest.raises(ConfigError, match=message):
        Checkpoint(tmp_path / "step-1")


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_alone(tmp_path, 1, {"a": torch.zeros(2), "b": torch.zeros(3, 4)}))
    checkpoint.require({"a": (2,), "b": (3, 4)})
    for expected, message in [
        ({"a": (2,), "b": (3, 4), "c": (1,)}, "another model: it has no c"),
        ({"a": (2,), "b": (4, 3)}, r"another model: b is \[3, 4\] there and \[4, 3\] here"),
        ({"a": (2,)}, "another model: it has b, which is not in this one"),
    ]:
        with pytest.raises(ConfigError, match=message):
            checkpoint.require(expected)  # type: ignore[arg-type]
    for name, offset, size in [("c", (0,), (1,)), ("a", (1,), (2,)), ("a", (-1,), (1,))]:
        with pytest.raises(ConfigError, match=name):
            checkpoint.read(name, offset, size)
