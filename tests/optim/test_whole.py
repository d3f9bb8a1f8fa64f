"""An optimizer that needs whole matrices, in layouts that cut them in every way; the rule is a toy from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axis, connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import TrainConfig, WireConfig
from megascale_moe.engine.memory import tensors_in
from megascale_moe.engine.op import Stream
from megascale_moe.engine.trace import Trace
from megascale_moe.model.counts import parameter_shapes
from megascale_moe.optim import registry
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.optim.whole import TOGETHER_ON_CPU
from megascale_moe.strategies.placement import Placement, columns, everything, rows, share
from megascale_moe.testing import run_ranks
from tests.optim import layouts
from tests.optim.layouts import LAYOUTS, MODEL, RATE, Updated, initial, on_ranks, summed
from tests.optim.test_sharded import declared
from tests.optim.toys import CUBED, HEAVY_BALL

STEPS = 3
TRAIN = TrainConfig(optimizer="cubed", weight_decay=0.1, clip_norm=0.0)  # type: ignore[arg-type]
STACKED = {"qkv": (16, 8, 8), "ffn.w13": (12, 12), "experts.w13": (8, 8), "shared.w13": (8, 8)}
"""Heights of the matrices of fused weights."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RULES", (*registry.RULES, HEAVY_BALL, CUBED))


# --- against whole weights --------------------------------------------------------------------------------------------


def reference(replicas: dict[str, int], train: TrainConfig = TRAIN) -> tuple[dict[str, Tensor], list[float]]:
    """The toy written down once more, weight by weight and matrix by matrix, without anything of the package."""
    weights = {name: initial(name) for name in replicas}
    speeds = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    for step in range(STEPS):
        gradients = {name: summed(name, step, count) for name, count in replicas.items()}
        norms.append(float(torch.cat([g.flatten() for g in gradients.values()]).double().norm()))
        factor = train.clip_norm / (norms[-1] + 1e-6) if 0 < train.clip_norm < norms[-1] else 1.0
        for name, weight in weights.items():
            speeds[name] = 0.9 * speeds[name] + factor * gradients[name]
            kept = 1 - RATE * 0.1 if weight.dim() > 1 else 1.0
            weights[name] = kept * weight - RATE * change_of(name, speeds[name])
    return weights, norms


def change_of(name: str, speed: Tensor) -> Tensor:
    if not name.startswith("layers.") or speed.dim() == 1:
        return speed
    heights = next((heights for part, heights in STACKED.items() if part in name), speed.shape[-2:-1])
    experts = speed.view(-1, *speed.shape[-2:])
    changed = []
    for expert in experts:
        for x in expert.split(list(heights)):
            x = x / x.norm()
            changed.append(x @ x.T @ x)
    return torch.cat(changed).view(speed.shape)


def replicas_of(results: list[Updated]) -> dict[str, int]:
    """Of all weights, some of which only ranks of another stage have."""
    return {name: count for result in results for name, count in result.replicas.items()}


def largest(results: list[Updated], wanted: dict[str, Tensor]) -> float:
    """The relative error of the weight that is off most, over all ranks."""
    return max(
        float((weight - part).norm() / part.norm())
        for result in results for name, weight in result.weights.items()
        for part in [result.placed[name].take(wanted[name])]
    )  # fmt: skip


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_of_whole_matrices(layout: str, clip: float) -> None:
    """1e-6: three updates of products of 16 terms each, a unit or two of 6e-8 on weights of size one."""
    train = replace(TRAIN, clip_norm=clip)
    results = on_ranks(LAYOUTS[layout], train, STEPS)
    wanted, norms = reference(replicas_of(results), train)
    assert set(wanted) == set(parameter_shapes(MODEL))
    assert largest(results, wanted) < 1e-6
    for result in results:
        assert result.norms == pytest.approx(norms, rel=1e-6)  # a root of a sum of 6,000 squares


@pytest.mark.parametrize("layout", ["two nodes", "tp in two nodes", "ep+tp", "pp"])
def test_hidden_and_by_layer_it_is_the_same(layout: str) -> None:
    """Bit for bit: sums of whole numbers are exact, and a matrix is transformed whole wherever that is done."""
    plain = on_ranks(LAYOUTS[layout], TRAIN, STEPS)
    for found, wanted in zip(on_ranks(LAYOUTS[layout], TRAIN, STEPS, hidden=True), plain, strict=True):
        assert all(torch.equal(weight, wanted.weights[name]) for name, weight in found.weights.items())
        collected = [name for name in found.sent if name.endswith("collect")]
        assert all(name.startswith("update.layers.") for name in collected)


