"""What the CPU kernels gain: attention backward, blocked and fused rows, memory that is kept.

    python benchmarks/kernels/run.py [--threads 1] [--rounds 9]

Both sides of each row are interleaved in one process; medians of process CPU time (wall time with several threads),
so other load on the machine matters little with one thread. Writes results.json beside this file with --write.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megascale_moe.kernels.activation import swiglu_backward
from megascale_moe.kernels.allocator import keep_freed_memory
from megascale_moe.kernels.attention import QueryBlock, attention_backward, causal_attention
from megascale_moe.kernels.blocks import Fusion
from megascale_moe.kernels.norm import rms_norm, rms_norm_backward
from megascale_moe.kernels.reference import swiglu as plain_swiglu
from megascale_moe.train.hardware import cpu_model

Work = Callable[[], object]


def interleaved(sides: dict[str, Work], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each side; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, work in sides.items():
            start = clock()
            work()
            times[name].append((clock() - start) * 1e3)
    return {name: round(median(values[1:]), 2) for name, values in times.items()}


def attention_sides(dtype: torch.dtype, rows: int, heads: int, groups: int, width: int, length: int) -> dict[str, Work]:
    """torch's backward of a kept graph against ours, which recomputes the scores."""
    q, d = (torch.randn(rows, length, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(rows, length, groups, width).to(dtype) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = causal_attention(leaves[0], leaves[1], leaves[2], width**-0.5, 0)
    blocks = [QueryBlock(slice(0, rows), slice(0, length), slice(0, length))]
    return {
        "torch": lambda: torch.autograd.grad(out, leaves, d, retain_graph=True),
        "ours": lambda: attention_backward(d, (q, k, v), d, None, blocks, width**-0.5, 0),
    }


def fused(work: Work) -> Work:
    """The same work with fusion on."""

    def run() -> object:
        Fusion.enabled = True
        try:
            return work()
        finally:
            Fusion.enabled = False

    return run


def swiglu_sides(dtype: torch.dtype) -> dict[str, Work]:
    """SwiGLU's backward by autograd of the plain formula, blocked, fused."""
    x, d, gate = torch.randn(8192, 1024).to(dtype), torch.randn(8192, 512).to(dtype), torch.rand(8192)
    leaf, weight = x.clone().requires_grad_(), gate.clone().requires_grad_()
    out: Tensor = plain_swiglu(leaf, weight)
    return {
        "autograd": lambda: torch.autograd.grad(out, (leaf, weight), d.to(out.dtype), retain_graph=True),
        "blocked": lambda: swiglu_backward(d, x, gate),
        "fused": fused(lambda: swiglu_backward(d, x, gate)),
    }


def norm_sides(dtype: torch.dtype) -> dict[str, Work]:
    """RMSNorm's backward by torch's autograd, blocked, fused."""
    x, d, weight = torch.randn(4096, 256).to(dtype), torch.randn(4096, 256).to(dtype), torch.ones(256)
    leaf, leaf_weight = x.clone().requires_grad_(), weight.to(dtype).requires_grad_()
    out = torch.nn.functional.rms_norm(leaf, (256,), leaf_weight, 1e-5)
    _, scale = rms_norm(x, weight, 1e-5)
    return {
        "autograd": lambda: torch.autograd.grad(out, (leaf, leaf_weight), d, retain_graph=True),
        "blocked": lambda: rms_norm_backward(d, x, weight, scale, None),
        "fused": fused(lambda: rms_norm_backward(d, x, weight, scale, None)),
    }


def measure(rounds: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    """All rows."""
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        cases = {
            "attention backward, 8 x 512 tokens, 8/2 heads of 32": attention_sides(dtype, 8, 8, 2, 32, 512),
            "attention backward, 2 x 1024 tokens, 16/4 heads of 128": attention_sides(dtype, 2, 16, 4, 128, 1024),
            "SwiGLU backward, 8192 x 512": swiglu_sides(dtype),
            "RMSNorm backward, 4096 x 256": norm_sides(dtype),
        }
        for name, sides in cases.items():
            rows.append({"kernel": name, "dtype": str(dtype), "ms": interleaved(sides, rounds, clock)})
    return rows


def kept_memory(rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """One pass over 32 MB into fresh memory, before and after `keep_freed_memory`."""
    x = torch.randn(8192, 1024)
    before = interleaved({"given back": lambda: x * 2.0}, rounds, clock)
    keep_freed_memory()
    after = interleaved({"kept": lambda: x * 2.0}, rounds, clock)
    return {"kernel": "x * 2, 32 MB", "dtype": "torch.float32", "ms": before | after}


def main() -> None:
    """Measure and print; one JSON document with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rows = [kept_memory(options.rounds, clock), *measure(options.rounds, clock)]
    for row in rows:
        print(f"{row['kernel']:58} {row['dtype']:15} {row['ms']}")
    if options.write:
        document = {
            "command": f"python benchmarks/kernels/run.py --threads {options.threads} --rounds {options.rounds}",
            "machine": cpu_model(),
            "torch": torch.__version__,
            "unit": "ms CPU time" if options.threads == 1 else "ms",
            "rows": rows,
        }
        path = Path(__file__).parent / f"results-threads-{options.threads}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
