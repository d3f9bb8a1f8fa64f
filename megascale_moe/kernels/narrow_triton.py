"""FP8 messages on a GPU: reading, scaling and writing in one pass over memory; Triton, so optional.

The bytes are those of `narrow.Float8`, its slow twin. Rounding is done on the bits of float32 and not by the cast of
the hardware: it is the same on every GPU (Ampere has no E4M3) and under Triton's interpreter, whose cast loses
subnormals.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

GROUP = 128
COLUMNS = 64
"""Columns of a tile of channels."""


@triton.jit
def _exponent(largest):
    """Return the byte of the scale for numbers up to `largest`, int32: the power of two above largest / 448, or 255."""
    bits = (largest / 448.0).to(tl.int32, bitcast=True)
    return tl.minimum(((bits >> 23) & 255) + 1, 255)


@triton.jit
def _rounded(x, exponent):
    """Round x / 2^(exponent - 127) to the nearest E4M3, ties to even, as int32 from 0 to 255."""
    y = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9, which is what float32 has above 2^14: the sum rounds.
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < (121 << 23), small, normal)
    return tl.minimum(code, 127) | ((bits >> 24) & 0x80)


@triton.jit
def _value(code, exponent):
    """Return E4M3 times its scale, float32: float16 has one bit more of exponent, a factor of 2^8."""
    half = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0 * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(values, axis: tl.constexpr):
    """Return the largest magnitude; what is not a number counts as infinite, which a maximum could lose."""
    size = tl.abs(values)
    return tl.max(tl.where(size == size, size, float("inf")), axis)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's rows, its columns, which elements of them exist, and its group of rows."""
    group = tl.program_id(0).to(tl.int64)
    row = group * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < width), group


@triton.jit
def _encode(
    x, numbers, scales, rows, width, stride, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, there, group = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
    if PER_ROW:  # all columns are in the tile
        exponent = _exponent(_largest(values, 1))[:, None]
        tl.store(scales + row, exponent.to(tl.uint8), mask=row < rows)
    else:
        exponent = _exponent(_largest(values, 0))[None, :]
        tl.store(scales + group * width + column, exponent.to(tl.uint8), mask=column < width)
    tl.store(numbers + row * width + column, _rounded(values, exponent).to(tl.uint8), mask=there)


@triton.jit
def _decode(
    numbers, scales, out, rows, width, stride, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, there, group = _tile(rows, width, ROWS, COLUMNS)
    code = tl.load(numbers + row * width + column, mask=there, other=0).to(tl.int32)
    if PER_ROW:
        exponent = tl.load(scales + row, mask=row < rows, other=127).to(tl.int32)
    else:
        exponent = tl.load(scales + group * width + column, mask=column < width, other=127).to(tl.int32)
    tl.store(out + row * stride + column, _value(code, exponent).to(out.dtype.element_ty), mask=there)


def encode(x: Tensor, numbers: Tensor, scales: Tensor, *, per_row: bool) -> None:
    """Encode x [R, w], rows of unit stride, into numbers uint8 [R, w] and scales uint8 [R] or [ceil(R / 128), w]."""
    rows, width = x.shape
    if x.numel():
        tile = (1, triton.next_power_of_2(width)) if per_row else (GROUP, COLUMNS)
        _encode[_grid(x, *tile)](x, numbers, scales, rows, width, x.stride(0), per_row, *tile)


def decode(numbers: Tensor, scales: Tensor, out: Tensor, *, per_row: bool) -> None:
    """Fill out [R, w], rows of unit stride; the inverse of `encode`."""
    rows, width = out.shape
    if out.numel():
        _decode[_grid(out, GROUP, COLUMNS)](numbers, scales, out, rows, width, out.stride(0), per_row, GROUP, COLUMNS)


def _grid(x: Tensor, rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], columns)
