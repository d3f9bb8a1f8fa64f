"""The attention core against its slow twin: windows, documents, grouped heads, odd lengths, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megascale_moe.kernels import attention, reference
from megascale_moe.kernels.attention import QueryBlock, attention_backward, attention_forward
from tests.kernels.compare import FP32, Spans, assert_near, documents, gradients, leaves

# BF16: q, k, v are read alike by both sides; then scores, probabilities and their gradients are rounded to 8 bits
# (2^-8 each), scores of size 3 move a probability by up to 3 x 2^-8, and the output is rounded once more.
BF16_CHAIN = 5 * 2.0**-8

HEADS = [(4, 4), (4, 2), (3, 1)]
LENGTHS = [1, 3, 64, 65, 150]  # BLOCK is 64: one block, exactly one, one row more, several


def check(
    rows: int, length: int, heads: tuple[int, int], spans: Spans, window: int, dtype: torch.dtype, ours: bool = True,
    value_width: int = 6,
) -> None:  # fmt: skip
    """Forward and backward; `ours`: whether our own backward is the one that must run."""
    width = 8
    q, k = torch.randn(rows, length, heads[0], width).to(dtype), torch.randn(rows, length, heads[1], width).to(dtype)
    v = torch.randn(rows, length, heads[1], value_width).to(dtype)
    tolerance, blocks = FP32 if dtype == torch.float32 else BF16_CHAIN, documents(spans, rows, length)
    out, graphs = attention_forward(q, k, v, blocks, 0.4, window)
    assert (graphs is None) is ours
    assert not out.requires_grad
    inputs = leaves(q, k, v)
    wanted = reference.attention(inputs[0], inputs[1], inputs[2], blocks, 0.4, window)
    assert_near(out, wanted.detach().to(dtype), tolerance)
    slope = torch.randn(out.shape).to(dtype)
    found = attention_backward(slope, (q, k, v), out, graphs, blocks, 0.4, window)
    # A single token sees only itself: its q and k gradients are zero, what is left is rounding of terms of size one.
    for value, gradient in zip(found, gradients([wanted], [slope], inputs), strict=True):
        assert_near(value, gradient.to(dtype), 2 * tolerance, terms=1.0)


@pytest.mark.parametrize("window", [0, 1, 7, 1000])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_whole_rows(length: int, heads: tuple[int, int], window: int) -> None:
    check(2, length, heads, (), window, torch.float32)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("heads", HEADS)
def test_documents(heads: tuple[int, int], window: int) -> None:
    spans = ((0, 0, 1), (0, 1, 70), (0, 70, 97), (1, 0, 97), (2, 0, 33), (2, 33, 97))
    check(3, 97, heads, spans, window, torch.float32)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("length", [1, 65, 130])
def test_bfloat16(length: int, window: int) -> None:
    check(2, length, (4, 2), (), window, torch.bfloat16)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", [(), ((0, 0, 1), (0, 1, 97), (1, 0, 40), (1, 40, 97))], ids=["rows", "documents"])
def test_sinks(spans: Spans, dtype: torch.dtype, heads: tuple[int, int], window: int) -> None:
    q, k = torch.randn(2, 97, heads[0], 8).to(dtype), torch.randn(2, 97, heads[1], 8).to(dtype)
    v, sinks = torch.randn(2, 97, heads[1], 6).to(dtype), torch.randn(heads[0]).to(dtype)
    tolerance, blocks = FP32 if dtype == torch.float32 else BF16_CHAIN, documents(spans, 2, 97)
    out, graphs = attention_forward(q, k, v, blocks, 0.4, window, sinks)
    assert graphs is None
    inputs = leaves(q, k, v, sinks)
    wanted = reference.attention(inputs[0], inputs[1], inputs[2], blocks, 0.4, window, inputs[3])
    assert_near(out, wanted.detach().to(dtype), tolerance)
    slope = torch.randn(out.shape).to(dtype)
    found = attention_backward(slope, (q, k, v), out, graphs, blocks, 0.4, window, sinks)
    *of_inputs, of_sinks = gradients([wanted], [slope], inputs)
    for value, gradient in zip(found[:3], of_inputs, strict=True):
        assert_near(value, gradient.to(dtype), 2 * tolerance, terms=1.0)
    # A sum over 194 tokens of terms of size one: their rounding adds up like sqrt(194) = 14 of them.
    assert_near(found[3], of_sinks, 2 * tolerance, terms=14.0)


def test_a_sink_that_is_far_below_changes_nothing_and_one_far_above_takes_all() -> None:
    q, k, v = (torch.randn(1, 9, 2, 4) for _ in range(3))
    plain, _ = attention_forward(q, k, v, documents((), 1, 9), 0.5, 0)
    out, _ = attention_forward(q, k, v, documents((), 1, 9), 0.5, 0, torch.tensor([-1e4, 1e4]))
    assert_near(out[:, :, 0], plain[:, :, 0], FP32)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 9, 4))


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_backward_does_not_depend_on_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    check(2, 23, (4, 2), (), 6, torch.float32)
    check(1, 23, (2, 2), ((0, 0, 11), (0, 11, 23)), 0, torch.float32)


@pytest.mark.bulky  # what threads allocate is never given back
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("spans", [(), ((0, 0, 30), (0, 30, 70), (1, 0, 70), (2, 0, 1), (2, 1, 70))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_threads(dtype: torch.dtype, spans: Spans, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 torch's backward then runs; in BF16 ours, two rows at a time and one left over; ours too where values
    are narrower than keys, for which torch has no fused kernel.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check(3, 70, (4, 2), spans, window, dtype)
    check(3, 70, (4, 2), spans, window, dtype, ours=dtype == torch.bfloat16, value_width=8)


@pytest.mark.parametrize("threads", [1, 2])
def test_documents_do_not_see_each_other(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not within a tolerance: other documents change no bit of the output or of a gradient."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v, slope = (torch.randn(1, 20, 2, 4) for _ in range(4))
    blocks = documents(((0, 0, 8), (0, 8, 20)), 1, 20)

    def run() -> tuple[Tensor, ...]:
        out, graphs = attention_forward(q, k, v, blocks, 1.0, 0)
        return out, *attention_backward(slope, (q, k, v), out, graphs, blocks, 1.0, 0)

    before = [value.clone() for value in run()]
    for tensor in (q, k, v, slope):
        tensor[:, :8] = torch.randn(1, 8, 2, 4)
    for old, new in zip(before, run(), strict=True):
        assert torch.equal(old[:, 8:], new[:, 8:])
        assert not torch.equal(old[:, :8], new[:, :8])


# --- blocks ----------------------------------------------------------------------------------------------------------


def part_of_rows(rows: int, length: int, runs: list[range]) -> list[QueryBlock]:
    """Runs of queries of whole rows, as a rank has them of a sequence."""
    found, before = [], 0
    for run in runs:
        places = slice(before, before + len(run))
        found.append(QueryBlock(slice(0, rows), places, slice(0, run.stop)))
        before += len(run)
    return found


# Two documents in the first row, one in the second; queries 3 .. 9 and 60 .. 150 of each row, of 150 tokens.
PACKED = [
    QueryBlock(slice(0, 1), slice(0, 2), slice(0, 5)), QueryBlock(slice(0, 1), slice(2, 6), slice(5, 9)),
    QueryBlock(slice(0, 1), slice(6, 96), slice(5, 150)), QueryBlock(slice(1, 2), slice(0, 6), slice(0, 9)),
    QueryBlock(slice(1, 2), slice(6, 96), slice(0, 150)),
]  # fmt: skip
EARLY_AND_LATE = part_of_rows(2, 150, [range(10, 20), range(80, 150)])


def check_blocks(
    blocks: list[QueryBlock], heads: tuple[int, int], window: int, dtype: torch.dtype, ours: bool = True,
    value_width: int = 6,
) -> None:  # fmt: skip
    """Forward and backward of two rows of 150 tokens against the slow twin; keys and values lie in one matrix."""
    count, width = max(block.queries.stop for block in blocks), 8
    q, kv = torch.randn(2, count, heads[0], width), torch.randn(2, 150, heads[1] * (width + value_width))
    q, kv = q.to(dtype), kv.to(dtype)
    k, v = (x.unflatten(2, (heads[1], -1)) for x in kv.split([heads[1] * width, heads[1] * value_width], dim=2))
    out, graphs = attention_forward(q, k, v, blocks, 0.4, window)
    assert (graphs is None) is ours
    inputs = leaves(q, k, v)
    wanted = reference.attention(inputs[0], inputs[1], inputs[2], blocks, 0.4, window)
    tolerance = FP32 if dtype == torch.float32 else BF16_CHAIN
    assert_near(out, wanted.detach().to(dtype), tolerance)
    slope = torch.randn(out.shape).to(dtype)
    found = attention_backward(slope, (q, k, v), out, graphs, blocks, 0.4, window)
    for value, gradient in zip(found, gradients([wanted], [slope], inputs), strict=True):
        assert value.dtype == dtype
        assert_near(value, gradient.to(dtype), 2 * tolerance, terms=1.0)


@pytest.mark.parametrize("window", [0, 1, 7, 70, 1000])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("blocks", [EARLY_AND_LATE, PACKED], ids=["whole rows", "documents"])
def test_blocks(blocks: list[QueryBlock], heads: tuple[int, int], window: int) -> None:
    check_blocks(blocks, heads, window, torch.float32)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("blocks", [EARLY_AND_LATE, PACKED], ids=["whole rows", "documents"])
def test_blocks_in_bfloat16(blocks: list[QueryBlock], window: int) -> None:
    check_blocks(blocks, (4, 2), window, torch.bfloat16)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [EARLY_AND_LATE, PACKED], ids=["whole rows", "documents"])
def test_blocks_by_several_threads(
    blocks: list[QueryBlock], dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 torch's kernel runs then, block by block; ours where values are narrower than keys."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check_blocks(blocks, (4, 2), window, dtype)
    check_blocks(blocks, (4, 2), window, dtype, ours=dtype == torch.bfloat16, value_width=8)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("blocks", [EARLY_AND_LATE, PACKED], ids=["whole rows", "documents"])
def test_blocks_with_sinks(blocks: list[QueryBlock], window: int) -> None:
    count = max(block.queries.stop for block in blocks)
    q, k, v = torch.randn(2, count, 4, 8), torch.randn(2, 150, 2, 8), torch.randn(2, 150, 2, 6)
    sinks = torch.randn(4)
    out, graphs = attention_forward(q, k, v, blocks, 0.4, window, sinks)
    inputs = leaves(q, k, v, sinks)
    wanted = reference.attention(inputs[0], inputs[1], inputs[2], blocks, 0.4, window, inputs[3])
    assert_near(out, wanted.detach().to(q.dtype), FP32)
    slope = torch.randn(out.shape)
    found = attention_backward(slope, (q, k, v), out, graphs, blocks, 0.4, window, sinks)
    *of_inputs, of_sinks = gradients([wanted], [slope], inputs)
    for value, gradient in zip(found[:3], of_inputs, strict=True):
        assert_near(value, gradient.to(q.dtype), 2 * FP32, terms=1.0)
    # Sums over up to 192 queries of terms of size one: their rounding adds up like sqrt(192) = 14 of them.
    assert_near(found[3], of_sinks, 2 * FP32, terms=14.0)


def test_blocks_without_storage() -> None:
    q, kv = torch.empty(2, 96, 4, 8, device="meta"), torch.empty(2, 150, 2, 8, device="meta")
    out, graphs = attention_forward(q, kv, kv[..., :6], PACKED, 1.0, 0)
    assert graphs is None
    assert out.shape == (2, 96, 4, 6)
    found = attention_backward(out, (q, kv, kv[..., :6]), out, None, PACKED, 1.0, 0)
    assert [tuple(value.shape) for value in found] == [(2, 96, 4, 8), (2, 150, 2, 8), (2, 150, 2, 6)]
