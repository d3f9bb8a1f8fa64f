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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

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
Sharing = Literal["rows", "channels", "tensor", "none"]


class Format(Protocol):
    """A way to write a matrix."""

    def size(self, rows: int, width: int) -> int:
        """Bytes of a message."""

    def encode(self, x: Tensor) -> Tensor:
        """x [R, w] of a floating type -> uint8 [size]."""

    def decode(self, message: Tensor, out: Tensor) -> Tensor:
        """uint8 [size] -> out [R, w] of a floating type, which is filled and returned."""


@dataclass(frozen=True)
class BFloat16:
    """Rounded to the nearest."""

    def size(self, rows: int, width: int) -> int:
        """Bytes of a message."""
        return 2 * rows * width

    def encode(self, x: Tensor) -> Tensor:
        """x [R, w] of a floating type -> uint8 [size]."""
        return x.to(torch.bfloat16).contiguous().flatten().view(torch.uint8)

    def decode(self, message: Tensor, out: Tensor) -> Tensor:
        """uint8 [size] -> out [R, w] of a floating type, which is filled and returned."""
        return out.copy_(message.view(torch.bfloat16).view(out.shape))


@dataclass(frozen=True)
class Float8:
    """A form of FP8: who shares a scale."""

    sharing: Sharing

    def scales(self, rows: int, width: int) -> int:
        """How many scales, and bytes of them, a matrix [rows, width] has."""
        groups = -(-rows // GROUP)
        return {"rows": rows, "channels": groups * width, "tensor": 1, "none": 0}[self.sharing]

    def size(self, rows: int, width: int) -> int:
        """Bytes of a message."""
        return rows * width + self.scales(rows, width)

    def encode(self, x: Tensor) -> Tensor:
        """x [R, w] of a floating type -> uint8 [size]."""
        message = torch.empty(self.size(*x.shape), dtype=torch.uint8, device=x.device)
        numbers, scales = self._parts(message, *x.shape)
        if (kernels := self._kernels(x)) is not None:
            encode = kernels.encode_rows if self.sharing == "rows" else kernels.encode_channels
            encode(x, numbers, scales)
            return message
        if self.sharing == "tensor" and x.numel():
            scales.copy_(_exponent(x.abs().amax()))
        for rows, shared in self._blocks(x):
            part, scale = x[rows], scales[shared]
            if self.sharing in ("rows", "channels"):
                scale.copy_(_exponent(part.abs().amax(1 if self.sharing == "rows" else 0, keepdim=True)))
            numbers[rows] = _rounded(part, scale)
        return message

    def decode(self, message: Tensor, out: Tensor) -> Tensor:
        """uint8 [size] -> out [R, w] of a floating type, which is filled and returned."""
        numbers, scales = self._parts(message, *out.shape)
        if (kernels := self._kernels(out)) is not None:
            kernels.decode(numbers, scales, out, per_row=self.sharing == "rows")
            return out
        for rows, shared in self._blocks(out):
            part = numbers[rows]
            if self.sharing == "none":
                out[rows] = part.view(torch.float8_e4m3fn)
            else:
                torch.mul(_value(part), _power(scales[shared]), out=out[rows])
        return out

    def _parts(self, message: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Numbers [R, w] and scales, in a shape that multiplies with them."""
        numbers, scales = message[: rows * width].view(rows, width), message[rows * width :]
        if self.sharing == "none":
            scales = message.new_full((1,), BIAS)
        shapes = {"rows": (rows, 1), "channels": (-(-rows // GROUP), width)}
        return numbers, scales.view(shapes.get(self.sharing, (1, 1)))

    def _kernels(self, x: Tensor) -> Any:
        """The Triton kernels, where there are any for this."""
        fits = x.is_cuda and self.sharing in ("rows", "channels") and x.stride(-1) == 1
        return _triton() if fits else None

    def _blocks(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows that are worked on at once, because they share scales or fit into a cache, and their scales."""
        rows, width = x.shape
        step = GROUP if self.sharing == "channels" else max(CACHED_ELEMENTS // max(width, 1), 1) if x.is_cpu else rows
        for start in range(0, rows if width else 0, max(step, 1)):
            block = slice(start, start + step)
            shared = {"rows": block, "channels": slice(start // GROUP, start // GROUP + 1)}
            yield block, shared.get(self.sharing, slice(None))


@cache
def _triton() -> Any:
    """One pass over memory on a GPU; Triton comes with torch there, and is not needed elsewhere."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("megascale_moe.kernels.narrow_triton")


def error_bound(x: Tensor, largest: Tensor) -> Tensor:
    """The largest error of FP8 for each element of x, `largest` being the largest magnitude that shares its scale."""
    scale = (largest.float() / (LARGEST / 2)).clamp(min=2.0**-126)
    return torch.maximum(x.abs().float() / 16, scale / 1024)


def _exponent(largest: Tensor) -> Tensor:
    """The scale's byte for numbers up to `largest`: the power of two above largest / 448; 255 if that is not finite."""
    exponent = ((largest.float() / LARGEST).view(torch.int32) >> 23).bitwise_and_(255)  # a NaN may have a sign
    return exponent.add_(1).clamp_(max=255).to(torch.uint8)


def _power(scale: Tensor) -> Tensor:
    """2^(byte - 127) float32; infinite for 255, and what it multiplies is then infinite or NaN."""
    return (scale.int() << 23).view(torch.float32)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale to the nearest E4M3, as uint8; torch's cast takes everything above 448 to 448."""
    inverse = ((2 * BIAS - scale.int()) << 23).view(torch.float32)
    return (x * inverse).to(torch.float8_e4m3fn).view(torch.uint8)


def _value(bits: Tensor) -> Tensor:
    """E4M3 as float32, on a CPU faster than torch's cast: float16 with one bit more of exponent, times 2^8.

    Of E4M3's two NaNs it makes 480: here they are multiplied with the infinite scale of what was not finite.
    """
    wide = bits.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return wide.view(torch.float16).float().mul_(256.0)
