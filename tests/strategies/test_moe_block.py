"""`MoEBlock` is the reference block to its user: alone, under DDP and FSDP2, in a foreign model, on several ranks."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megascale_moe.comm.axis import connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.engine.executor import Program
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import Block
from megascale_moe.strategies.moe_block import MoEBlock
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import relative
from tests.strategies.test_layouts import CAPACITY, LATENT, SMALL

# One layer in float32 whose sums are taken in another order: a few units of 6e-8 through some tens of operations.
TOLERANCE = 5e-6
ROWS, LENGTH = 3, 16
AUXILIARY = 3.0  # weight of the auxiliary loss in these tests

VARIANTS = {
    "gqa": SMALL,
    "capacity": CAPACITY,
    "mla": LATENT,
    "no-auxiliary": replace(SMALL, balance_loss=0.0, z_loss=0.0),
    "balance-only": replace(SMALL, z_loss=0.0),
    "shared-gated": replace(SMALL, shared_experts=2, shared_gate=True, qk_norm="head"),
}
Results = dict[str, Tensor]


def data(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Input and the slope of the output, [rows, LENGTH, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    x, slope = torch.randn(2, rows, LENGTH, SMALL.hidden, generator=generator).unbind()
    return x, slope


def named_gradients(module: nn.Module) -> Results:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def run(block: nn.Module, x: Tensor, slope: Tensor, *more: Any, auxiliary_weight: float = AUXILIARY) -> Results:
    """Output, auxiliary loss, and gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    y, auxiliary = block(x, *more)
    ((y * slope).sum() + auxiliary_weight * auxiliary).backward()
    assert x.grad is not None
    return {"y": y.detach(), "auxiliary": auxiliary.detach(), "x": x.grad, **named_gradients(block)}


