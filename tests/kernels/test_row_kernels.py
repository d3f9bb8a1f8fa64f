"""Norms, SwiGLU and the rotary split against their slow twins, both ways; blocked and fused against plain.

Fused kernels are covered by pairs: each is compiled in one of the dtypes. tests/gpu has all of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from megascale_moe.engine.memory import Meter
from megascale_moe.kernels import blocks, reference
from megascale_moe.kernels.activation import _backward, swiglu, swiglu_backward
from megascale_moe.kernels.blocks import Fusion, Rowwise
from megascale_moe.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward
from megascale_moe.kernels.rotary import split_heads, split_heads_backward
from tests.kernels.compare import FP32, NEAR, assert_near, gradients, leaves

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 3, 300]
SHAPES = [(0, 8), (1, 1), (1, 24), (5, 7), (300, 33)]
EPS = 1e-5

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a row or a few, so that 300 rows take many."""
    monkeypatch.setattr(blocks, "CACHED_ELEMENTS", 64)


@pytest.fixture
def fused() -> Iterator[None]:
    """torch.compile for this test only."""
    before, Fusion.enabled = Fusion.enabled, True
    yield
    Fusion.enabled = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    for value, wanted in zip(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), strict=True):
        assert_near(value, wanted, NEAR[value.dtype])


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_backward_equals_autograd_of_the_twin(
    shape: tuple[int, int], dtype: torch.dtype, with_skip: bool
) -> None:
    x, weight, slope = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape).to(dtype)
    skip = torch.randn(shape).to(dtype) if with_skip else None
    dx, dweight = rms_norm_backward(slope, x, weight, rms_norm(x, weight, EPS)[1], skip)
    inputs = leaves(x, weight)
    wanted_x, wanted_weight = gradients([reference.rms_norm(inputs[0], inputs[1], EPS)[0]], [slope], inputs)
    # Slopes and normed rows are of size one; in a row of one column their products cancel to nothing.
    assert_near(dx, (wanted_x if skip is None else wanted_x + skip.float()).to(dtype), NEAR[dtype], terms=1.0)
    assert_near(dweight, wanted_weight, FP32, terms=1.0)  # stays float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    total, normed, scale = add_rms_norm(a, b, weight, EPS)
    wanted_total, wanted_normed, wanted_scale = reference.add_rms_norm(a, b, weight, EPS)
    assert torch.equal(total, wanted_total)  # one addition on both sides
    assert_near(normed, wanted_normed, NEAR[dtype])
    assert_near(scale, wanted_scale, FP32)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 32])
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu_equals_its_twin(rows: int, width: int, dtype: torch.dtype, gated: bool) -> None:
    x, slope = 3 * torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    gate = torch.rand(rows) if gated else None
    assert_near(swiglu(x, gate), reference.swiglu(x, gate), NEAR[dtype])
    dx, dgate = swiglu_backward(slope, x, gate)
    inputs = leaves(x) if gate is None else leaves(x, gate)
    wanted = gradients([reference.swiglu(*inputs)], [slope], inputs)
    assert_near(dx, wanted[0].to(dtype), NEAR[dtype])
    if gate is None:
        assert dgate is None
    else:
        assert dgate is not None
        assert_near(dgate, wanted[1], FP32)  # float32 whatever the dtype of x


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (7, 12), (300, 33)])
def test_clamped_swiglu_equals_its_twin(rows: int, width: int, dtype: torch.dtype, gated: bool) -> None:
    x, slope = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    gate = torch.rand(rows) if gated else None
    clamp = 1.702, 0.75  # a quarter of the gates and half of the others are clamped
    out = swiglu(x, gate, clamp)
    assert_near(out, reference.swiglu(x, gate, clamp), NEAR[dtype])
    dx, dgate = swiglu_backward(slope, x, gate, clamp)
    inputs = leaves(x) if gate is None else leaves(x, gate)
    wanted = gradients([reference.swiglu(inputs[0], *(inputs[1:] or [None]), clamp)], [slope], inputs)
    assert_near(dx, wanted[0].to(dtype), NEAR[dtype])
    assert (dgate is None) is (gate is None)
    if dgate is not None:
        # A sum over the width of products that were not rounded to the dtype on either side.
        assert_near(dgate, wanted[1], 2 * FP32, terms=1.0)


def test_swiglu_of_far_values_is_finite() -> None:
    """exp(100) overflows in float32: a sigmoid written with it would give NaN."""
    x = torch.tensor([[100.0, -100.0, 2.0, 2.0]])
    assert swiglu(x).tolist()[0] == pytest.approx([200.0, 0.0])  # silu(100) = 100, silu(-100) = -4e-42
    dx, _ = swiglu_backward(torch.ones(1, 2), x)
    assert torch.isfinite(dx).all()
    assert dx[0, 0] == 2.0


HEADS = [(4, 2, 8), (3, 3, 2), (6, 1, 10)]


