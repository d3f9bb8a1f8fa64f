"""How near a kernel must come to its slow twin, and the bookkeeping of comparing gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale_moe.kernels.attention import QueryBlock

Spans = tuple[tuple[int, int, int], ...]
"""(row, first, last + 1) of each document, covering all rows; empty: every row is one document."""

# Both sides work in float32 (6e-8 per operation) and sum at most a few hundred terms in another order: sqrt(300) x 6e-8
# is 1e-6, relative to the largest entry; twice that for chains of a few operations.
FP32 = 2e-6
# Row kernels compute in float32 and round once. Where the float32 values lie on either side of a rounding border they
# end one BF16 step apart: 2^-7 of the entry.
BF16 = 2.0**-7
NEAR = {torch.float32: FP32, torch.bfloat16: BF16}


def assert_near(value: Tensor, wanted: Tensor, tolerance: float, terms: float = 1e-6) -> None:
    """Same shape and dtype, and no entry further away than `tolerance` times the largest wanted entry.

    Args:
        terms: size of the terms that add up to an entry; where they may all cancel, rounding is relative to them.
    """
    assert value.shape == wanted.shape
    assert value.dtype == wanted.dtype
    if value.numel():
        error = float((value.double() - wanted.double()).abs().max())
        largest = float(wanted.double().abs().max())
        assert error <= tolerance * max(largest, terms), f"{error:.2e} of {largest:.2e}"


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Float32 copies that collect gradients: the twin differentiates without the rounding of BF16."""
    return [tensor.detach().float().requires_grad_() for tensor in tensors]


def gradients(outputs: Sequence[Tensor], slopes: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Torch autograd of the twin."""
    return torch.autograd.grad(list(outputs), list(inputs), [slope.float() for slope in slopes])


def documents(spans: Spans, rows: int, length: int) -> list[QueryBlock]:
    """The queries of whole sequences, document by document."""
    if not spans:
        return [QueryBlock(slice(0, rows), slice(0, length), slice(0, length))]
    return [QueryBlock(slice(row, row + 1), slice(first, last), slice(first, last)) for row, first, last in spans]
