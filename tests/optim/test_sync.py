"""Hierarchical synchronisation: sums and copies against plain ones, the order of the list, bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axis, axes_of, connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import TrainConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.op import Op, Phase, Stream
from megascale_moe.engine.trace import Trace
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.norm import NORM_BYTES
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.optim.sync import CHUNK, gather, given, reduce, shard_of, updated_of
from megascale_moe.strategies.placement import everything, rows
from megascale_moe.testing import run_ranks

REPLICAS = ("node", "tensor_data")
PLACES = {
    "matrix": everything((13, 5), REPLICAS),
    "qkv": rows((24, 3), [range(2, 4), range(10, 12), range(18, 20)], REPLICAS),  # three boxes
}


def flat(intra: Axis, inter: Axis, dtype: torch.dtype = torch.float32, name: str = "replicated") -> FlatWeights:
    return FlatWeights(PLACES, intra, inter, decay=True, dtype=dtype, device=torch.device("cpu"), name=name)


def update_op(group: FlatWeights) -> Op:
    """Nothing to update: the shard is there."""
    return Op(name=f"update.{group.name}", reads=(), writes=(updated_of(group),),
              run=lambda: group.weights[group.shard])  # fmt: skip


def gather_ops(groups: list[FlatWeights], chunk: int) -> list[Op]:
    return gather(groups, {group.name: [[update_op(group)]] for group in groups}, chunk)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [Mesh(dp=2, node=2), Mesh(dp=3, node=2), Mesh(node=2), Mesh(dp=2)],
                         ids=lambda mesh: f"dp{mesh.dp}-node{mesh.node}")  # fmt: skip
def test_ranks_get_the_sum_of_all_and_the_weights_of_all(mesh: Mesh) -> None:
    """Whatever the chunks: 7 and 5 do not divide a shard, 1000 is more than one."""
    run_ranks(mesh.world, check_all, mesh)


def check_all(mesh: Mesh) -> None:
    axes = connect(mesh)
    for dtype in (torch.float32, torch.bfloat16):
        sums = [check_once(flat(axes["node"], axes["tensor_data"], dtype), chunk) for chunk in (1000, 16, 7, 5)]
        assert all(torch.equal(other, sums[0]) for other in sums)


def check_once(group: FlatWeights, chunk: int) -> Tensor:
    """Sums are compared exactly, in whole numbers; returns the sum of others, whose last bits depend on the order."""
    size, rank, world = len(group.gradients), dist.get_rank(), dist.get_world_size()
    assert len(group.master) == {2: 64, 4: 32, 6: 32}[world]  # 112 elements, padded to 16 a rank
    numbers = [whole_numbers(size, peer) for peer in range(world)]
    assert torch.equal(summed(group, numbers[rank], chunk), torch.stack(numbers).sum(0)[group.shard])
    everywhere = whole_numbers(size, 99).to(group.weights.dtype)
    group.weights.fill_(-1.0)
    group.weights[group.shard] = everywhere[group.shard]
    run(gather_ops([group], chunk), {})
    assert torch.equal(group.weights, everywhere)
    return summed(group, numbers[rank] / 7, chunk)


def whole_numbers(size: int, seed: int) -> Tensor:
    """Up to 200: exact in bfloat16, sums exact in float32."""
    return torch.randint(-200, 200, (size,), generator=torch.Generator().manual_seed(seed)).float()


def summed(group: FlatWeights, mine: Tensor, chunk: int) -> Tensor:
    group.gradients.copy_(mine)
    values = Program(reduce([group], chunk), given([group]), [shard_of(group)]).run(given([group]), {})
    assert torch.equal(group.gradients, mine)  # read, not changed
    result = resolve(values, shard_of(group))
    assert isinstance(result, Tensor)
    return result


def run(ops: list[Op], values: dict[str, Tensor]) -> None:
    Program(ops, values).run(values, {})


# --- the list --------------------------------------------------------------------------------------------------------


def axes(n: int, d: int) -> tuple[Axis, Axis]:
    return Axis("node", n), Axis("tensor_data", d)


def steps(ops: list[Op]) -> list[str]:
    """What the operators do, with the chunk they write (or read)."""
    found = []
    for op in ops:
        chunk = next((name.rsplit(".", 1)[1] for name in (*op.writes, *op.reads) if name[-1].isdigit()), "")
        step = op.name.rsplit(".", 1)[1]
        found.append(f"{step} {chunk}" if chunk and step != "assemble" else step)
    return found


def test_a_chunk_travels_between_nodes_while_the_next_one_travels_inside() -> None:
    group = flat(*axes(2, 2))
    assert steps(reduce([group], chunk=14)) == [
        "pack 0", "intra_reduce_scatter 0",
        "pack 1", "intra_reduce_scatter 1", "inter_reduce_scatter 0",
        "pack 2", "intra_reduce_scatter 2", "inter_reduce_scatter 1",
        "inter_reduce_scatter 2", "assemble",
    ]  # fmt: skip
    assert steps(gather_ops([group], chunk=14)) == [
        "replicated", "inter_all_gather 0",
        "inter_all_gather 1", "intra_all_gather 0",
        "inter_all_gather 2", "intra_all_gather 1", "unpack 0",
        "intra_all_gather 2", "unpack 1",
        "unpack 2", "ready",
    ]  # fmt: skip


@pytest.mark.parametrize(("n", "d", "wanted"), [(1, 1, []), (2, 1, ["intra"]), (1, 2, ["inter"]),
                                                (2, 2, ["intra", "inter"])])  # fmt: skip
def test_one_chunk_needs_no_copies(n: int, d: int, wanted: list[str]) -> None:
    """As does a group on one level, whatever the chunks: there is nothing to overlap."""
    group = flat(*axes(n, d))
    chunk = CHUNK if n * d == 4 else 1
    assert steps(reduce([group], chunk)) == [f"{link}_reduce_scatter" for link in wanted]
    assert steps(gather_ops([group], chunk)) == [
        "replicated", *(f"{link}_all_gather" for link in reversed(wanted)), "ready"
    ]  # fmt: skip
    assert list(given([group])) == ["replicated.gradients" if wanted else "replicated.shard"]


def test_chunks_are_as_few_as_needed_and_equal() -> None:
    group = flat(*axes(2, 2))
    for chunk, count in ((32, 1), (31, 2), (16, 2), (15, 3), (1, 32)):
        ops = [op for op in reduce([group], chunk) if op.stream == Stream.INTER]
        assert len(ops) == count
        assert max(op.cost.wire_bytes for op in ops) - min(op.cost.wire_bytes for op in ops) <= 4


def test_links_do_not_idle_between_groups() -> None:
    """The first chunk of a group starts inside its node while the last one of the group before is between nodes."""
    a, b = flat(*axes(2, 2), name="a"), flat(*axes(1, 2), name="b")
    ops = reduce([a, b], chunk=16)
    assert [op.name for op in ops if op.stream != Stream.COMPUTE] == [
        "gradients.a.intra_reduce_scatter", "gradients.a.intra_reduce_scatter", "gradients.a.inter_reduce_scatter",
        "gradients.b.inter_reduce_scatter", "gradients.a.inter_reduce_scatter",
    ]  # fmt: skip
    ops = gather_ops([a, b], chunk=16)
    names = [op.name for op in ops]
    assert names.index("parameters.a.inter_all_gather") < names.index("update.b")
    assert names.index("update.b") < min(i for i, op in enumerate(ops) if reads_result_of(op, ops, "a.intra"))


def reads_result_of(op: Op, ops: list[Op], part: str) -> bool:
    return any(name in op.reads for other in ops if part in other.name for name in other.writes)


def test_a_step_starts_all_reductions_before_it_waits_for_one() -> None:
    groups = [flat(*axes(2, 2), name="a"), flat(*axes(1, 2), name="b")]
    ops = ShardedOptimizer(groups, {"world": Axis("world", 4)}, TrainConfig(), CHUNK).ops
    assert [op.name for op in ops] == [
        "gradients.a.intra_reduce_scatter", "gradients.b.inter_reduce_scatter", "gradients.a.inter_reduce_scatter",
        "gradients.a.squares", "gradients.b.squares", "gradients.norm_all_reduce", "gradients.norm",
        "update.a", "parameters.a.inter_all_gather",
        "update.b", "parameters.b.inter_all_gather", "parameters.a.intra_all_gather", "parameters.ready",
    ]  # fmt: skip


def test_streams_phases_and_tags() -> None:
    group = flat(*axes(2, 2))
    for ops, phase, kind in ((reduce([group], 8), Phase.W, "reduce_scatter"),
                             (gather_ops([group], 8), Phase.F, "all_gather")):  # fmt: skip
        sent = [op for op in ops if op.stream != Stream.COMPUTE]
        assert len(sent) == 8  # four chunks, two levels
        for op in sent:
            assert op.name.endswith(f"{'intra' if op.stream == Stream.INTRA else 'inter'}_{kind}")
            assert op.cost.axis == {Stream.INTRA: "node", Stream.INTER: "tensor_data"}[op.stream]
            assert op.phase == phase


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(8, 1), (1, 8), (2, 3), (8, 24)])
@pytest.mark.parametrize("chunk", [7, 16, CHUNK])
def test_declared_bytes_are_those_of_the_paper(n: int, d: int, dtype: torch.dtype, chunk: int) -> None:
    """2 P / n (d-1) / d elements between nodes and 2 P (n-1) / n inside, half of them gradients."""
    group = flat(*axes(n, d), dtype)
    p = len(group.weights)
    for ops, size in ((reduce([group], chunk), 4), (gather_ops([group], chunk), dtype.itemsize)):
        sent = dict.fromkeys(Stream, 0.0)
        for op in ops:
            sent[op.stream] += op.cost.wire_bytes
        assert sent[Stream.INTER] == pytest.approx(size * p / n * (d - 1) / d, rel=1e-12)
        assert sent[Stream.INTRA] == pytest.approx(size * p * (n - 1) / n, rel=1e-12)


@pytest.mark.bulky  # what torch does on its meta device imports its compiler
def test_a_dry_run_counts_the_bytes_of_a_cluster() -> None:
    """1536 ranks that are not there: meta tensors, axes without process groups."""
    mesh = Mesh(pp=2, dp=96, node=8, ep=8)
    axes = axes_of(mesh, mesh.stage + 9, "nccl")
    places = {"w": everything((4096, 1024), REPLICAS), "x": everything((8, 512, 512), ("", "expert_data"))}
    groups = flat_groups(places, axes, torch.bfloat16, torch.device("meta"))
    optimizer = ShardedOptimizer(groups, axes, TrainConfig(), chunk=1000)
    optimizer.step(0.1, trace := Trace())
    declared = sum(op.cost.wire_bytes for op in optimizer.ops)
    p, q = (len(group.weights) for group in groups)
    assert (mesh.dp, len(groups[0].master)) == (96, -(-p // (8 * 96)))
    # Two bytes a weight and four a gradient.
    wanted = 6 * (p * 7 / 8 + p / 8 * 95 / 96 + q * 95 / 96) + NORM_BYTES
    assert sum(trace.wire_bytes().values()) == declared == pytest.approx(wanted, rel=1e-12)
