"""Synchronisation inside the step: the same training, its messages where the computation hides them.

Covered by pairs (tests/pairs.py): every layout meets every order, rematerialization, number of pieces and micro-batches
at once, and these meet each other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist

from megascale_moe.comm.axis import axes_of, connect
from megascale_moe.config import Config, OverlapConfig, ParallelConfig, TrainConfig, WireConfig
from megascale_moe.data import Batch
from megascale_moe.engine.op import Op, check
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.testing import run_ranks
from megascale_moe.train.trainer import Trainer
from tests.pairs import Case, name_of, pairs
from tests.pipeline.plans import two_at_once_are_scheduled
from tests.strategies.test_layouts import SMALL

STEPS = {"serial": 5, "paper": 3, "scheduled": 5}  # three of which measure, where the order follows from times
EVALUATED = (3, 5)  # steps behind which the model is evaluated, which needs the settled weights
LAYOUTS = {
    "two nodes": ParallelConfig(dp=2, node=2),
    "experts over two of four": ParallelConfig(dp=4, node=1, ep=2),
    "pipeline and data": ParallelConfig(pp=2, dp=2, node=1),
    "tensor": ParallelConfig(dp=2, node=2, attention="tp", ffn="tp", vocabulary="sharded"),
    "tied over a pipeline": ParallelConfig(pp=2, node=2),
    "interleaved": ParallelConfig(pp=2, node=2, schedule="interleaved", virtual_stages=2),
}
FACTORS = {
    "layout": tuple(LAYOUTS), "order": ("paper", "scheduled"), "remat": ("none", "paper"), "split": ("none", "2"),
    "micro_batches": ("1", "2"),
}  # fmt: skip
CASES = pairs(FACTORS, two_at_once_are_scheduled)


def config_of(
    parallel: ParallelConfig, overlap: OverlapConfig, wire: WireConfig | None = None, layers: int = 0
) -> Config:
    """Of a model with two layers for each rank of a pipeline."""
    train = TrainConfig(global_batch=4, micro_batch=1, warmup=1, steps=50, learning_rate=1e-2)
    model = replace(SMALL, layers=layers or 2 * parallel.pp, shared_experts=1, tied_embeddings=parallel.pp > 1)
    return Config(model=model, parallel=parallel, overlap=overlap, train=train, wire=wire or WireConfig())


@dataclass
class Course:
    """What training reported: losses of steps and, in between, of evaluations; gradient norms."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def course(parallel: ParallelConfig, overlap: OverlapConfig) -> Course:
    """Of a few steps in float32."""
    return trained(config_of(parallel, overlap), STEPS[overlap.order])[0]


def trained(config: Config, steps: int) -> tuple[Course, Trainer]:
    """A few steps on random tokens, and who went them."""
    mesh = mesh_of(config.parallel, config.model, dist.get_world_size())
    trainer = Trainer(config, mesh, connect(mesh), torch.device("cpu"))
    trainer.initialise()
    generator = torch.Generator().manual_seed(0)
    place, share = mesh.replica(dist.get_rank()), 4 // mesh.dp
    found = Course()
    for step in range(1, steps + 1):
        rows = torch.randint(0, 64, (4, 16), generator=generator)[place * share : (place + 1) * share]
        batches = [Batch(row[None], row[None].roll(-1, 1), (0, 16)) for row in rows]
        result = trainer.step(batches, 4 * 16)
        found.losses.append(result.loss)
        found.norms.append(result.grad_norm)
        if step in EVALUATED:
            found.losses.append(trainer.evaluate(batches[:1], 16 * mesh.dp))
    return found, trainer


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_training_is_the_same(case: Case) -> None:
    """Sums of a layer are those of the whole buffer: only the norm adds groups in another order, and pieces of GEMMs.

    1e-5 relative: float32 rounding of 1e-7, grown over five steps of AdamW, which divides by the root of small squares.
    """
    overlap = OverlapConfig(
        order=case["order"], remat=case["remat"], split=case["split"], micro_batches=int(case["micro_batches"])  # type: ignore[arg-type]
    )
    wanted = serial(case["layout"])
    for found in run_ranks(4, course, LAYOUTS[case["layout"]], overlap, timeout=30.0):
        assert len(found.norms) == STEPS[overlap.order]
        assert found.losses == pytest.approx(wanted.losses[: len(found.losses)], rel=1e-5)
        assert found.norms == pytest.approx(wanted.norms[: len(found.norms)], rel=1e-5)