def table(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles."""
    angles = 10 * torch.rand(rows, width // 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_width", [3, 8])
@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_split_heads_equals_its_twin(
    rows: int, sizes: tuple[int, int, int], value_width: int, dtype: torch.dtype, interleaved: bool
) -> None:
    heads, keys, width = sizes
    qkv = torch.randn(rows, (heads + keys) * width + keys * value_width).to(dtype)
    rope = table(rows, width)
    parts = split_heads(qkv, rope, sizes, interleaved)
    for value, wanted in zip(parts, reference.split_heads(qkv, rope, sizes, interleaved), strict=True):
        assert_near(value, wanted, NEAR[dtype])
    slopes = [torch.randn(part.shape).to(dtype) for part in parts]
    inputs = leaves(qkv)
    (wanted,) = gradients(reference.split_heads(inputs[0], rope, sizes, interleaved), slopes, inputs)
    assert_near(split_heads_backward(slopes[0], slopes[1], slopes[2], rope, interleaved), wanted.to(dtype), NEAR[dtype])


def test_rotation_keeps_lengths_and_position_zero() -> None:
    qkv = torch.randn(2, 3 * 8)
    rope = (torch.tensor([[1.0] * 4, [0.6] * 4]), torch.tensor([[0.0] * 4, [0.8] * 4]))
    q, _, v = split_heads(qkv, rope, (1, 1, 8), False)
    assert torch.equal(q[0, 0], qkv[0, :8])
    assert torch.equal(v[:, 0], qkv[:, 16:])
    assert float(q[1].norm()) == pytest.approx(float(qkv[1, :8].norm()), rel=1e-6)  # 0.6, 0.8: a rotation


# --- blocked and fused -----------------------------------------------------------------------------------------------


KERNELS = ("swiglu", "swiglu_backward", "rms_norm", "rms_norm_backward")


def outputs(dtype: torch.dtype, kernels: Sequence[str] = KERNELS) -> dict[str, Tensor]:
    """All outputs of some kernels on the same 300 random rows."""
    torch.manual_seed(1)
    x, slope, gate = torch.randn(300, 34).to(dtype), torch.randn(300, 34).to(dtype), torch.rand(300)
    weight, half = torch.randn(34).to(dtype), slope[:, :17].contiguous()
    scale = reference.rms_norm(x, weight, EPS)[1]
    runs: dict[str, Callable[[], Sequence[Tensor | None]]] = {
        "swiglu": lambda: (swiglu(x, gate),),
        "swiglu_backward": lambda: swiglu_backward(half, x, gate),
        "rms_norm": lambda: rms_norm(x, weight, EPS),
        "rms_norm_backward": lambda: rms_norm_backward(slope, x, weight, scale, slope),
    }
    found = {f"{kernel} {place}": value for kernel in kernels for place, value in enumerate(runs[kernel]())}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocked_equals_unblocked(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    whole = outputs(dtype)
    request.getfixturevalue("small_blocks")
    blocked = outputs(dtype)
    assert len(blocked) == 7
    for name, value in blocked.items():
        if name == "rms_norm_backward 1":
            assert_near(value, whole[name], FP32)  # summed over blocks instead of rows
        else:
            assert torch.equal(value, whole[name]), name  # the same operations on each row


# Compiling takes more than a second: each kernel in one of the dtypes, both of which have a forward and a backward.
@pytest.mark.bulky
@needs_compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [(torch.float32, ("swiglu", "rms_norm_backward")), (torch.bfloat16, ("swiglu_backward", "rms_norm"))],
)
def test_fused_equals_blocked(dtype: torch.dtype, kernels: tuple[str, ...], fused: None) -> None:
    compiled = outputs(dtype, kernels)
    Fusion.enabled = False
    blocked = outputs(dtype, kernels)
    for name, value in compiled.items():
        assert_near(value, blocked[name], NEAR[value.dtype])


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1])
def test_switch_does_not_touch_what_is_too_short_to_fuse(rows: int, fused: None) -> None:
    x = torch.randn(rows, 6)
    assert_near(swiglu(x), reference.swiglu(x), FP32)


def test_blocks_cover_all_rows_once_and_add_the_sums(small_blocks: None) -> None:
    seen: list[int] = []

    def formula(x: Tensor, factor: float) -> tuple[Tensor, ...]:
        seen.append(len(x))
        return x * factor, x.sum(0)

    x = torch.arange(300.0)[:, None].expand(300, 20)  # 64 // 20 = 3 rows a block
    doubled, total = Rowwise(formula, shared=1, sums=1)(x, 2.0)
    assert seen == [3] * 100
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(total, x.sum(0))  # whole numbers below 2^24: exact


@pytest.mark.bulky
def test_a_width_has_one_fused_kernel_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs; here the kernel is the formula itself, counted."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda formula, **options: compiled(formula, backend=counter, **options))
    kernel = Rowwise(_backward, shared=1)
    for kernels, width in ((1, 16), (2, 8), (3, 12)):
        for rows in (7, 9, 300):
            x, gradient, gate = torch.randn(rows, 2 * width), torch.randn(rows, width), torch.rand(rows)
            found, wanted = kernel.fused_by_width(gradient, x, gate, None), _backward(gradient, x, gate, None)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
            assert counter.frame_count == kernels


@pytest.mark.bulky
def test_counting_memory_leaves_formulas_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler skips for good what it meets under a mode; the planner counts memory in a process that trains."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda formula, **options: compiled(formula, backend=counter, **options))
    monkeypatch.setattr(Fusion, "enabled", True)

    def formula(x: Tensor) -> tuple[Tensor]:
        return (x.exp() * 2,)

    kernel, x = Rowwise(formula), torch.randn(8, 4)
    with Meter():
        assert kernel(x.to("meta"))[0].shape == (8, 4)
    assert counter.frame_count == 0
    assert torch.equal(kernel(x)[0], x.exp() * 2)
    assert counter.frame_count == 1
