"""A world of one GPU over NCCL: the native paths of the collectives run, and deliver to themselves.

An axis of one rank is not native, it has nothing to send; here it is told to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import all_gather, all_reduce_sum, exchange, reduce_scatter, tag_of
from tests.comm.test_collectives import all_to_all

DEVICE = torch.device("cuda")


@pytest.fixture(params=["nccl", "cpu:gloo,cuda:nccl"])
def axis(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Axis]:
    """The world as an axis; the second form is how training joins it."""
    torch.cuda.set_device(0)
    dist.init_process_group(request.param, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    assert Axis("world", 2, backend=request.param).native
    monkeypatch.setattr(Axis, "native", True)
    yield Axis("world", 1, 0, dist.new_group([0]), backend=request.param)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_collectives_deliver(axis: Axis, dtype: torch.dtype) -> None:
    x = torch.arange(12, device=DEVICE).view(4, 3).to(dtype)
    gathered, reduced = all_gather(x, axis, tag_of("a")), reduce_scatter(x, axis, tag_of("b"))
    for pending in (gathered, reduced, all_to_all(x, [4], [4], axis, tag_of("c"))):
        assert torch.equal(pending.wait(), x)
        assert pending.wire_bytes == 0
    (received,) = exchange([x], [torch.empty_like(x)], axis, tag_of("d")).wait()
    assert torch.equal(received, x)
    assert all_to_all(x[:0], [0], [0], axis, tag_of("e")).wait().shape == (0, 3)


def test_sum_of_a_lone_rank_is_itself(axis: Axis) -> None:
    assert all_reduce_sum(torch.ones(2, device=DEVICE), axis).tolist() == [1.0, 1.0]


def test_two_collectives_under_way_and_a_kernel_after_each(axis: Axis) -> None:
    """`wait` orders later kernels after the transfer without stopping the host; results must still be complete."""
    x = torch.randn(1 << 20, device=DEVICE)
    first, second = all_gather(x, axis, tag_of("first")), all_gather(2 * x, axis, tag_of("second"))
    assert torch.equal(second.wait() - x, first.wait())