@pytest.mark.parametrize("gradients", ["bf16", "fp8"])
def test_gradients_in_other_formats_are_collected_like_others(gradients: str) -> None:
    """Bit for bit: the numbers of two nodes of two ranks, up to 6, have three digits, which both formats keep."""
    plain = on_ranks(LAYOUTS["two nodes"], TRAIN, STEPS)
    narrow = on_ranks(LAYOUTS["two nodes"], TRAIN, STEPS, WireConfig(gradients=gradients))  # type: ignore[arg-type]
    for found, wanted in zip(narrow, plain, strict=True):
        assert all(torch.equal(weight, wanted.weights[name]) for name, weight in found.weights.items())


def test_parameters_in_bf16_are_the_rounded_ones() -> None:
    plain = on_ranks(LAYOUTS["tp in two nodes"], TRAIN, 1)
    narrow = on_ranks(LAYOUTS["tp in two nodes"], TRAIN, 1, WireConfig(parameters="bf16"))
    for found, wanted in zip(narrow, plain, strict=True):
        shared = {name for name, count in wanted.replicas.items() if count > 1}
        assert shared
        assert all(torch.equal(found.weights[name], wanted.weights[name].bfloat16().float()) for name in shared)


# --- what is sent and held --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_declared_bytes_are_those_of_the_rank_that_sends_most(layout: str) -> None:
    """Of collecting and giving back; all other messages are alike on all ranks of a stage."""
    results = on_ranks(LAYOUTS[layout], TRAIN, 1)
    for first in range(0, len(results), len(results) // LAYOUTS[layout].pp):
        stage = results[first : first + len(results) // LAYOUTS[layout].pp]
        for name, most in stage[0].declared.items():
            counted = [result.sent.get(name, 0) for result in stage]
            assert {result.declared[name] for result in stage} == {most}
            assert max(counted) == most
            if not name.startswith("update."):
                assert min(counted) == most, name


NODES = ("node", "tensor_data")
CASES: dict[str, tuple[Mesh, dict[str, list[int]]]] = {
    # 64 elements over four ranks. The first has least work (as all), so the others send it their 16.
    "data": (Mesh(dp=4), {"inter_collect": [0, 64, 64, 64], "inter_return": [192, 0, 0, 0]}),
    "node": (Mesh(node=4), {"intra_collect": [0, 64, 64, 64], "intra_return": [192, 0, 0, 0]}),
    # First to the owner's node, from each place of the other one, then inside of it. Ranks are node by node.
    "both": (Mesh(dp=2, node=2), {
        "inter_collect": [0, 0, 64, 64], "intra_collect": [0, 128, 0, 0],
        "intra_return": [128, 0, 0, 0], "inter_return": [64, 64, 0, 0],
    }),
    # 128 elements in two halves, of rows or columns, each of which two nodes share.
    "rows": (Mesh(dp=2, node=2), {
        "inter_collect": [0, 0, 128, 128], "tensor_collect": [0, 256, 0, 0],
        "tensor_return": [256, 0, 0, 0], "inter_return": [128, 128, 0, 0],
    }),
}  # fmt: skip
CASES["columns"] = CASES["rows"]


def placed(case: str, mesh: Mesh, rank: int) -> Placement:
    mine = share(16, 2, rank % 2)
    place = {
        "rows": rows((16, 8), [mine], ("", "tensor_data"), "node"),
        "columns": columns((8, 16), mine, ("", "tensor_data"), "node"),
    }.get(case, everything((8, 8), NODES))
    return replace(place, matrices=(place.whole[0],))


def optimizer_of(case: str, mesh: Mesh, axes: Any, rank: int) -> ShardedOptimizer:
    groups = flat_groups({"w": placed(case, mesh, rank)}, axes, torch.float32, torch.device("cpu"), rule=CUBED)
    return ShardedOptimizer(groups, axes, TRAIN)


def sent_on_rank(case: str, mesh: Mesh) -> tuple[dict[str, int], dict[str, float]]:
    optimizer = optimizer_of(case, mesh, connect(mesh), dist.get_rank())
    optimizer.step(RATE, trace := Trace())
    found = {name: count for (name, _), count in trace.wire_bytes().items() if name.startswith("update.")}
    return found, {name: count for name, count in declared(optimizer.ops).items() if name.startswith("update.")}


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_one_matrix(case: str) -> None:
    """Counted by hand, four bytes an element: what is not with the owner goes there once and comes back once."""
    mesh, wanted = CASES[case]
    results = run_ranks(mesh.world, sent_on_rank, case, mesh)
    for step, counts in wanted.items():
        ours = [{name.rsplit(".", 1)[1]: count for name, count in sent.items()} for sent, _ in results]
        assert [found[step] for found in ours] == counts
        assert {max(counts)} == {total for _, said in results for name, total in said.items() if name.endswith(step)}
    assert all(len(sent) == len(wanted) for sent, _ in results)


def test_one_rank_sends_nothing_and_copies_nothing_around() -> None:
    groups = flat_groups({"w": placed("data", Mesh(), 0)}, single(), torch.float32, torch.device("cpu"), rule=CUBED)
    names = [op.name for op in ShardedOptimizer(groups, single(), TRAIN).ops]
    assert names == [
        "gradients.replicated.squares", "gradients.sum_squares", "gradients.norm",
        "update.replicated.prepare", "update.replicated.transform", "update.replicated", "parameters.ready",
    ]  # fmt: skip


def flat(name: str, intra: Axis, inter: Axis) -> FlatWeights:
    place = {"w": replace(everything((8, 8), NODES), matrices=(8,))}
    return FlatWeights(place, intra, inter, decay=True, dtype=torch.float32, device=torch.device("meta"), name=name)


def test_a_group_travels_while_another_is_transformed() -> None:
    axes = {"world": Axis("world", 4), "node": Axis("node", 2), "tensor_data": Axis("tensor_data", 2)}
    groups = [flat(name, axes["node"], axes["tensor_data"]) for name in "ab"]
    ops = ShardedOptimizer(groups, axes, TRAIN).ops
    assert [op.name for op in ops if op.name.startswith(("update.", "parameters."))] == [
        "update.a.prepare", "update.a.inter_collect",
        "update.b.prepare", "update.b.inter_collect", "update.a.intra_collect",
        "update.b.intra_collect", "update.a.transform", "update.a.intra_return",
        "update.b.transform", "update.b.intra_return", "update.a.inter_return",
        "update.b.inter_return", "update.a", "parameters.a.inter_all_gather",
        "update.b", "parameters.b.inter_all_gather", "parameters.a.intra_all_gather",
        "parameters.b.intra_all_gather", "parameters.ready",
    ]  # fmt: skip
    streams = {op.name.rsplit(".", 1)[1]: op.stream for op in ops if "collect" in op.name or "return" in op.name}
    assert streams == {
        "inter_collect": Stream.INTER, "intra_collect": Stream.INTRA,
        "inter_return": Stream.INTER, "intra_return": Stream.INTRA,
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_there_once_over_the_replicas(layout: str) -> None:
    """One number an element, however many ranks have it; as much again is padding at most (`FlatWeights`)."""
    results = on_ranks(LAYOUTS[layout], TRAIN, 1)
    held = sum(result.held["optimizer"] for result in results)
    elements = sum(part.numel() for part in map(initial, parameter_shapes(MODEL)))
    padding = sum(result.held["parameters"] / 4 for result in results)
    parts = sum(weight.numel() for result in results for weight in result.weights.values())
    assert 4 * elements <= held
    assert held - 4 * elements <= 4 * (padding - parts)


def test_large_matrices_are_transformed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch needs beside the shard has a bound; the result is the same."""
    sizes: list[int] = []
    monkeypatch.setattr(layouts, "CHUNK", 1 << 20)

    def noted(matrices: Tensor, config: TrainConfig) -> Tensor:
        sizes.append(matrices.numel())
        return cubed_(matrices, config)

    cubed_ = CUBED.transform
    monkeypatch.setattr(CUBED, "transform", noted)
    whole = on_ranks(LAYOUTS["one rank"], TRAIN, 1)
    assert max(sizes) <= TOGETHER_ON_CPU
    assert max(sizes) > 1000
    sizes.clear()
    monkeypatch.setattr("megascale_moe.optim.whole.TOGETHER_ON_CPU", 1000)
    few = on_ranks(LAYOUTS["one rank"], TRAIN, 1)
    assert max(sizes) <= 1000
    assert all(torch.equal(weight, whole[0].weights[name]) for name, weight in few[0].weights.items())


def test_what_counts_memory_sees_fragments() -> None:
    """They travel through the list as dictionaries, by number."""
    optimizer = optimizer_of("data", Mesh(), single(), 0)
    prepare = next(op for op in optimizer.ops if op.name.endswith("prepare"))
    direction, fragments = prepare.run(torch.ones(64), 1.0)
    assert [tensor.data_ptr() for tensor in tensors_in(fragments)] == [direction.data_ptr()]
