"""Sharded AdamW on several ranks against torch's AdamW on the full model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale_moe.comm.axis import Axis, connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import TrainConfig
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.sharded_adamw import ShardedAdamW, flat_groups
from megascale_moe.testing import run_ranks

# Odd sizes, so that shards cut through weights and padding is needed; experts are stacked.
SHAPES = {
    "norm.weight": (7,),
    "embedding.weight": (13, 5),
    "layers.0.ffn.experts.w13": (4, 3, 5),
    "layers.0.ffn.experts.w2": (4, 5, 3),
    "layers.0.attention.out.weight": (5, 11),
    "layers.0.ffn.unused.weight": (2, 3),  # no gradient ever reaches it
}
CONFIG = TrainConfig(weight_decay=0.1, clip_norm=1.0, beta1=0.9, beta2=0.95)
STEPS, RATE = 4, 0.01
MESHES = [Mesh(), Mesh(dp=2), Mesh(node=2, ep=2), Mesh(dp=4), Mesh(dp=2, node=2, ep=2), Mesh(dp=4, node=1, ep=4)]

# Gradients are float32 sums of at most 8 parts, once in rank order and once in one go: a few units of 6e-8. AdamW
# divides each by its own size, so a weight moves by RATE x (1 + 1e-6) at most, on weights of size one.
TOLERANCE = 1e-6
Weights = dict[str, Tensor]


def initial(name: str) -> Tensor:
    """Weights, a function of the name alone."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(sum(name.encode())))


def gradient(name: str, step: int) -> Tensor:
    """Of the global batch; some steps are above the clipping norm and some below."""
    if "unused" in name:
        return torch.zeros(SHAPES[name])
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(SHAPES[name], generator=generator) * (0.5 if step % 2 else 0.01)


def reference(config: TrainConfig = CONFIG) -> tuple[Weights, list[float]]:
    """torch's clipping and AdamW on whole tensors; vectors do not decay."""
    weights = {name: nn.Parameter(initial(name)) for name in SHAPES}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights.values() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in weights.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    norms = []
    for step in range(1, STEPS + 1):
        for name, parameter in weights.items():
            parameter.grad = gradient(name, step)
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), config.clip_norm or float("inf"))))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in weights.items()}, norms


def local(value: Tensor, name: str, mesh: Mesh, rank: int) -> Tensor:
    """A rank's part of a weight of the whole model."""
    return value.chunk(mesh.ep)[rank % mesh.ep] if ".experts." in name else value


def make(mesh: Mesh, config: TrainConfig, dtype: torch.dtype) -> ShardedAdamW:
    """A rank's optimizer with the initial weights."""
    axes, rank = (connect(mesh), dist.get_rank()) if mesh.world > 1 else (single(), 0)
    shapes = {name: local(initial(name), name, mesh, rank).shape for name in SHAPES}
    optimizer = ShardedAdamW(flat_groups(shapes, axes, dtype, torch.device("cpu")), axes["world"], config)
    for group in optimizer.groups:
        for slot in group.slots:
            group.set(slot, local(initial(slot.name), slot.name, mesh, rank))
    return optimizer


def accumulate(optimizer: ShardedAdamW, mesh: Mesh, step: int, micro: int = 2) -> None:
    """This rank's share of the gradient, unlike that of others, in micro-batches."""
    rank = dist.get_rank() if mesh.world > 1 else 0
    for name, sink in optimizer.gradients.items():
        peers = mesh.ranks("expert_data" if ".experts." in name else "data", rank)
        share = (peers.index(rank) + 1) / sum(range(1, len(peers) + 1))
        if "unused" not in name:
            for _ in range(micro):
                sink.add(local(gradient(name, step), name, mesh, rank) * (share / micro))


def run(
    mesh: Mesh, config: TrainConfig = CONFIG, dtype: torch.dtype = torch.float32
) -> tuple[Weights, list[float], int]:
    """Weights after all steps, the norms, and bytes of the last step."""
    optimizer = make(mesh, config, dtype)
    norms = []
    for step in range(1, STEPS + 1):
        accumulate(optimizer, mesh, step)
        norms.append(optimizer.step(RATE))
    return {name: weight.clone() for name, weight in optimizer.weights.items()}, norms, optimizer.wire_bytes