class Reference(nn.Module):
    """The plain block behind the interface of `MoEBlock`."""

    def __init__(self, config: ModelConfig, dense: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.block, self.config = Block(config, config.spec_of(0, dense=dense)), config
        self.block.load_state_dict(MoEBlock(config, dense=dense, seed=seed).state_dict())

    def forward(self, x: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        segments = segments or Segments.whole_rows(*x.shape[:2])
        rope = rotary_table(self.config, segments.positions())
        y, auxiliary = self.block(x.flatten(0, 1), rope, segments)
        return y.view(x.shape), auxiliary / segments.positions().numel()


def assert_same(found: Results, wanted: Results) -> None:
    """Names and values."""
    wanted = {name.removeprefix("block."): value for name, value in wanted.items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert relative(found[name], value) < TOLERANCE, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_block_equals_the_reference_block(variant: str, packed: bool) -> None:
    config = VARIANTS[variant]
    more = [Segments(ROWS, LENGTH, (0, 5, 16, 32, 33, 47, 48))] if packed else []
    found = run(MoEBlock(config, seed=4), *data(1), *more)
    assert_same(found, run(Reference(config, seed=4), *data(1), *more))
    assert bool(found["auxiliary"]) == (variant != "no-auxiliary")


def test_dense_block_equals_the_reference_block() -> None:
    config = replace(SMALL, dense_layers=1, dense_ffn_hidden=20)
    assert_same(run(MoEBlock(config, dense=True), *data(1)), run(Reference(config, dense=True), *data(1)))


def test_other_shapes_use_the_same_block() -> None:
    block, reference = MoEBlock(SMALL), Reference(SMALL)
    for rows, length in ((1, 1), (2, 7), (ROWS, LENGTH), (2, 7)):
        x, slope = torch.randn(2, rows, length, SMALL.hidden).unbind()
        block.zero_grad()
        reference.zero_grad()
        found, wanted = run(block, x, slope), run(reference, x, slope)
        # A lone token attends to itself whatever q and k are: their gradient is zero but for rounding in both.
        for name in ("y", "auxiliary", "x", "ffn.experts.w13", "ffn.experts.w2", "attention.out.weight"):
            assert relative(found[name], wanted[name if name in wanted else f"block.{name}"]) < TOLERANCE, name


def test_gradients_add_up_over_backwards_and_frozen_parameters_get_none() -> None:
    block = MoEBlock(SMALL)
    once = run(block, *data(1))
    twice = run(block, *data(1))
    for name in named_gradients(block):
        assert relative(twice[name], 2 * once[name]) < TOLERANCE
    block.zero_grad()
    block.ffn.requires_grad_(False)
    assert not any(name.startswith("ffn.") for name in run(block, *data(1)) if name != "ffn_norm.weight")


def test_second_backward_is_refused() -> None:
    y, _ = MoEBlock(SMALL)(data(1)[0].requires_grad_())
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through the same MoEBlock"):
        y.sum().backward()


def test_evaluation_keeps_nothing() -> None:
    block, (x, _) = MoEBlock(SMALL), data(1)
    with torch.no_grad():
        y, auxiliary = block(x)
    assert not y.requires_grad
    assert not auxiliary.requires_grad
    assert torch.equal(y, block(x)[0])


def test_activations_are_freed_during_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were handed over as given names and all lived until the end of the backward list."""
    block, (x, slope) = MoEBlock(SMALL), data(1)
    activations: dict[str, weakref.ref[Tensor]] = {}
    left: list[str] = []
    original = Program.run

    def spy(self: Any, values: dict[str, Any], *args: Any) -> dict[str, Any]:
        if "d:y" in values:
            names = ("fc13_out", "fc2_in", "ffn_in")
            activations.update({name: weakref.ref(values[name]) for name in names})
        out = original(self, values, *args)
        left.extend(name for name, reference in activations.items() if reference() is not None)
        return out

    monkeypatch.setattr(Program, "run", spy)
    y, _ = block(x)
    (y * slope).sum().backward()
    assert len(activations) == 3
    assert left == []


@pytest.mark.bulky
def test_foreign_model_learns(torch_compiler: None) -> None:
    """An embedding, two blocks and torch's own optimizer learn to repeat a sequence by heart."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, SMALL.hidden), nn.Linear(SMALL.hidden, 20)
            self.blocks = nn.ModuleList(MoEBlock(SMALL, seed=seed) for seed in range(2))

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            x, auxiliary = self.embedding(tokens), torch.zeros(())
            for block in self.blocks:
                x, more = block(x)
                auxiliary = auxiliary + more
            return self.head(x), auxiliary

    model, tokens = Foreign(), torch.randint(0, 20, (4, LENGTH + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        logits, auxiliary = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + 0.01 * auxiliary).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.5  # log(20) = 3.0: knows nothing
    assert losses[-1] < 0.5 * losses[0]


# --- several ranks ---------------------------------------------------------------------------------------------------


def mean_over_ranks(world: int) -> Results:
    """What data parallelism must give: the mean over the ranks' own gradients."""
    runs = [run(Reference(SMALL), *data(rank)) for rank in range(world)]
    names = [name for name in runs[0] if name.startswith("block.")]
    return {name.removeprefix("block."): torch.stack([each[name] for each in runs]).mean(0) for name in names}


def assert_parameters(found: Results, wanted: Results) -> None:
    """Gradients of all parameters; the ranks' own outputs are left aside."""
    found = {name: value for name, value in found.items() if name in wanted}
    assert_same(found, wanted)


@pytest.mark.bulky
def test_gradients_under_ddp_are_the_mean_over_ranks(torch_compiler: None) -> None:
    for found in run_ranks(2, run_ddp):
        assert_parameters(found, mean_over_ranks(2))


def run_ddp() -> Results:
    block = MoEBlock(SMALL)
    run(DistributedDataParallel(block), *data(dist.get_rank()))
    return named_gradients(block)


@pytest.mark.bulky
def test_gradients_under_fsdp2_are_the_mean_over_ranks(torch_compiler: None) -> None:
    for found, _, _ in run_ranks(2, run_fsdp):
        assert_parameters(found, mean_over_ranks(2))


@pytest.mark.bulky
def test_steps_under_fsdp2_equal_steps_of_one_rank(torch_compiler: None) -> None:
    """The second forward must see the weights of the first update, on all ranks."""
    reference = Reference(SMALL)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            run(reference, *data(rank))
        for parameter in reference.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2
        optimizer.step()
    wanted = {name.removeprefix("block."): value.detach() for name, value in reference.named_parameters()}
    for _, weights, _ in run_ranks(2, run_fsdp):
        assert_same(weights, wanted)


@pytest.mark.bulky
def test_parameters_under_fsdp2_are_sharded(torch_compiler: None) -> None:
    whole = sum(parameter.numel() for parameter in MoEBlock(SMALL).parameters())
    assert [local for _, _, local in run_ranks(2, run_fsdp)] == [whole // 2] * 2  # all first sizes are even


def run_fsdp() -> tuple[Results, Results, int]:
    # Resharded after forward: in backward the weights must be those gathered again.
    block: Any = fully_shard(MoEBlock(SMALL), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    first: Results = {}
    for _ in range(2):
        optimizer.zero_grad()
        run(block, *data(dist.get_rank()))
        first = first or {name: p.grad.full_tensor().clone() for name, p in block.named_parameters()}
        optimizer.step()
    weights = {name: p.full_tensor().detach().clone() for name, p in block.named_parameters()}
    return first, weights, sum(p.to_local().numel() for p in block.parameters())


@pytest.mark.parametrize("variant", ["gqa", "mla", "capacity"])
@pytest.mark.parametrize("packed", [False, True])
def test_two_ranks_with_axes_equal_one(variant: str, packed: bool) -> None:
    """Each rank passes half of every sequence and holds half of the experts."""
    config = VARIANTS[variant]
    boundaries = (0, 5, 16, 32, 33, 47, 48) if packed else (0, 16, 32, 48)
    wanted = run(Reference(config), *data(1), Segments(ROWS, LENGTH, boundaries))
    wanted = {name.removeprefix("block."): value for name, value in wanted.items()}
    results = run_ranks(2, run_axes, config, boundaries)
    found: Results = {}
    for name in wanted:
        parts = [result[name] for result in results]
        if name in ("x", "y"):
            found[name] = torch.cat(parts, dim=1)
        elif ".experts." in name:
            found[name] = torch.cat(parts)
        else:
            found[name] = torch.stack(parts).sum(0) / (2 if name == "auxiliary" else 1)
    assert_same(found, wanted)


def run_axes(config: ModelConfig, boundaries: tuple[int, ...]) -> Results:
    block = MoEBlock(config, connect(Mesh(node=2, ep=2)))
    x, slope = (tensor.chunk(2, dim=1)[dist.get_rank()] for tensor in data(1))
    # The auxiliary loss is a mean over this rank's tokens: the whole is the mean of both.
    return run(block, x, slope, Segments(ROWS, LENGTH, boundaries), auxiliary_weight=AUXILIARY / 2)
