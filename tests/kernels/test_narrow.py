"""Narrow formats against a search for the nearest number, their bounds, and what is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megascale_moe.kernels import reference
from megascale_moe.kernels.narrow import BLOCK, GROUP, BFloat16, Float8, Format

ROWS, WIDTH = 300, 96  # two whole groups of rows and a part of one


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Cauchy: quotients of normal numbers."""
    normal = torch.randn(2, ROWS, WIDTH, generator=generator)
    return normal[0] / normal[1].abs().clamp(min=1e-6)


def outliers(generator: torch.Generator) -> Tensor:
    """As behind SwiGLU: most are near zero, a few channels and tokens a thousand times larger."""
    x = torch.randn(ROWS, WIDTH, generator=generator).pow(3)
    x[:, ::31] *= 1000
    x[::50] *= 1000
    return x


INPUTS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda generator: torch.randn(ROWS, WIDTH, generator=generator),
    "heavy-tailed": heavy_tailed,
    "outliers": outliers,
    "large": lambda generator: torch.randn(ROWS, WIDTH, generator=generator) * 1e37,
    "small": lambda generator: torch.randn(ROWS, WIDTH, generator=generator) * 1e-36,
    "subnormal": lambda generator: torch.randn(ROWS, WIDTH, generator=generator) * 1e-40,
    "zeros": lambda generator: torch.zeros(ROWS, WIDTH),
    "one token": lambda generator: torch.randn(1, WIDTH, generator=generator),
    "one channel": lambda generator: torch.randn(ROWS, 1, generator=generator),
}
SHARING = ("rows", "channels", "tensor")


def input_of(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return INPUTS[name](torch.Generator().manual_seed(1)).to(dtype)


def largest(x: Tensor, sharing: str) -> Tensor:
    """For each element, the largest magnitude of those that share its scale."""
    magnitude = x.abs().float()
    if sharing == "rows":
        return magnitude.amax(1, keepdim=True).expand_as(x)
    if sharing == "channels":
        return torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in magnitude.split(GROUP)])
    return magnitude.amax().expand_as(x)


def error_bound(x: Tensor, largest: Tensor) -> Tensor:
    """The largest error of FP8 for each element of x, `largest` being the largest magnitude that shares its scale."""
    scale = (largest.float() / (448 / 2)).clamp(min=2.0**-126)
    return torch.maximum(x.abs().float() / 16, scale / 1024)


def back(form: Format, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    message = form.encode(x)
    assert message.dtype == torch.uint8
    assert message.shape == (form.size(*x.shape),)
    return form.decode(message, torch.empty(x.shape, dtype=dtype or x.dtype))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", INPUTS)
def test_the_nearest_number_is_taken(name: str, sharing: str) -> None:
    """Also of ties, which a cube of few values has many of; only below 2^-9 of a scale of 2^-126 is nothing left."""
    x = input_of(name)
    wanted = reference.float8(x, largest(x, sharing)).float()
    assert torch.equal(back(Float8(sharing), x), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", INPUTS)
def test_errors_are_within_their_bound(name: str, sharing: str, dtype: torch.dtype) -> None:
    x = input_of(name, dtype)
    error = (back(Float8(sharing), x, torch.float32) - x.float()).abs()  # type: ignore[arg-type]
    assert (error <= error_bound(x, largest(x, sharing))).all()


def test_what_scales_are_for() -> None:
    """Relative error of tensors: a scale for all loses what one outlier dwarfs, no scale all that is small."""
    x = input_of("outliers")
    small = x.abs() < x.abs().median()
    errors = {}
    for sharing in (*SHARING, "none"):
        error = back(Float8(sharing), x) - x  # type: ignore[arg-type]
        errors[sharing] = float(error[small].norm() / x[small].norm())
    assert errors["rows"] < 0.2
    assert errors["channels"] < 0.2
    assert errors["tensor"] > 0.9
    tiny = input_of("small")
    assert not back(Float8("none"), tiny).any()
    error = back(Float8("rows"), tiny).double() - tiny.double()
    assert float(error.norm() / tiny.double().norm()) < 0.04


@pytest.mark.parametrize("name", INPUTS)
def test_bf16_is_one_rounding(name: str) -> None:
    x = input_of(name)
    assert torch.equal(back(BFloat16(), x), x.bfloat16().float())
    assert torch.equal(back(BFloat16(), x.bfloat16()), x.bfloat16())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("sharing", SHARING)
def test_what_is_not_finite_is_not_hidden(sharing: str, bad: float) -> None:
    """It and all that shares its scale come back as infinite or NaN; the rest is as it was."""
    x = input_of("normal")
    x[5, 7] = bad
    found = back(Float8(sharing), x)  # type: ignore[arg-type]
    spoiled = ~largest(x.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf), sharing).isfinite()
    assert spoiled[5, 7]
    assert not found[spoiled].isfinite().any()
    assert found[~spoiled].isfinite().all()
    assert not back(BFloat16(), x)[5, 7].isfinite()


def test_sizes() -> None:
    """Payload plus scales: a byte a token, a byte a channel and group of tokens, two bytes a number."""
    assert Float8("rows").size(300, 96) == 300 * 96 + 300
    assert Float8("channels").size(300, 96) == 300 * 96 + 3 * 96
    assert Float8("rows").size(1, BLOCK) == BLOCK + 1
    assert BFloat16().size(300, 96) == 2 * 300 * 96


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("sharing", [*SHARING, "none"])
def test_empty_messages(sharing: str, shape: tuple[int, int]) -> None:
    assert back(Float8(sharing), torch.empty(shape)).shape == shape  # type: ignore[arg-type]


@pytest.mark.bulky  # what torch does on its meta device imports its compiler
def test_no_storage_is_needed() -> None:
    """A dry run encodes and decodes as well."""
    x = torch.empty(300, 96, device="meta")
    form = Float8("channels")
    assert form.decode(form.encode(x), torch.empty_like(x)).shape == x.shape
