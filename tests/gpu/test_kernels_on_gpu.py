"""Kernels on a GPU against their slow twins: torch's BF16 grouped product, SDPA's backward, fused Triton loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.engine.gradient import Gradient
from megascale_moe.kernels import reference
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.attention import attention_backward, attention_forward
from megascale_moe.kernels.blocks import Fusion
from megascale_moe.kernels.cross_entropy import linear_cross_entropy
from megascale_moe.kernels.grouped import Groups, grouped_mm
from megascale_moe.kernels.narrow import Float8
from megascale_moe.kernels.norm import rms_norm, rms_norm_backward
from megascale_moe.kernels.rows import row_map, sum_rows, take_rows
from tests.kernels.compare import Spans, assert_near, documents, gradients, leaves
from tests.kernels.test_narrow import INPUTS, input_of

DEVICE = torch.device("cuda")

# As on the CPU, times four: exp, rsqrt and division of a GPU are off by 2 ulp where a CPU's are by one. BF16 results
# are one rounding step apart at most, 2^-7.
FP32 = 8e-6
BF16 = 2.0**-7
# Attention kernels of a GPU keep probabilities in BF16 and, in float32, may use a split softmax: several steps.
ATTENTION = {torch.float32: 2e-5, torch.bfloat16: 8 * 2.0**-8}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers whatever the device."""
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 0], [0, 5, 0], [128, 0, 77], [17, 2, 9]])
def test_bf16_grouped_mm_takes_the_library_and_equals_its_twin(
    counts: list[int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []
    library = F.grouped_mm

    def spy(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        calls.append(x.shape)
        return library(x, weight, **options)

    monkeypatch.setattr(F, "grouped_mm", spy)
    x = randn(sum(counts), 64, dtype=torch.bfloat16)
    weight = randn(3, *((48, 64) if transposed else (64, 48)), dtype=torch.bfloat16)
    weight = weight.transpose(1, 2) if transposed else weight
    groups = Groups.of(counts, DEVICE)
    out = grouped_mm(x, weight, groups)
    assert len(calls) == (sum(counts) > 0)
    assert_near(out, reference.grouped_mm(x, weight, groups), BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_sizes_take_the_loop(dtype: torch.dtype) -> None:
    x, weight = randn(26, 5, dtype=dtype), randn(3, 5, 7, dtype=dtype)
    groups = Groups.of([3, 0, 23], DEVICE)
    wanted = reference.grouped_mm(x, weight, groups)
    assert_near(grouped_mm(x, weight, groups), wanted, FP32 if dtype == torch.float32 else BF16)


def test_grouped_weight_gradient_in_float32() -> None:
    a, b = randn(20, 16, dtype=torch.bfloat16), randn(20, 8, dtype=torch.bfloat16)
    gradient = Gradient(torch.full((3, 16, 8), float("nan"), device=DEVICE))
    for _ in range(2):
        gradient.add_grouped_mm(a, b, Groups.of([7, 0, 13], DEVICE))
    wanted = [2 * (x.float().t() @ y.float()) for x, y in zip(a.split([7, 0, 13]), b.split([7, 0, 13]), strict=True)]
    assert_near(gradient.value(), torch.stack(wanted), BF16)  # each product is rounded to BF16 once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(("heads", "spans"), [((4, 2), ()), ((4, 4), ((0, 0, 1), (0, 1, 70), (1, 0, 33), (1, 33, 70)))])
def test_attention(heads: tuple[int, int], spans: Spans, window: int, dtype: torch.dtype) -> None:
    q = randn(2, 70, heads[0], 16, dtype=dtype)
    k, v = randn(2, 70, heads[1], 16, dtype=dtype), randn(2, 70, heads[1], 16, dtype=dtype)
    blocks = documents(spans, 2, 70)
    out, graphs = attention_forward(q, k, v, blocks, 0.3, window)
    inputs = leaves(q, k, v)
    wanted = reference.attention(inputs[0], inputs[1], inputs[2], blocks, 0.3, window)
    assert_near(out, wanted.detach().to(dtype), ATTENTION[dtype])
    slope = randn(*out.shape, dtype=dtype)
    found = attention_backward(slope, (q, k, v), out, graphs, blocks, 0.3, window)
    for value, gradient in zip(found, gradients([wanted], [slope], inputs), strict=True):
        assert_near(value, gradient.to(dtype), 2 * ATTENTION[dtype], terms=1.0)


@pytest.mark.parametrize(("first", "experts"), [(1, 3), (0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype: torch.dtype, first: int, experts: int) -> None:
    choice = torch.rand(50, 6).topk(2, dim=-1).indices
    m, host = row_map(choice.to(DEVICE), first, experts, of=6), row_map(choice, first, experts, of=6)
    assert m.counts == host.counts
    assert m.per_token == host.per_token == (2 if experts == 6 else 0)
    for name in ("source", "slot", "offsets", "by_token", "token_start"):
        assert torch.equal(getattr(m, name).cpu(), getattr(host, name)), name
    x = randn(50, 16, dtype=dtype)
    rows = take_rows(x, m.source)
    assert torch.equal(rows, x[m.source])
    wanted = reference.sum_rows(rows.cpu(), host)
    assert_near(sum_rows(rows, m).cpu(), wanted, FP32 if dtype == torch.float32 else BF16)


def test_cross_entropy() -> None:
    x, weight = randn(5000, 16), randn(40, 16)  # more than one block
    targets = torch.randint(0, 40, (5000,)).to(DEVICE)
    targets[5] = -100
    sinks = Gradient(torch.empty(40, 16, device=DEVICE)), Gradient(torch.empty(40, 16, device=DEVICE))
    found = linear_cross_entropy(x, weight, targets, 0.1, sinks[0].add_mm)
    wanted = reference.linear_cross_entropy(x, weight, targets, 0.1, sinks[1].add_mm)
    for value, expected in zip((*found, sinks[0].value()), (*wanted, sinks[1].value()), strict=True):
        assert_near(value, expected, FP32)


@pytest.fixture
def fused() -> Iterator[None]:
    """Triton loops for this test only."""
    before, Fusion.enabled = Fusion.enabled, True
    yield
    Fusion.enabled = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_equal_the_twins(dtype: torch.dtype, fused: None) -> None:
    tolerance = FP32 if dtype == torch.float32 else BF16
    x, slope = randn(300, 34, dtype=dtype), randn(300, 34, dtype=dtype)
    weight, gate = randn(34, dtype=dtype), randn(300)
    normed, scale = rms_norm(x, weight, 1e-5)
    assert_near(normed, reference.rms_norm(x, weight, 1e-5)[0], tolerance)
    inputs = leaves(x, weight)
    wanted = gradients([reference.rms_norm(inputs[0], inputs[1], 1e-5)[0]], [slope], inputs)
    dx, dweight = rms_norm_backward(slope, x, weight, scale, None)
    assert_near(dx, wanted[0].to(dtype), tolerance)
    assert_near(dweight, wanted[1], FP32)
    half = slope[:, :17].contiguous()
    assert_near(swiglu(x, gate), reference.swiglu(x, gate), tolerance)
    inputs = leaves(x, gate)
    wanted = gradients([reference.swiglu(*inputs)], [half], inputs)
    dx, dgate = swiglu_backward(half, x, gate)
    assert dgate is not None
    assert_near(dx, wanted[0].to(dtype), tolerance)
    assert_near(dgate, wanted[1], FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharing", ["rows", "channels", "tensor"])
@pytest.mark.parametrize("name", INPUTS)
def test_fp8_messages_are_those_of_the_cpu(name: str, sharing: Any, dtype: torch.dtype) -> None:
    """Byte for byte, by the Triton kernels and by torch's operators; what is decoded as well."""
    x, form = input_of(name, dtype), Float8(sharing)
    message = form.encode(x.to(DEVICE))
    assert torch.equal(message.cpu(), form.encode(x))
    assert torch.equal(form.decode(message, torch.empty_like(x, device=DEVICE)).cpu(), form.decode(form.encode(x), x))
