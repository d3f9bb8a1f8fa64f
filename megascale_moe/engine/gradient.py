"""Where weight gradients go: a buffer per weight that W operators add to, without a copy between."""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.kernels.grouped import Groups, grouped_outer


class Gradient:
    """The gradient of one weight, summed over micro-batches in the buffer's dtype (float32 in training).

    The first addition after `reset` overwrites, so buffers are never cleared.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.fresh = True

    def reset(self) -> None:
        """Forget what was summed."""
        self.fresh = True

    def value(self) -> Tensor:
        """Return the sum so far, zero if nothing was added."""
        if self.fresh:
            self.buffer.zero_()
            self.fresh = False
        return self.buffer

    def add(self, value: Tensor) -> None:
        """Add a tensor of the weight's shape."""
        self._add(self.buffer, value)
        self.fresh = False

    def add_mm(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b, inside the matrix product itself where the dtypes agree."""
        self._add_mm(self.buffer, a, b)
        self.fresh = False

    def add_mm_at(self, part: tuple[slice, ...], a: Tensor, b: Tensor) -> None:
        """Add a @ b to a part of the buffer, as `buffer[part]` says; parts together need not be everything."""
        total = self.value()[part]
        if total.dtype == a.dtype:
            total.addmm_(a, b)
        else:
            total += a @ b

    def add_grouped_mm(self, a: Tensor, b: Tensor, groups: Groups) -> None:
        """Add, for each group g of consecutive rows, a[rows of g].T @ b[rows of g] to buffer[g].

        a [R, N], b [R, D], buffer [groups, N, D]; groups without rows get zero.
        """
        products = grouped_outer(a, b, groups)
        if products is not None:
            self.add(products)
            return
        start = 0
        for part, count in zip(self.buffer.unbind(), groups.counts, strict=True):
            if count:
                self._add_mm(part, a[start : start + count].t(), b[start : start + count])
            elif self.fresh:
                part.zero_()
            start += count
        self.fresh = False

    def _add(self, out: Tensor, value: Tensor) -> None:
        if self.fresh:
            out.copy_(value)
        else:
            out.add_(value)

    def _add_mm(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if out.dtype != a.dtype:
            self._add(out, a @ b)
        elif self.fresh:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
