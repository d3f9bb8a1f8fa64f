"""Optimizers as rules: AdamW's against torch, and two toys from outside through everything that reads a rule."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megascale_moe.checkpoint import Checkpoint, save
from megascale_moe.comm.axis import axes_of, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ModelConfig, ParallelConfig, TrainConfig
from megascale_moe.engine.op import Phase
from megascale_moe.model.counts import parameter_matrices, parameter_shapes
from megascale_moe.optim import registry
from megascale_moe.optim.adamw import ADAMW
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.rule import Rule, State, Whole
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.planner.bounds import least_bytes
from megascale_moe.planner.cluster import load
from megascale_moe.planner.search import search
from megascale_moe.planner.space import Space
from megascale_moe.planner.step import Pricer, memory
from megascale_moe.strategies.placement import everything
from megascale_moe.testing import run_ranks
from megascale_moe.tools.dryrun.step import dry_run
from megascale_moe.tools.verify.command import verify
from megascale_moe.train.trainer import Trainer
from tests.optim.toys import CUBED, HEAVY_BALL, HeavyBall
from tests.train.short_runs import (
    MODEL,
    TRAIN,
    Story,
    alone,
    config_of,
    state_of,
    stories,
    tell,
    train_steps,
    trainer_of,
)

# Float32 sums in another order: some 2^-24 of a loss near 4, and a few updates from there; see test_pipeline.py.
LOSS = 1e-5
TOYS = ("heavy_ball", "cubed")
STATE = {"adamw": 8, "heavy_ball": 4, "cubed": 4}
"""Bytes of an element of every weight; "cubed" keeps another number for what is no matrix, of the same size."""


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds an optimizer does this by one line in the registry."""
    monkeypatch.setattr(registry, "RULES", (*registry.RULES, HEAVY_BALL, CUBED))


def trained_with(optimizer: str, train: TrainConfig = TRAIN) -> TrainConfig:
    return replace(train, optimizer=optimizer)  # type: ignore[arg-type]


# --- the rule that is there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [True, False])
def test_the_plain_form_of_adamw_is_torchs(decay: bool) -> None:
    """The third of three updates. 1e-6 of weights of size one: a handful of roundings of 6e-8 in another order."""
    config = TrainConfig(weight_decay=0.1)
    weight = nn.Parameter(torch.randn(5, 7))
    theirs = torch.optim.AdamW(
        [weight], lr=0.01, betas=(config.beta1, config.beta2), eps=config.adam_eps, weight_decay=0.1 if decay else 0.0
    )
    for steps in range(3):
        weight.grad = torch.randn(5, 7)
        before, old = weight.detach().clone(), theirs.state[weight]
        state = {name: old[name].clone() if steps else torch.zeros(5, 7) for name in ("exp_avg", "exp_avg_sq")}
        theirs.step()
        whole = Whole(before, weight.grad, state, count=steps, decay=decay)
        found = ADAMW.plain(whole, 0.01, config)
        assert float((found - weight.detach()).abs().max()) < 1e-6


def test_state_of_adamw_is_two_numbers_an_element() -> None:
    assert ADAMW.state_bytes == 8
    assert [(state.name, state.signed) for state in ADAMW.state] == [("exp_avg", True), ("exp_avg_sq", False)]


def test_an_optimizer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError) as refusal:
        rule_of(trained_with("sgd"))
    known = ", ".join(repr(rule.name) for rule in registry.RULES)
    assert str(refusal.value) == f"train.optimizer = 'sgd': must be one of {known}"


def test_state_may_be_of_another_dtype() -> None:
    """Bytes that stay are those of the rule's dtypes: here two an element, for 16 elements."""

    class Narrow(HeavyBall):
        state = (State("velocity", torch.bfloat16),)

    narrow = Narrow()
    groups = flat_groups({"w": everything((4, 4), ("node", "tensor_data"))}, single(), torch.bfloat16,
                         torch.device("cpu"))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "RULES", (narrow,))
        optimizer = ShardedOptimizer(groups, single(), trained_with("heavy_ball"))
    assert narrow.state_bytes == 2
    assert optimizer.held_bytes()["optimizer"] == (4 + 2) * 16
    assert optimizer.state()[0]["velocity"].dtype == torch.bfloat16


def test_groups_of_another_optimizer_are_a_defect(toys: None) -> None:
    """Else a rule would be given weights that it cannot update: here a vector, to one that needs matrices."""
    places = {
        "v.weight": everything((4,), ("node", "tensor_data")),
        "m.weight": replace(everything((4, 4), ("node", "tensor_data")), matrices=(4,)),
    }  # fmt: skip
    mixed = {"e.weight": everything((4, 4), ("node", "tensor_data")), **places}
    groups = flat_groups(mixed, single(), torch.float32, torch.device("cpu"))
    with pytest.raises(AssertionError, match="weights of replicated follow several rules"):
        ShardedOptimizer(groups, single(), trained_with("cubed"))
    groups = flat_groups(mixed, single(), torch.float32, torch.device("cpu"), rule=CUBED)
    names = ["replicated", "replicated.heavy_ball", "replicated.vectors.heavy_ball"]
    assert [group.name for group in groups] == names
    assert [rule.name for rule in ShardedOptimizer(groups, single(), trained_with("cubed")).rules] == [
        "cubed", "heavy_ball", "heavy_ball"
    ]  # fmt: skip