@functools.cache
def serial(layout: str) -> Course:
    """The same with nothing hidden."""
    wanted: Course = run_ranks(4, course, LAYOUTS[layout], OverlapConfig())[0]
    return wanted


def hidden_list(layout: str) -> tuple[Trainer, list[Op]]:
    config = config_of(LAYOUTS[layout], OverlapConfig(order="paper", remat="paper"), layers=4)
    axes = axes_of(mesh_of(config.parallel, config.model, 4), 1)
    mesh = mesh_of(config.parallel, config.model, 4)
    trainer = Trainer(config, mesh, axes, torch.device("meta"))
    plan = StepPlan(config.model, config.parallel, axes, torch.float32, 1, 2, overlap=config.overlap)
    return trainer, trainer.optimizer.hidden(plan.ops)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_leave_behind_their_last_addition_and_weights_come_before_their_first_use(layout: str) -> None:
    trainer, ops = hidden_list(layout)
    names = {slot.name: group.name for group in trainer.optimizer.groups for slot in group.slots}
    for group in {names[name] for name in names}:
        members = {name for name, its in names.items() if its == group}
        adds = [place for place, op in enumerate(ops) if members & set(op.gradients)]
        uses = [place for place, op in enumerate(ops) if members & set(op.weights)]
        messages = [f"gradients.{group}.{level}_reduce_scatter" for level in ("intra", "inter")]
        sends = [place for place, op in enumerate(ops) if op.name in messages]
        ready = [place for place, op in enumerate(ops) if f"{group}.weights" in op.reads]
        if sends:
            assert max(adds) < min(sends)
            assert max(ready) < min(uses)


def test_only_the_last_layers_messages_are_left_at_the_end() -> None:
    """The backward ends with layer 0: gradients of the others are under way or here by then."""
    _, ops = hidden_list("two nodes")
    last = max(place for place, op in enumerate(ops) if op.gradients)
    late = {op.name.split(".")[2] for op in ops[last:] if "reduce_scatter" in op.name and ".layers." in op.name}
    assert late <= {"0"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_list_is_complete(layout: str) -> None:
    trainer, ops = hidden_list(layout)
    written = {name for op in ops for name in op.writes}
    given = {name for op in ops for name in op.reads} - written
    check(ops, given)
    plain = [op.name for op in trainer.optimizer.ops if op.cost.wire_bytes]
    hidden = [op.name for op in ops if op.name.startswith(("gradients.", "parameters.")) and op.cost.wire_bytes]
    assert sorted(plain) == sorted(hidden)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_without_operators_has_all_messages_too(layout: str) -> None:
    """A dry run compares the messages of thousands of ranks by such lists: reductions were missing in them."""
    trainer, _ = hidden_list(layout)
    plain = [op.name for op in trainer.optimizer.ops if op.cost.wire_bytes]
    hidden = [op.name for op in trainer.optimizer.hidden([]) if op.cost.wire_bytes]
    assert sorted(plain) == sorted(hidden)


def test_only_what_nothing_adds_to_is_cleared() -> None:
    """Clearing all buffers would be a pass over every gradient of a step; the first addition overwrites anyway."""
    trainer, ops = hidden_list("two nodes")
    assert "gradients.clear" not in [op.name for op in ops]
    optimizer = trainer.optimizer
    assert optimizer.hidden([])[0].name == "gradients.clear"
    clear = optimizer.hidden([op for op in ops if "norm.weight" not in op.gradients])[0]
    assert clear.name == "gradients.clear"
    clear.run()
    assert [name for name, gradient in optimizer.gradients.items() if not gradient.fresh] == ["norm.weight"]
