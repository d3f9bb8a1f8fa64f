"""`megascale plan` as it is typed: tables, JSON, files that other commands take, refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megascale_moe.cli import main
from megascale_moe.config import load
from megascale_moe.planner.cluster import load as profile
from megascale_moe.planner.step import price
from megascale_moe.presets import PRESETS

pytestmark = pytest.mark.bulky  # lists and prices that a search keeps

MODEL = """
[model]
layers = 4
hidden = 512
heads = 8
kv_heads = 4
experts = 8
top_k = 2
ffn_hidden = 1024
vocab = 4096
sequence_length = 1024
[train]
global_batch = 8
dtype = "bf16"
"""
KEPT = "parallel.attention,parallel.ffn,parallel.schedule,overlap.micro_batches"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(MODEL)
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The document of a command that succeeds."""
    assert main([*map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_search_writes_what_others_take(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan"
    found = printed(capsys, "plan", config, "--cluster", "h800", "--gpus", 4, "--keep", KEPT, "--out", out)
    plans = found["plans"]
    assert plans[0]["step_seconds"] == min(plan["step_seconds"] for plan in plans)
    for plan in plans:
        assert {"config", "step_seconds", "mfu", "exposed_comm_seconds", "memory_bytes", "limit"} <= set(plan)
        assert plan["fits"]
        assert "of the step" in plan["limit"]
        assert plan["memory"]["peak"] == plan["memory_bytes"]
        assert plan["tokens_per_second"] == pytest.approx(8 * 1024 / plan["step_seconds"])
    assert "would save" in plans[0]["limit"]
    assert sum(plans[0]["seconds"].values()) == pytest.approx(plans[0]["step_seconds"])
    written = load(out / "plan.toml", [], PRESETS)
    assert written.parallel.pp == plans[0]["config"]["parallel"]["pp"]
    assert price(written, profile("h800"), 4).seconds == pytest.approx(plans[0]["step_seconds"])
    assert printed(capsys, "dryrun", out / "plan.toml", "--gpus", 4)["ranks"] == 4
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    drawn = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X" and event["pid"] == 0)
    assert 0 < drawn <= 1e6 * plans[0]["step_seconds"]
    assert "profile h800" in (out / "report.html").read_text()
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_fixed_is_the_config_and_compare_is_two(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--cluster", "h800", "--gpus", 4, "--out", tmp_path / "plan")
    fixed = printed(capsys, "plan", config, *command, "--fixed", "--parallel.pp=2", "--parallel.node=2")
    (plan,) = fixed["plans"]
    assert (plan["config"]["parallel"]["pp"], plan["config"]["parallel"]["dp"]) == (2, 1)
    other = tmp_path / "other.toml"
    other.write_text(MODEL + '[parallel]\nnode = 4\nattention = "tp"\nffn = "tp"\n')
    both = printed(capsys, "plan", *command, "--compare", config, other)
    assert [each["config"]["parallel"]["attention"] for each in both["plans"]] == ["sp", "tp"]
    assert all(each["limit"] for each in both["plans"])
    assert main([str(x) for x in ("plan", *command, "--compare", config, other)]) == 0
    shown = capsys.readouterr().out
    for words in ("plan 1: limited by", "plan 2: limited by", "waiting for links inside a node", "tp + tp"):
        assert words in shown


def test_validate_prints_rows_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = (Path(__file__).parents[2] / "benchmarks" / "planner" / "validation.csv").read_text().splitlines()
    some = [line for line in published if line.split(",")[0] in ("id", "SMX-DeepSeek-V2-EP4-8", "MB-25")]
    (tmp_path / "rows.csv").write_text("\n".join(some) + "\n")
    found = printed(capsys, "plan", "--validate", tmp_path / "rows.csv")
    assert [row["id"] for row in found["rows"]] == ["MB-25", "SMX-DeepSeek-V2-EP4-8"]
    assert {"id", "predicted", "reference", "unit", "error"} <= set(found["rows"][0])
    assert found["mean_error"] == found["worst_error"] == abs(found["rows"][1]["error"]) < 0.15
    assert main(["plan", "--validate", str(tmp_path / "rows.csv")]) == 0
    assert "all 1 test rows: mean error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--gpus", "4"), "--cluster is missing"),
        (("--cluster", "h800"), "--gpus is missing"),
        (("--cluster", "h900", "--gpus", "4"), "cluster profile 'h900' is unknown; known: a100"),
        (("--cluster", "h800", "--gpus", "0"), "'0' is not a number of ranks"),
        (("--cluster", "h800", "--gpus", "4", "--keep", "parallel.tp"), "--keep parallel.tp: is not searched"),
        (("--cluster", "h800", "--gpus", "4", "--keep", "parallel.pp", "--fixed"), "--keep with --fixed"),
        (("--cluster", "h800", "--gpus", "7", "--fixed"), "model.sequence_length = 1024 is not divisible by"),
        (("--cluster", "h800", "--gpus", "4", "--compare", "a.toml", "b.toml"), "with --compare: give the two configs"),
        (("--validate", "rows.csv"), "--validate: rows are predicted as they are"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    config: Path, arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_nothing_to_plan_and_unreadable_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cluster", "h800", "--gpus", "4"]) == 2
    assert "CONFIG.toml is missing" in capsys.readouterr().err
    assert main(["plan", "--validate", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
