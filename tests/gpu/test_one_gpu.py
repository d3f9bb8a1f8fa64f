"""The lists on one GPU against the plain modules on the CPU, `MoEBlock`, and whole training steps.

TF32 is off in torch's defaults, so float32 products keep their digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.axis import single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, TrainConfig
from megascale_moe.data import Batch
from megascale_moe.engine.executor import Program
from megascale_moe.engine.op import Op
from megascale_moe.engine.trace import Trace, now
from megascale_moe.kernels.blocks import Fusion
from megascale_moe.strategies.moe_block import MoEBlock
from megascale_moe.tools.verify.batch import BatchRows
from megascale_moe.tools.verify.reference import drawn
from megascale_moe.train.trainer import Trainer
from tests.strategies.layouts import Result, compare, random_rows, reference, relative, run_model
from tests.strategies.test_layouts import SMALL, VARIANTS

DEVICE = torch.device("cuda")

# float32 on both sides, but exp, rsqrt and division of a GPU are off by 2 ulp where a CPU's are by one, and its sums
# are trees: 1e-5 as between layouts of CPUs, times four.
TOLERANCE = 4e-5


@pytest.fixture(autouse=True)
def switch_restored() -> Iterator[None]:
    """A trainer sets the process-wide switch of fused kernels."""
    before = Fusion.enabled
    yield
    Fusion.enabled = before


def run(config: ModelConfig, batch: BatchRows, dtype: torch.dtype) -> Result:
    """The whole batch through the list on the GPU; gradients in float32."""
    return run_model(drawn(config, 0), batch, Mesh(), "all_to_all", device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_equals_the_plain_model_on_the_cpu(variant: str) -> None:
    config = VARIANTS[variant]
    batch = random_rows(config, rows=4)
    loss, gradient, name = compare([run(config, batch, torch.float32)], reference(config, batch))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


def test_bf16_loss_is_near_the_float32_one() -> None:
    """Every tensor between operators is rounded to 8 bits, 2^-8 each; the loss is a mean over 64 tokens."""
    config = replace(SMALL, hidden=64, ffn_hidden=32, balance_loss=0.0, z_loss=0.0)  # grouped_mm takes these sizes
    batch = random_rows(config, rows=4)
    found, wanted = run(config, batch, torch.bfloat16), reference(config, batch)
    assert found.loss == pytest.approx(wanted.loss, rel=0.02)
    assert all(torch.isfinite(value).all() for value in found.gradients.values())
    # Routing may differ for a token whose scores are close, so only weights all tokens pass are compared, loosely.
    assert relative(found.gradients["head.weight"], wanted.gradients["head.weight"]) < 0.1


def results(block: MoEBlock, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, slope = torch.randn(2, 3, 16, SMALL.hidden, generator=generator).to(device).unbind()
    x.requires_grad_()
    y, auxiliary = block.to(device)(x)
    ((y * slope).sum() + auxiliary).backward()
    assert x.grad is not None
    gradients = {name: p.grad.cpu() for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach().cpu(), "auxiliary": auxiliary.detach().cpu(), "x": x.grad.cpu(), **gradients}


def test_moe_block_moves_to_the_gpu() -> None:
    wanted, found = results(MoEBlock(SMALL), torch.device("cpu")), results(MoEBlock(SMALL), DEVICE)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative(found[name], value) < TOLERANCE, name


def losses(device: torch.device, **train: Any) -> list[float]:
    """Of six training steps on one batch."""
    model = replace(SMALL, hidden=64, ffn_hidden=32, init_std=0.02)
    options: dict[str, Any] = {"steps": 6, "warmup": 0, "learning_rate": 1e-2, "global_batch": 4, "compile": "off"}
    config = Config(model=model, train=TrainConfig(**options | train))
    trainer = Trainer(config, Mesh(), single(), device)
    trainer.initialise()
    rows = random_rows(model, rows=4)
    count = int((rows.targets >= 0).sum())
    batches = []
    for first in (0, 2):
        tokens, targets, segments = rows.part(slice(first, first + 2))
        batches.append(Batch(tokens, targets, segments.boundaries))
    return [trainer.step(batches, count).loss for _ in range(6)]


def test_training_steps_equal_those_of_the_cpu() -> None:
    """AdamW divides gradients by their own size: where one is only rounding, signs may differ and grow over steps."""
    assert losses(DEVICE) == pytest.approx(losses(torch.device("cpu")), rel=1e-3)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"compile": "on"}, {"dtype": "bf16", "compile": "on"}])
def test_training_learns(options: dict[str, str]) -> None:
    found = losses(DEVICE, **options)
    assert found[0] == pytest.approx(4.16, abs=0.1)  # log(64): knows nothing
    assert found[-1] < 0.9 * found[0]


def test_a_trace_has_the_times_of_the_gpu_not_of_the_queueing_host() -> None:
    """A product cannot take less than its FLOPs at twice any GPU's peak; queueing it takes a thousandth of that."""
    side = 8192
    x = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    ops = [Op(name=f"product {i}", reads=("x",), writes=(f"y{i}",), run=lambda x: x @ x) for i in range(3)]
    trace = Trace(device=DEVICE)
    for _ in range(2):
        Program(ops, ["x"]).run({"x": x}, {}, trace=trace)
    trace.settle()
    took = [event.end - event.start for event in trace.events]
    assert min(took) > 2 * side**3 / 5e15
    assert all(after.start == before.end for before, after in pairwise(trace.events))


def test_traces_of_steps_add_up() -> None:
    """Operators follow each other in the queue: none overlaps the one before it, none is missing."""
    model = replace(SMALL, hidden=64, ffn_hidden=32)
    train = TrainConfig(steps=6, global_batch=2, micro_batch=2, compile="off", dtype="bf16")
    trainer = Trainer(Config(model=model, train=train), Mesh(), single(), DEVICE)
    trainer.initialise()
    tokens, targets, segments = random_rows(model, rows=2).part(slice(None))
    for _ in range(2):
        begin = now()
        events = trainer.step([Batch(tokens, targets, segments.boundaries)], tokens.numel()).trace.events
        took = now() - begin
    assert len(events) > 20
    assert all(event.end >= event.start for event in events)
    assert all(after.start >= before.end for before, after in pairwise(events))
    assert sum(event.end - event.start for event in events) <= took
