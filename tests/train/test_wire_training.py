"""Whole training runs with narrow messages: hidden or not the same, resumed bit for bit, near FP32; their benchmark."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megascale_moe.bench.convergence import VARIANTS, layer_of, rows
from megascale_moe.cli import main
from megascale_moe.config import OverlapConfig, WireConfig
from megascale_moe.testing import run_ranks
from tests.runs import Place
from tests.train.test_hidden_sync import LAYOUTS, Course, config_of, trained

WIRES = {
    "fp32": WireConfig(),
    "bf16": WireConfig(gradients="bf16", activations="bf16", parameters="bf16"),
    "fp8": WireConfig(gradients="bf16", activations="fp8", parameters="bf16"),
    "auto": WireConfig(gradients="auto", activations="auto", parameters="auto"),
}


HIDDEN = OverlapConfig(order="paper", remat="paper")
STEPS = 3  # the second and the third begin with what the one before left to be gathered
MEASURED = 5  # three of them measure


def course(
    layout: str, overlap: OverlapConfig, wire: str, clip: float = 1.0, steps: int = STEPS
) -> tuple[Course, bool]:
    """What some steps report; whether copies of weights are equal on all ranks that hold them."""
    config = config_of(LAYOUTS[layout], overlap, WIRES[wire], layers=4)
    found, trainer = trained(replace(config, train=replace(config.train, clip_norm=clip)), steps)
    equal = True
    for group in trainer.optimizer.groups:
        for axis in (group.intra, group.inter):
            if axis.size > 1:
                parts = [torch.empty_like(group.weights) for _ in range(axis.size)]
                dist.all_gather(parts, group.weights, group=axis.group)
                equal = equal and all(torch.equal(part, group.weights) for part in parts)
    return found, equal


@functools.cache
def plain(layout: str, clip: float) -> list[float]:
    """Losses of the same in FP32, nothing hidden; where it is clipped, for the steps of a run that measures, too."""
    found: Course = run_ranks(4, course, layout, OverlapConfig(), "fp32", clip, MEASURED if clip else STEPS)[0][0]
    return found.losses


# Each layout with the formats that send most of it: "fp8" has the gradients and weights of "bf16".
@pytest.mark.parametrize(
    ("layout", "wire"), [("two nodes", "bf16"), ("tensor", "fp8"), ("pipeline and data", "fp8")]
)
def test_hidden_or_not_it_is_the_same_training(layout: str, wire: str) -> None:
    """As without formats (test_hidden_sync.py): what is rounded does not depend on when it is sent, so losses are equal
    to the bit. Only the norm adds groups in another order, 1e-6 relative. Gradients are not clipped by it here: its
    last bit lets single weights be rounded to the other side, and a token go to another expert; whether it does hangs
    on the processor's arithmetic. Losses are near FP32's: within 2 %, which five steps of AdamW make of FP8's rounding.
    """
    serial, equal = run_ranks(4, course, layout, OverlapConfig(), wire, 0.0)[0]
    hidden, also = run_ranks(4, course, layout, HIDDEN, wire, 0.0)[0]
    exact = plain(layout, 0.0)
    assert equal
    assert also
    assert hidden.losses == serial.losses
    assert hidden.norms == pytest.approx(serial.norms, rel=1e-6)
    assert serial.losses != exact
    assert serial.losses == pytest.approx(exact, rel=2e-2)


def test_clipped_it_is_the_same_training() -> None:
    """Until the second norm, which follows a clipped update; from then on single roundings differ, see above."""
    serial, equal = run_ranks(4, course, "two nodes", OverlapConfig(), "bf16")[0]
    hidden, also = run_ranks(4, course, "two nodes", HIDDEN, "bf16")[0]
    assert equal
    assert also
    assert serial.norms[0] > 1  # the first is clipped
    assert hidden.losses[:2] == pytest.approx(serial.losses[:2], rel=1e-5)
    assert hidden.norms[:2] == pytest.approx(serial.norms[:2], rel=1e-5)
    for found in (serial, hidden):
        assert found.losses == pytest.approx(plain("two nodes", 1.0)[: len(found.losses)], rel=2e-2)


def test_auto_decides_after_measuring_and_all_ranks_alike() -> None:
    """Ranks that decided differently would wait for messages of other sizes."""
    found, equal = run_ranks(4, course, "two nodes", OverlapConfig(), "auto", 1.0, MEASURED, timeout=60.0)[0]
    assert equal
    assert found.losses == pytest.approx(plain("two nodes", 1.0), rel=2e-2)


def test_resumed_it_ends_bit_equal(shared: Place) -> None:
    """Masters are saved, weights rounded again as they were."""
    options = (
        "--nproc=4", "--parallel.dp=2", "--parallel.node=2", "--parallel.ep=2", "--wire.gradients=bf16",
        "--wire.activations=fp8", "--wire.parameters=bf16", "--overlap.order=paper", "--train.checkpoint_every=2",
    )  # fmt: skip
    shared.train(*options, "--train.steps=6", run="narrow-whole")
    # The schedule of learning rates hangs on the number of steps, so the first part is the whole of another folder.
    target = shared.folder("narrow-parts") / "checkpoints"
    target.mkdir(parents=True)
    (shared.folder("narrow-whole") / "checkpoints" / "step-4").rename(target / "step-4")
    shared.train(*options, "--train.steps=6", "--resume", run="narrow-parts")
    state, wanted = shared.state(6, "narrow-parts"), shared.state(6, "narrow-whole")
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []


# --- megascale bench convergence -------------------------------------------------------------------------------------


@pytest.fixture
def bench(shared: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        common = ("--nproc=2", "--parallel.dp=1", "--parallel.node=2", "--train.steps=4", "--train.eval_every=2")
        status = main(["bench", "convergence", str(shared.config), *common, f"--out={tmp_path}", *arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def test_convergence_of_formats(bench: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = bench("--variants=fp32,activations fp8,gradients bf16_ring", "--seeds=2", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["name"] == "convergence"
    by_name = {row["variant"]: row for row in found["rows"]}
    assert set(by_name) == {"fp32", "activations fp8", "gradients bf16_ring"}
    assert by_name["fp32"]["gradient_error"] == 0  # the same list twice
    assert by_name["fp32"]["gradient_cosine"] == pytest.approx(1, abs=1e-12)
    assert 1e-3 < by_name["activations fp8"]["gradient_error"] < 0.3
    assert 0.9 < by_name["activations fp8"]["gradient_cosine"] < 1
    assert by_name["fp32"]["to_fp32"] == 0
    assert len(found["runs"]) == 6
    for run in found["runs"]:
        assert len(run["losses"]) == 4
        assert list(run["evaluations"]) == ["2", "4"]
        assert set(run["gradient_errors"]["0"]) >= {"embedding", "0 attention", "0 ffn"}
    same = {run["losses"][0] for run in found["runs"] if run["variant"] == "fp32"}
    assert len(same) == 2  # seeds differ


def test_it_goes_on_where_it_was_and_refuses_another_config(
    bench: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assert bench("--variants=fp32")[0] == 0
    before = json.loads((tmp_path / "convergence.json").read_text())["runs"]
    status, out, _ = bench("--variants=fp32,fp32 other weights 1", "--json")
    after = json.loads(out)["runs"]
    assert status == 0
    assert after[0] == before[0]
    assert [run["variant"] for run in after] == ["fp32", "fp32 other weights 1"]
    first, other = (run["losses"][0] for run in after)  # other weights, of which none knows anything yet
    assert first != other == pytest.approx(first, abs=0.3)
    assert after[1]["wire"] == after[0]["wire"]
    status, _, err = bench("--variants=fp32", "--train.learning_rate=0.5")
    assert status == 2
    reason = "holds results of another config or number of ranks; choose another --out"
    assert err.strip().splitlines() == [f"megascale: {tmp_path / 'convergence.json'}: {reason}"]
    status, _, err = bench("--variants=int4")
    assert status == 2
    assert "--variants: 'int4' is unknown; known: fp32, gradients bf16" in err


def test_rows_and_names() -> None:
    errors = {"0": {"head": (0.5, 0.9)}}
    runs = [
        {"variant": name, "seed": seed, "losses": [9.0], "evaluations": {"1": loss}, "gradient_errors": errors}
        for name, seed, loss in (("fp32", 0, 2.0), ("fp32", 1, 2.2), ("all fp8", 0, 2.1), ("all fp8", 1, 2.2))
    ]
    exact, narrow = rows(runs)
    assert (exact["median"], exact["spread"]) == (pytest.approx(2.1), pytest.approx(0.2))
    assert narrow["to_fp32"] == pytest.approx(0.05)
    assert layer_of("layers.3.ffn.router.weight") == "3 ffn"
    assert layer_of("layers.0.attention_norm.weight") == "0 attention"
    assert layer_of("head.weight") == "head"
    assert all("," not in name for name in VARIANTS)  # they are listed with commas
