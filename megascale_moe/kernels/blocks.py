"""How a chain of elementwise operations on rows is run without a pass over memory for each.

A kernel such as SwiGLU's backward is written once, as a formula on rows. SwiGLU's takes ten passes over tensors of
many megabytes when run as it stands. Two ways out, the same formula in both:

    fused       torch.compile makes one loop of it (one Triton kernel on a GPU); costs seconds at the start of a run
    blocked     a few hundred rows at a time on a CPU: the temporaries stay in the L2 cache, only the ends of the
                chain touch memory; costs nothing

A fused kernel serves any number of rows. On a GPU each width has one of its own, two to four times as fast as one for
all widths, which divides by sizes it does not know for every element (H100, BF16, 8,192 tokens: rotary embedding
backward 98 us for 354, SwiGLU backward 156 for 355). On a CPU it gains little, and compiling takes longer there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CACHED_ELEMENTS = 1 << 17  # elements of one temporary: half a megabyte in float32
WIDTHS = 64  # kernels of a formula before torch gives up compiling it


class Fusion:
    """The switch between the two ways, for the whole process."""

    enabled = False


class Rowwise:
    """A formula over rows; calling it runs it fused or blocked.

    The formula takes tensors of equal first dimension R (or None), and returns a tuple of tensors [R, ...], followed
    by `sums` tensors that are summed over the blocks.

    Args:
        shared: how many of the last arguments are the same for every row (weights, constants).
    """

    def __init__(self, formula: Callable[..., tuple[Tensor, ...]], shared: int = 0, sums: int = 0) -> None:
        self.formula, self.shared, self.sums = formula, shared, sums

    @cached_property
    def fused(self) -> Callable[..., tuple[Tensor, ...]]:
        """Return the formula compiled, made when first asked for: torch.compile takes 2.7 s to import."""
        return torch.compile(self.formula, dynamic=True)

    @cached_property
    def fused_by_width(self) -> Callable[..., tuple[Tensor, ...]]:
        """Return the formula compiled for the widths that it meets, each with any number of rows."""
        from torch import _dynamo as dynamo

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, WIDTHS)
        compiled = torch.compile(self.formula, dynamic=False)

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            for x in arguments[: len(arguments) - self.shared]:
                if x is not None:
                    dynamo.maybe_mark_dynamic(x, 0)
            return compiled(*arguments)

        return run

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        x = arguments[0]
        rows, width = x.shape[0], max(x.shape[1:].numel(), 1)
        # Never without storage: the compiler gives up on a formula for good if a mode that counts memory is active.
        if Fusion.enabled and rows > 1 and not x.is_meta:
            return self.fused(*arguments) if x.device.type == "cpu" else self.fused_by_width(*arguments)
        step = max(CACHED_ELEMENTS // width, 1)
        if x.device.type != "cpu" or rows <= step:
            return self.formula(*arguments)
        return self._blocked(arguments, rows, step)

    def _blocked(self, arguments: tuple[Any, ...], rows: int, step: int) -> tuple[Tensor, ...]:
        split = len(arguments) - self.shared
        out: list[Tensor] = []
        for start in range(0, rows, step):
            block = slice(start, start + step)
            results = self.formula(*(a if a is None else a[block] for a in arguments[:split]), *arguments[split:])
            by_row = len(results) - self.sums
            if not out:
                out = [r.new_empty(rows, *r.shape[1:]) for r in results[:by_row]]
                out += [torch.zeros_like(r) for r in results[by_row:]]
            for index, result in enumerate(results):
                if index < by_row:
                    out[index][block] = result
                else:
                    out[index] += result
        return tuple(out)
