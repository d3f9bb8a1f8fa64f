"""Collectives on forked gloo ranks against what they must deliver, worked out without communication."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axis, axes_of, connect
from megascale_moe.comm.collectives import (
    Pending,
    all_gather,
    all_gather_in_place,
    all_reduce_sum,
    exchange,
    reduce_scatter,
    sum_in_order,
    tag_of,
)
from megascale_moe.comm.mesh import AXES, Mesh
from megascale_moe.testing import run_ranks
from tests.pairs import Case, name_of, pairs


def all_to_all(x: Tensor, send_rows: list[int], receive_rows: list[int], axis: Axis, tag: int) -> Pending:
    """Rows of x [sum(send_rows), ...] to the ranks in order; finishes with [sum(receive_rows), ...]."""
    out = x.new_empty(sum(receive_rows), *x.shape[1:])
    return exchange(x.split(send_rows), out.split(receive_rows), axis, tag).then(lambda _: out)


DTYPES = [torch.float32, torch.int32, torch.bfloat16]


def world_axis() -> Axis:
    """All ranks."""
    return connect(Mesh(node=dist.get_world_size(), ep=dist.get_world_size()))["world"]


def message(sender: int, receiver: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows [rows, 3] that tell who sent them to whom; small whole numbers, exact in every dtype."""
    return (torch.arange(rows * 3).view(rows, 3) % 7 + 10 * sender + receiver).to(dtype)


def rows_between(sender: int, receiver: int) -> int:
    """Uneven, and none at all between some pairs."""
    return (2 * sender + 3 * receiver) % 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_to_all_delivers_uneven_and_empty_messages(world: int, dtype: torch.dtype) -> None:
    for rank, (received, wire) in enumerate(run_ranks(world, run_all_to_all, dtype)):
        wanted = [message(sender, rank, rows_between(sender, rank), dtype) for sender in range(world)]
        assert torch.equal(received, torch.cat(wanted))
        sent = sum(rows_between(rank, receiver) for receiver in range(world) if receiver != rank)
        assert wire == sent * 3 * dtype.itemsize


def run_all_to_all(dtype: torch.dtype) -> tuple[Tensor, int]:
    axis = world_axis()
    me, ranks = axis.index, range(axis.size)
    x = torch.cat([message(me, receiver, rows_between(me, receiver), dtype) for receiver in ranks])
    send, receive = [rows_between(me, rank) for rank in ranks], [rows_between(rank, me) for rank in ranks]
    pending = all_to_all(x, send, receive, axis, tag_of("test"))
    return pending.wait(), pending.wire_bytes


BOTH = {"world": ("2", "4"), "rows": ("0", "1", "5"), "dtype": ("float32", "int32", "bfloat16")}


@pytest.mark.parametrize("case", pairs(BOTH), ids=name_of)
def test_all_gather_and_reduce_scatter(case: Case) -> None:
    world, rows, dtype = int(case["world"]), int(case["rows"]), getattr(torch, case["dtype"])
    parts = [message(rank, 0, rows, dtype) for rank in range(world)]
    for rank, (gathered, gather_wire, reduced, reduce_wire) in enumerate(run_ranks(world, run_both, rows, dtype)):
        assert torch.equal(gathered, torch.cat(parts))
        wanted = sum(message(sender, rank, rows, dtype).float() for sender in range(world))
        assert torch.equal(reduced, torch.as_tensor(wanted).to(dtype))  # sums below 256: exact in BF16 too
        assert gather_wire == reduce_wire == rows * 3 * dtype.itemsize * (world - 1)


def run_both(rows: int, dtype: torch.dtype) -> tuple[Tensor, int, Tensor, int]:
    axis = world_axis()
    gathered = all_gather(message(axis.index, 0, rows, dtype).t().contiguous().t(), axis, tag_of("gather"))
    x = torch.cat([message(axis.index, receiver, rows, dtype) for receiver in range(axis.size)])
    reduced = reduce_scatter(x, axis, tag_of("reduce"))
    return gathered.wait(), gathered.wire_bytes, reduced.wait(), reduced.wire_bytes