def on_ranks(mesh: Mesh, *args: Any) -> list[Any]:
    return [run(mesh, *args)] if mesh.world == 1 else run_ranks(mesh.world, run, mesh, *args)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"dp{mesh.dp}-node{mesh.node}-ep{mesh.ep}")
def test_weights_and_norms_equal_adamw_on_the_full_model(mesh: Mesh, clip: float) -> None:
    config = TrainConfig(weight_decay=0.1, clip_norm=clip)
    wanted, norms = reference(config)
    assert max(norms) > 1 > min(norms)  # both sides of the clipping norm
    for rank, (weights, found, _) in enumerate(on_ranks(mesh, config)):
        assert found == pytest.approx(norms, rel=1e-6)  # a root of a sum of 200 squares
        for name, weight in weights.items():
            assert largest_difference(weight, local(wanted[name], name, mesh, rank)) < TOLERANCE, name


def test_only_matrices_decay() -> None:
    """With a gradient of zero the update is the decay alone."""
    optimizer = make(Mesh(), TrainConfig(weight_decay=0.5, clip_norm=1.0), torch.float32)
    assert optimizer.step(0.1) == 0.0
    for name, weight in optimizer.weights.items():
        factor = 1.0 if name == "norm.weight" else 1 - 0.1 * 0.5
        assert largest_difference(weight, initial(name) * factor) < TOLERANCE, name


def test_replicas_hold_the_same_bits() -> None:
    mesh = Mesh(dp=2, node=2, ep=2)
    results = run_ranks(4, run, mesh)
    for rank, (weights, norms, _) in enumerate(results):
        twin = results[(rank + 2) % 4]  # same place in the other node: same experts
        assert norms == results[0][1]
        for name, weight in weights.items():
            assert torch.equal(weight, twin[0][name] if ".experts." in name else results[0][0][name]), name


# --- BF16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2, node=2, ep=2)], ids=["1", "4"])
def test_bf16_weights_are_the_rounded_float32_masters(mesh: Mesh) -> None:
    """AdamW runs on the masters: the weights are off by one rounding, not by one for each step."""
    wanted, _ = reference()
    for rank, (weights, _, _) in enumerate(on_ranks(mesh, CONFIG, torch.bfloat16)):
        for name, weight in weights.items():
            assert weight.dtype == torch.bfloat16
            full = local(wanted[name], name, mesh, rank)
            # Half a BF16 step is 2^-8 of the entry; the master itself is within TOLERANCE.
            assert bool(((weight.float() - full).abs() <= 2.0**-8 * full.abs() + TOLERANCE).all()), name


def test_updates_below_a_bf16_step_are_not_lost() -> None:
    """One step at 1.0 is 2^-7; 100 updates of 1e-4 are more than one, each alone is none."""
    shapes = {"w.weight": torch.Size([4, 4])}
    axes = single()
    groups = flat_groups(shapes, axes, torch.bfloat16, torch.device("cpu"))
    groups[0].set(groups[0].slots[0], torch.ones(4, 4))
    optimizer = ShardedAdamW(groups, axes["world"], TrainConfig(weight_decay=0.0))
    for _ in range(100):
        optimizer.gradients["w.weight"].add(torch.ones(4, 4))
        optimizer.step(1e-4)
    # A constant gradient moves every weight by the rate: 100 float32 additions, 6e-8 each.
    assert largest_difference(groups[0].master, torch.full((16,), 0.99)) < 1e-5
    assert optimizer.weights["w.weight"].unique().tolist() == [torch.tensor(0.99).bfloat16().item()]


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    """256 + 1 + 1 is 256 in BF16."""
    optimizer = make(Mesh(), CONFIG, torch.bfloat16)
    sink = optimizer.gradients["norm.weight"]
    for value in (256.0, 1.0, 1.0):
        sink.add(torch.full((7,), value, dtype=torch.bfloat16))
    assert sink.value().dtype == torch.float32
    assert sink.value().tolist() == [258.0] * 7


