"""Strategies register: one object is enough, inside of the package or outside, for all that reads the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megascale_moe.cli import main
from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ModelConfig, ParallelConfig
from megascale_moe.config.refusals import divides
from megascale_moe.engine.op import Op
from megascale_moe.engine.value import Value
from megascale_moe.optim import registry as optimizers
from megascale_moe.strategies import registry
from megascale_moe.strategies.attention_sp import sequence_parallel_attention
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.layer import Layer
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.strategy import AttentionStrategy
from megascale_moe.tools.verify.layouts import all_cases
from tests.optim.toys import CUBED
from tests.strategies.test_layouts import SMALL

KINDS = ("ATTENTION", "FFN", "DISPATCH", "VOCABULARY")


class Toy(AttentionStrategy):
    """Sequence-parallel attention under another name, which refuses an odd number of layers."""

    name = "toy"
    title = "toy attention"

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        divides("model.heads", model.heads, "parallel.node", mesh.node)

    def ops(self, layer: Layer, x: Value) -> tuple[list[Op], Value]:
        ops, y = sequence_parallel_attention(layer, x)
        return [replace(op, name=op.name.replace("attention", "toy_attention")) for op in ops], y


@pytest.fixture
def toy() -> Iterator[AttentionStrategy]:
    """Registered for a test."""
    before = registry.ATTENTION
    strategy = Toy()
    registry.register(strategy)
    yield strategy
    registry.ATTENTION = before


def test_names_are_unique_and_said_for_people() -> None:
    for kind in KINDS:
        strategies = getattr(registry, kind)
        assert len({strategy.name for strategy in strategies}) == len(strategies)
        assert all(strategy.title and strategy.__doc__ for strategy in strategies)


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.attention = 'up': must be one of 'sp', 'tp'"):
        mesh_of(ParallelConfig(attention="up"), SMALL, 1)  # type: ignore[arg-type]


def test_what_is_no_strategy_is_not_registered() -> None:
    with pytest.raises(TypeError, match="is none of"):
        registry.register(object())  # type: ignore[arg-type]


def test_every_strategy_is_searched_verified_and_offered(toy: AttentionStrategy) -> None:
    assert "toy" in registry.choices()["parallel.attention"]
    layout = Layout(1, 8, axes_of(Mesh(), 0), attention="toy")
    assert registry.strategies_of(layout, SMALL).attention is toy


def test_a_strategy_and_an_optimizer_from_outside_train_verify_plan_and_report(
    toy: AttentionStrategy, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but two objects and their registries: no other file of the package knows them."""
    monkeypatch.setattr(optimizers, "RULES", (*optimizers.RULES, CUBED))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(20):
        text = f"all the king's {number} horses and all the king's men\n" * 40
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "toy.toml").write_text(
        """
        [model]
        preset = "debug"
        [parallel]
        node = 2
        attention = "toy"
        [train]
        optimizer = "cubed"
        steps = 2
        global_batch = 4
        eval_rows = 2
        sample_tokens = 0
        [data]
        path = "texts"
        cache = "cache"
        [run]
        folder = "run"
        """,
        encoding="utf-8",
    )

    def run(*arguments: str) -> dict[str, object]:
        status = main([*arguments, "--json"])
        captured = capfd.readouterr()
        assert status == 0, captured.err
        found: dict[str, object] = json.loads(captured.out)
        return found

    assert run("verify", "toy.toml", "--nproc", "2")["passed"] is True
    assert run("dryrun", "toy.toml", "--gpus", "2")["ranks"] == 2
    planned = run("plan", "toy.toml", "--cluster", "h100", "--gpus", "2", "--keep", "parallel.attention")
    assert planned["plans"][0]["config"]["parallel"]["attention"] == "toy"  # type: ignore[index]
    assert planned["plans"][0]["config"]["train"]["optimizer"] == "cubed"  # type: ignore[index]
    run("train", "toy.toml", "--nproc", "2")
    run("report", "run")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "toy attention" in page
    assert "toy_attention" in page
    assert "update.experts.transform" in page  # which only a rule of whole matrices has


def test_verify_runs_a_strategy_from_outside_with_every_other(toy: AttentionStrategy) -> None:

    cases, _ = all_cases(Config(model=SMALL), 2)
    assert {case.strategy[1] for case in cases if case.strategy[0] == "toy"} == set(registry.names(registry.FFN))