@pytest.mark.parametrize("world", [2, 3])
def test_all_gather_in_place_fills_the_shares_of_the_others(world: int) -> None:
    wanted = torch.cat([message(rank, 0, 2, torch.bfloat16) for rank in range(world)])
    for filled, wire in run_ranks(world, run_in_place):
        assert torch.equal(filled, wanted)
        assert wire == 2 * 3 * 2 * (world - 1)


def run_in_place() -> tuple[Tensor, int]:
    axis = world_axis()
    buffer = torch.full((2 * axis.size, 3), -1.0, dtype=torch.bfloat16)
    buffer.chunk(axis.size)[axis.index].copy_(message(axis.index, 0, 2, torch.bfloat16))
    pending = all_gather_in_place(buffer, axis, tag_of("weights"))
    assert pending.wait() is buffer
    return buffer, pending.wire_bytes


def test_reduce_scatter_of_bfloat16_sums_in_float32() -> None:
    """256 + 1 is 256 in BF16: rounding after each addition would lose all four ones."""
    (first, *_) = run_ranks(4, run_large_and_small)
    assert first.dtype == torch.bfloat16
    assert first.tolist() == [260.0]


def run_large_and_small() -> Tensor:
    axis = world_axis()
    value = 257.0 if axis.index == 0 else 1.0  # 257 itself rounds to 256: the ones of the others must add up to 4
    x = torch.full((4,), value).to(torch.bfloat16) + (1 if axis.index == 3 else 0)
    out: Tensor = reduce_scatter(x, axis, tag_of("sum")).wait()
    return out


def test_sum_is_taken_in_rank_order() -> None:
    """Another order gives another float32: 1 is lost beside 1e8, but not if the large ones cancel first."""
    parts = [torch.tensor([value]) for value in (1e8, -1e8, 1.0)]
    assert sum_in_order([part.clone() for part in parts]).item() == 1.0
    assert sum_in_order([parts[2], parts[0], parts[1]]).item() == 0.0


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_started_in_another_order_still_meet_their_partners(world: int) -> None:
    """Same sizes, opposite order on odd ranks: without tags the two would swap their contents silently."""
    for first, second in run_ranks(world, run_crossed):
        assert first.tolist() == [[100.0 + rank] for rank in range(world)]
        assert second.tolist() == [[200.0 + rank] for rank in range(world)]


def run_crossed() -> tuple[Tensor, Tensor]:
    axis = world_axis()
    names = ["first", "second"] if axis.index % 2 == 0 else ["second", "first"]
    values = {"first": 100.0 + axis.index, "second": 200.0 + axis.index}
    started = {name: all_gather(torch.tensor([[values[name]]]), axis, tag_of(name)) for name in names}
    finished = {name: started[name].wait() for name in reversed(names)}
    return finished["first"], finished["second"]


