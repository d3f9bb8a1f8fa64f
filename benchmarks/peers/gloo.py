"""gloo's own collectives in place of our point-to-point exchange, to tell what our transport alone is worth.

They are what every peer uses. Put in from outside: the library has no such setting.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm import collectives
from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending


def exchange(send: Sequence[Tensor], receive: Sequence[Tensor], axis: Axis, tag: int) -> Pending:
    """One all_to_all_single; from and to one buffer, as it wants them."""
    packed = torch.cat([part.flatten() for part in send])
    sizes = [part.numel() for part in receive]
    out = packed.new_empty(sum(sizes))
    work = dist.all_to_all_single(out, packed, sizes, [part.numel() for part in send], axis.group, async_op=True)

    def finish() -> Sequence[Tensor]:
        for part, got in zip(receive, out.split(sizes), strict=True):
            part.copy_(got.view_as(part))
        return receive

    return Pending([work], finish, packed.nbytes - send[axis.index].nbytes, keep=packed)


def all_gather(x: Tensor, axis: Axis, tag: int) -> Pending:
    x = x.contiguous()
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    work = dist.all_gather_single(out, x, axis.group, async_op=True)
    return Pending([work], lambda: out, x.nbytes * (axis.size - 1), keep=x)


def all_gather_in_place(buffer: Tensor, axis: Axis, tag: int) -> Pending:
    mine = buffer.chunk(axis.size)[axis.index].clone()
    work = dist.all_gather_single(buffer, mine, axis.group, async_op=True)
    return Pending([work], lambda: buffer, mine.nbytes * (axis.size - 1), keep=mine)


def reduce_scatter(x: Tensor, axis: Axis, tag: int) -> Pending:
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    work = dist.reduce_scatter_single(out, x, group=axis.group, async_op=True)
    return Pending([work], lambda: out, x.nbytes // axis.size * (axis.size - 1), keep=x)


REPLACED: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (exchange, all_gather, all_gather_in_place, reduce_scatter)
}


def use_gloo_collectives() -> None:
    """Replace ours in every module that has them by name."""
    for name, new in REPLACED.items():
        old = getattr(collectives, name)
        for place in [module for key, module in sys.modules.items() if key.startswith("megascale_moe.")]:
            if getattr(place, name, None) is old:
                setattr(place, name, new)
