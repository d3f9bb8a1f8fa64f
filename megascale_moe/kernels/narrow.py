"""Matrices in fewer bytes, each in one piece of memory that can be sent as it is.

BF16 is one rounding: |error| <= |x| / 256. FP8 here is E4M3, a sign, four bits of exponent and three of mantissa: 2^-9
to 448. A scale brings what shares it into that range. Who shares one (paper, section 4.3):

    rows       a row, which is a token: activations, whose tokens differ by orders of magnitude
    channels   a column within `GROUP` rows: their gradients, whose channels do
    tensor     everything; and none: scale 1 for all. What the paper rejects, here to be measured

Scales are powers of two, one byte each (E8M0, an exponent biased by 127): multiplying by one is exact, and what has a
floating point loses nothing by a scale that is up to twice too large but the smallest of its subnormals. A message is
its numbers row by row, then its scales: R w + R bytes of [R, w] by rows, R w + ceil(R / 128) w by channels.

|error| <= max(|x| / 16, scale / 1024), and scale <= max |x| / 224, the largest of those that share it (or 2^-126, if
that is more). What is not finite is not finite afterwards, nor is what shares its scale: the loss will tell.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from megascale_moe.kernels.blocks import CACHED_ELEMENTS

GROUP = 128
"""Rows that share the scale of a channel."""
BLOCK = 128
"""Elements of a vector that share a scale: it is written by rows of so many."""
LARGEST = 448.0
"""The largest number of E4M3."""
BIAS = 127


@dataclass(frozen=True)
class BFloat16:
    """Rounded to the nearest."""

    def size(self, rows: int, width: int) -> int:
        """Return the bytes of a message."""
        return 2 * rows * width

    def encode(self, x: Tensor) -> Tensor:
        """Encode x [R, w] of a floating type -> uint8 [size]."""
        return x.to(torch.bfloat16).contiguous().flatten().view(torch.uint8)

    def decode(self, message: Tensor, out: Tensor) -> Tensor:
        """Decode uint8 [size] into out [R, w] of a floating type, which is returned."""
        return out.copy_(message.view(torch.bfloat16).view(out.shape))


@dataclass(frozen=True)
class Float8:
    """FP8, and who shares a scale."""

    sharing: Literal["rows", "channels", "tensor", "none"]

    def size(self, rows: int, width: int) -> int:
        """Return the bytes of a message: its numbers, and one for each scale."""
        return rows * width + math.prod(self._scales(rows, width))

    def encode(self, x: Tensor) -> Tensor:
        """Encode x [R, w] of a floating type -> uint8 [size]."""
        message = torch.empty(self.size(*x.shape), dtype=torch.uint8, device=x.device)
        numbers, scales = self._split(message, *x.shape)
        if (kernels := self._kernels(x)) is not None:
            kernels.encode(x, numbers, scales, per_row=self.sharing == "rows")
            return message
        if self.sharing == "tensor" and x.numel():
            scales.copy_(_exponent(x.abs().amax()))
        for rows, sharing in self._blocks(x):
            block, scale = x[rows], scales[sharing]
            if self.sharing in ("rows", "channels"):
                scale.copy_(_exponent(block.abs().amax(1 if self.sharing == "rows" else 0, keepdim=True)))
            if self.sharing != "none":
                block = block * ((2 * BIAS - scale.int()) << 23).view(torch.float32)
            numbers[rows] = block.to(torch.float8_e4m3fn).view(torch.uint8)  # which takes all above 448 to 448
        return message

    def decode(self, message: Tensor, out: Tensor) -> Tensor:
        """Decode uint8 [size] into out [R, w] of a floating type, which is returned."""
        numbers, scales = self._split(message, *out.shape)
        if (kernels := self._kernels(out)) is not None:
            kernels.decode(numbers, scales, out, per_row=self.sharing == "rows")
            return out
        for rows, sharing in self._blocks(out):
            if self.sharing == "none":
                out[rows] = numbers[rows].view(torch.float8_e4m3fn)
            else:
                # Infinite for 255, and what it multiplies is then infinite or NaN.
                scale = (scales[sharing].int() << 23).view(torch.float32)
                torch.mul(_value(numbers[rows]), scale, out=out[rows])
        return out

    def _split(self, message: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Return numbers [R, w] and scales."""
        return message[: rows * width].view(rows, width), message[rows * width :].view(self._scales(rows, width))

    def _scales(self, rows: int, width: int) -> tuple[int, int]:
        """Return the shape of the scales, which multiplies with the rows that share them."""
        shapes = {"rows": (rows, 1), "channels": (-(-rows // GROUP), width), "tensor": (1, 1), "none": (0, 1)}
        return shapes[self.sharing]

    def _kernels(self, x: Tensor) -> Any:
        """Return the Triton kernels, where there are any for this."""
        fits = x.is_cuda and self.sharing in ("rows", "channels") and x.stride(-1) == 1
        return _triton() if fits else None

    def _blocks(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield rows that are worked on at once, because they share scales or fit into a cache, and their scales."""
        rows, width = x.shape
        step = GROUP if self.sharing == "channels" else max(CACHED_ELEMENTS // max(width, 1), 1) if x.is_cpu else rows
        for start in range(0, rows if width else 0, max(step, 1)):
            block = slice(start, start + step)
            sharing = {"rows": block, "channels": slice(start // GROUP, start // GROUP + 1)}
            yield block, sharing.get(self.sharing, slice(None))


Format = BFloat16 | Float8
"""A way to write a matrix."""


@cache
def _triton() -> Any:
    """Return the kernels of one pass over memory; Triton comes with torch on a GPU and is not needed elsewhere."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("megascale_moe.kernels.narrow_triton")


def _exponent(largest: Tensor) -> Tensor:
    """Return the byte of the scale for numbers up to `largest`.

    It is the power of two above largest / 448, or 255 if that is not finite.
    """
    exponent = ((largest.float() / LARGEST).view(torch.int32) >> 23).bitwise_and_(255)  # a NaN may have a sign
    return exponent.add_(1).clamp_(max=255).to(torch.uint8)


def _value(bits: Tensor) -> Tensor:
    """Return E4M3 as float32, on a CPU faster than torch's cast: float16 with one bit more of exponent, times 2^8.

    Of E4M3's two NaNs it makes 480: here they are multiplied with the infinite scale of what was not finite.
    """
    wide = bits.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return wide.view(torch.float16).float().mul_(256.0)