def test_exchange_on_axes_of_a_mesh_stays_inside_the_axis() -> None:
    """dp 2 x node 2: the node axis joins (0, 1) and (2, 3), expert_data (0, 2) and (1, 3)."""
    results = run_ranks(4, run_axes)
    assert [result["node"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["expert_data"] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [result["data"] for result in results] == [[0, 1, 2, 3]] * 4
    assert [result["pp"] for result in results] == [[0], [1], [2], [3]]
    assert all(result["native"] is False for result in results)


def run_axes() -> dict[str, Any]:
    axes = connect(Mesh(dp=2, node=2, ep=2))
    rank = torch.tensor([dist.get_rank()], dtype=torch.int32)
    found: dict[str, Any] = {}
    for name in AXES:
        receive = list(torch.empty(axes[name].size, 1, dtype=torch.int32).unbind())
        if axes[name].size > 1:
            receive = exchange([rank] * axes[name].size, receive, axes[name], tag_of(name)).wait()
        else:
            receive = [rank]
        assert axes[name].index == [int(part) for part in receive].index(int(rank))
        found[name] = [int(part) for part in receive]
    return found | {"native": axes["world"].native}


def test_axes_with_the_same_ranks_share_a_process_group() -> None:
    assert run_ranks(2, run_sharing) == [True, True]


def run_sharing() -> bool:
    axes = connect(Mesh(node=2, ep=2))
    return len({axes[name].group for name in ("node", "ep", "data", "world")}) == 1 and axes["pp"].group is None


@pytest.mark.parametrize(
    ("backend", "native"), [("gloo", False), ("nccl", True), ("cpu:gloo,cuda:nccl", True), ("cpu:gloo", False)]
)
def test_native_knows_a_group_made_for_cpu_and_gpu(backend: str, native: bool) -> None:
    """torch answers the whole string for such a group; compared with "nccl" it fell back to point to point on GPUs."""
    assert Axis("world", 2, backend=backend).native is native
    assert not Axis("world").native


def test_cpu_tensors_never_take_the_native_path() -> None:
    """In a job on GPUs some tensors live on the CPU; NCCL would refuse them."""
    assert run_ranks(2, run_as_if_native) == [[0.0, 1.0], [0.0, 1.0]]


def run_as_if_native() -> list[float]:
    axis, x = replace(world_axis(), backend="cpu:gloo,cuda:nccl"), torch.tensor([float(dist.get_rank())])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all", "all_gather_into_tensor", "reduce_scatter_tensor"):
            patch.delattr(dist, name)
        assert axis.native
        gathered: Tensor = all_gather(x, axis, tag_of("x")).wait()
        all_gather_in_place(gathered, axis, tag_of("y")).wait()
        assert all_to_all(gathered, [1, 1], [1, 1], axis, tag_of("z")).wait().tolist() == [axis.index] * 2
        assert reduce_scatter(gathered, axis, tag_of("s")).wait().tolist() == [2 * axis.index]
    values: list[float] = gathered.tolist()
    return values


def test_all_reduce_gives_the_same_bits_everywhere() -> None:
    results = run_ranks(3, run_all_reduce)
    assert results[0] == results[1] == results[2]
    assert results[0] == pytest.approx(0.1 + 0.2 + 0.3, rel=1e-15)  # float64, three terms
    assert all_reduce_sum(torch.ones(2), Axis("world")).tolist() == [1.0, 1.0]  # a lone rank needs no group


def run_all_reduce() -> float:
    axis = world_axis()
    return float(all_reduce_sum(torch.tensor(0.1 * (axis.index + 1), dtype=torch.float64), axis))


def test_then_adds_a_step_after_the_wait() -> None:
    log: list[str] = []

    class Work:
        def wait(self) -> None:
            log.append("wait")

    def finish() -> int:
        log.append("finish")
        return 3

    pending = Pending([Work()], finish, wire_bytes=7).then(lambda x: x + 1)
    assert log == []
    assert pending.wire_bytes == 7
    assert pending.wait() == 4
    assert log == ["wait", "finish"]


def test_tags_fit_gloo_and_differ() -> None:
    ops = ("scatter", "gather", "scatter B", "gather B")
    names = [f"layers.{layer}.{op}" for layer in range(100) for op in ops]
    tags = {tag_of(name) for name in names}
    assert len(tags) == len(names)
    assert all(0 <= tag < 2**31 for tag in tags)


def test_what_has_storage_is_not_sent_to_ranks_on_paper() -> None:
    """It would come back as it was, a wrong sum that nobody notices."""
    axis = axes_of(Mesh(node=2, ep=2), 0)["node"]
    with pytest.raises(RuntimeError, match="axis node has no process group"):
        all_reduce_sum(torch.ones(2), axis)
    with pytest.raises(RuntimeError, match="axis node has no process group"):
        all_gather(torch.ones(2), axis, 1)
    assert all_gather(torch.ones(2, 3, device="meta"), axis, 1).wait().shape == (4, 3)