# --- bytes and buffers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"dp{mesh.dp}-node{mesh.node}-ep{mesh.ep}")
def test_bytes_of_a_step(mesh: Mesh, dtype: torch.dtype) -> None:
    """(4 + itemsize) P (n-1) / n: gradients reduce-scattered in float32, weights gathered in the compute dtype.

    P counts the padding to 16 elements a weight, and a buffer's to 16 a rank; n is the number of replicas, by weight.
    """
    wanted = 0.0
    for experts, vector in ((False, True), (False, False), (True, False)):
        sizes = [
            local(initial(name), name, mesh, 0).numel()
            for name, shape in SHAPES.items()
            if (".experts." in name, len(shape) == 1) == (experts, vector)
        ]
        n = mesh.stage // mesh.ep if experts else mesh.stage
        elements = sum(-(-size // 16) * 16 for size in sizes)
        wanted += (4 + dtype.itemsize) * (-(-elements // (16 * n)) * 16 * n) * (n - 1) / n
    assert [wire for _, _, wire in on_ranks(mesh, CONFIG, dtype)] == [wanted] * mesh.world


def test_views_and_shards_share_the_flat_memory() -> None:
    shapes = {"a": torch.Size([3, 5]), "b": torch.Size([7])}
    flat = FlatWeights(shapes, single()["data"], True, torch.float32, torch.device("cpu"))
    views = {name: (weight, gradient) for name, weight, gradient in flat.views()}
    assert [(slot.start, slot.stop) for slot in flat.slots] == [(0, 15), (16, 23)]
    assert flat.master.data_ptr() == flat.weights.data_ptr()  # float32: no copy
    flat.set(flat.slots[1], torch.arange(7.0))
    assert views["b"][0].tolist() == list(range(7))
    assert flat.weights[15] == 0
    views["a"][1].add(torch.ones(3, 5))
    assert flat.gradients.tolist() == [1.0] * 15 + [0.0] * 17


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_cover_every_element_once(world: int) -> None:
    covered: dict[str, list[int]] = {name: [] for name in SHAPES}
    for rank in range(world):
        shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
        flat = FlatWeights(shapes, Axis("data", world, rank), True, torch.bfloat16, torch.device("cpu"))
        for slot in flat.slots:
            flat.set(slot, torch.arange(float(slot.shape.numel())).view(slot.shape))
            inside = flat.overlap(slot)
            if inside is not None:
                covered[slot.name] += flat.master_part(slot, *inside).int().tolist()
    assert covered == {name: list(range(torch.Size(shape).numel())) for name, shape in SHAPES.items()}


def test_restored_optimizer_continues_bit_for_bit() -> None:
    whole, _, _ = run(Mesh())
    first = make(Mesh(), CONFIG, torch.float32)
    for step in (1, 2):
        accumulate(first, Mesh(), step)
        first.step(RATE)
    second = make(Mesh(), CONFIG, torch.float32)
    for mine, saved in zip(second.groups, first.groups, strict=True):
        mine.weights.copy_(saved.weights)
    for name, tensors in second.state().items():
        for tensor, saved_tensor in zip(tensors, first.state()[name], strict=True):
            tensor.copy_(saved_tensor)
    second.restore(2)
    for step in (3, 4):
        accumulate(second, Mesh(), step)
        second.step(RATE)
    assert all(torch.equal(second.weights[name], weight) for name, weight in whole.items())


def test_norm_of_a_large_shard_keeps_its_digits() -> None:
    """It was 0.2 % too small for these four million elements, 1 % for sixteen: the CPU's norm is one running sum."""
    axes = single()
    groups = flat_groups({"w.weight": torch.Size([2048, 2048])}, axes, torch.float32, torch.device("cpu"))
    optimizer = ShardedAdamW(groups, axes["world"], CONFIG)
    optimizer.gradients["w.weight"].add(torch.full((2048, 2048), 0.1))
    assert optimizer.step(0.0) == pytest.approx(204.8, rel=1e-6)  # 1024 terms of one size in float32: 4e-7