# --- toys: training and checkpoints -----------------------------------------------------------------------------------



def in_a_process_of_its_own(function: Any, *args: Any) -> Any:
    """A lone rank: a trainer tells the allocator to keep freed memory, which other tests would notice."""
    (result,) = run_ranks(1, function, *args)
    return result


LAYOUTS: dict[str, dict[str, Any]] = {
    "two nodes": {"dp": 2, "node": 2, "ep": 2},
    "pipeline": {"pp": 2, "node": 2, "attention": "tp", "ep": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", TOYS)
def test_a_toy_trains_the_same_in_every_layout(optimizer: str, layout: str, toys: None) -> None:
    config = config_of(MODEL, trained_with(optimizer), **LAYOUTS[layout])
    one, ours = in_a_process_of_its_own(tell, alone(config), 4), stories(config, 4)
    assert max(abs(a - b) for a, b in zip(ours[0].losses, one.losses, strict=True)) < LOSS
    found, wanted = state_of(ours), state_of([one])
    assert found.keys() == wanted.keys()
    # 1e-4 of each tensor: four updates of gradients that differ by 1e-6, divided by the norm of their matrix.
    assert max(float((found[n] - w).norm() / w.norm()) for n, w in wanted.items() if w.any()) < 1e-4


def names_of(optimizer: str, model: ModelConfig = MODEL) -> set[str]:
    """Of a checkpoint's tensors, for a model without buffers."""
    kinds: dict[bool, tuple[str, ...]] = {
        matrix: ("parameters", {"heavy_ball": "velocity", "cubed": "speed" if matrix else "velocity"}[optimizer])
        for matrix in (True, False)
    }
    matrices = parameter_matrices(model)
    return {f"{kind}.{name}" for name in parameter_shapes(model) for kind in kinds[bool(matrices[name])]}


def begin(config: Config, folder: Path) -> list[float]:
    """Train, save, and go on: the losses behind the checkpoint."""
    trainer, story = trainer_of(config), Story()
    trainer.initialise()
    train_steps(trainer, 2, story)
    world = trainer.mesh.world
    save(
        folder, trainer.steps, list(trainer.pieces()), {}, rank=dist.get_rank() if world > 1 else 0, world=world,
        barrier=dist.barrier if world > 1 else lambda: None,
    )  # fmt: skip
    train_steps(trainer, 2, story)
    return story.losses[2:]


def go_on(config: Config, folder: Path) -> list[float]:
    """Load and go on: the losses."""
    trainer, story = trainer_of(config), Story()
    trainer.load(Checkpoint(folder / "step-2"))
    train_steps(trainer, 2, story)
    return story.losses


def refused(config: Config, folder: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        go_on(config, folder)
    return str(refusal.value)


@pytest.mark.parametrize("optimizer", TOYS)
def test_a_toys_checkpoint_continues_in_another_layout(optimizer: str, toys: None, tmp_path: Path) -> None:
    config = config_of(MODEL, trained_with(optimizer), **LAYOUTS["two nodes"])
    losses = run_ranks(4, begin, config, tmp_path)[0]
    assert set(Checkpoint(tmp_path / "step-2").tensors) == names_of(optimizer)
    for other in (alone(config), config_of(MODEL, trained_with(optimizer), **LAYOUTS["pipeline"])):
        world = 1 if other.parallel.pp == 1 else 4
        found = run_ranks(world, go_on, other, tmp_path)[0]
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < LOSS


@pytest.mark.parametrize(
    ("saved", "resumed", "there", "here"),
    [
        ("adamw", "heavy_ball", "exp_avg, exp_avg_sq", "velocity"),
        ("cubed", "adamw", "speed, velocity", "exp_avg, exp_avg_sq"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused_in_one_line(
    saved: str, resumed: str, there: str, here: str, toys: None, tmp_path: Path
) -> None:
    in_a_process_of_its_own(begin, config_of(MODEL, trained_with(saved)), tmp_path)
    found = in_a_process_of_its_own(refused, config_of(MODEL, trained_with(resumed)), tmp_path)
    assert found == (
        f"{tmp_path / 'step-2'} is a checkpoint of another optimizer: it keeps {there} of each weight, "
        f"train.optimizer = {resumed!r} keeps {here}; resume with the one that saved it"
    )


# --- toys: programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", TOYS)
def test_a_toy_is_verified_in_all_layouts(optimizer: str, toys: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(model=MODEL, train=trained_with(optimizer))
    assert verify(config, 2, as_json=True) == 0
    assert '"passed": true' in capsys.readouterr().out


def test_a_wrong_update_of_a_toy_is_named(
    toys: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plain form says something else: a velocity that is not kept."""
    right = HEAVY_BALL.plain

    def forgetful(whole: Whole, rate: float, config: TrainConfig) -> Any:
        return right(replace(whole, state={"velocity": 0.0 * whole.state["velocity"]}), rate, config)

    monkeypatch.setattr(HEAVY_BALL, "plain", forgetful)
    assert verify(Config(model=MODEL, train=trained_with("heavy_ball")), 2, only=True, as_json=True) == 1
    assert '"op": "update.' in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", TOYS)
@pytest.mark.parametrize("order", ["serial", "paper"])
def test_a_dry_run_counts_a_toys_state(optimizer: str, order: str, toys: None) -> None:
    """Masters of four bytes and the rule's numbers, beside AdamW's twelve; groups of two rules are padded apart."""
    found = {}
    for name in ("adamw", optimizer):
        config = config_of(MODEL, trained_with(name, replace(TRAIN, dtype="bf16")), **LAYOUTS["two nodes"])
        run = dry_run(replace(config, overlap=replace(config.overlap, order=order)), 4, 1)  # type: ignore[arg-type]
        assert run.agreement is not None
        assert run.agreement.disagreement == ""
        found[name] = run.rank["memory"]["optimizer"]
    # At most 64 more elements for each of the two groups more and their two layers.
    more = 8 * 4 * 64 if optimizer == "cubed" else 0
    assert 0 <= found[optimizer] - found["adamw"] * (4 + STATE[optimizer]) / 12 <= more


WHOLE = Config(
    model=ModelConfig(
        layers=4, hidden=1024, heads=8, kv_heads=4, experts=8, top_k=2, ffn_hidden=2048, vocab=4096,
        sequence_length=2048,
    ),
    train=TrainConfig(dtype="bf16", global_batch=16),
)  # fmt: skip


@pytest.mark.parametrize("optimizer", TOYS)
def test_a_plan_counts_a_toys_state(optimizer: str, toys: None) -> None:
    """Weights of two bytes, gradients and masters of four, and the rule's numbers."""
    ours = replace(WHOLE, train=trained_with(optimizer, WHOLE.train))
    parameters = sum(math.prod(shape) for shape in parameter_shapes(WHOLE.model).values())
    assert least_bytes(ours) == (2 + 4 + 4 + STATE[optimizer]) * parameters
    cluster = load("h800")
    kept = ("parallel.attention", "parallel.ffn", "parallel.pp", "train.micro_batch", "overlap.split")
    found = search(Space(ours, 4, cluster.node, frozenset(kept)), cluster, workers=1)
    best = found.plans[0]
    theirs = memory(replace(best.config, train=replace(best.config.train, optimizer="adamw")), cluster, 4)
    # A ten-thousandth: groups are padded to a few elements.
    assert best.bytes.optimizer == pytest.approx(theirs.optimizer * (4 + STATE[optimizer]) / 12, rel=1e-4)


@pytest.mark.parametrize("order", ["serial", "scheduled"])
def test_a_plan_prices_what_a_toy_does_to_matrices(order: str, toys: None) -> None:
    """Synchronisation and update take longer than heavy ball's by the products at least, at the peak at best."""
    config = replace(WHOLE, parallel=ParallelConfig(dp=2, node=2, ep=2), overlap=replace(WHOLE.overlap, order=order))  # type: ignore[arg-type]
    cluster = load("h800")
    took = {
        name: Pricer(cluster).layout(replace(config, train=trained_with(name, WHOLE.train)), 4).synchronisation(0)
        for name in TOYS
    }
    matrices = parameter_matrices(WHOLE.model)
    flops = sum(
        4.0 * rows**2 * shape[-1] * math.prod(shape[:-2])
        for name, shape in parameter_shapes(WHOLE.model).items() for rows in matrices[name]
    )
    more = took["cubed"].seconds - took["heavy_ball"].seconds
    assert more > flops / 4 / cluster.peaks["bf16"]


def test_updates_are_of_the_weight_phase(toys: None) -> None:
    """Reports tell them from the layers' operators by it and by the beginning of their names."""
    mesh = Mesh(dp=2, node=2, ep=2)
    config = config_of(MODEL, trained_with("cubed"), **LAYOUTS["two nodes"])
    trainer = Trainer(config, mesh, axes_of(mesh, 0), torch.device("meta"))
    names = [op.name for op in trainer.optimizer.ops if op.phase == Phase.W and not op.name.startswith("gradients.")]
    assert names
    assert all(name.startswith("update.") for name in names)


def test_rules_are_named_once() -> None:
    names = [rule.name for rule in registry.RULES]
    assert len(set(names)) == len(names)
    for rule in registry.RULES:
        assert isinstance(rule, Rule)
        assert all("." not in state.name for state in rule.state)
