"""What kernels on a GPU gain: row formulas compiled for their widths, grouped weight gradients, sorts and sums of rows.

    python benchmarks/kernels/gpu.py          # a minute, most of it compiling; sizes of benchmarks/peers' GPU case

Medians of twenty runs by CUDA events, each behind other work in the queue, so that starting kernels takes no part.
Without a GPU small sizes run, to see that all of it works; their times say nothing. `h100-by-hand.txt` is what earlier
forms of this script and of the code gave on an H100, by hand; this form has not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from megascale_moe.engine.gradient import Gradient
from megascale_moe.kernels import activation, rotary
from megascale_moe.kernels.grouped import Groups, grouped_outer
from megascale_moe.kernels.rows import row_map, sum_rows

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = (8192, 2048, 1408, 16, 2) if GPU else (64, 64, 48, 4, 2)
HEADS, KEY_HEADS, HEAD = (16, 4, 128) if GPU else (4, 2, 16)
REPEATS = 20


def microseconds(work: Callable[[], object]) -> float:
    """Of one run."""
    times = []
    for done in range(REPEATS + 4):
        if GPU:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)  # what keeps the queue busy meanwhile
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            took = begin.elapsed_time(end) * 1e3
        else:
            start = time.perf_counter()
            work()
            took = (time.perf_counter() - start) * 1e6
        if done >= 4:
            times.append(took)
    return median(times)


def randn(*shape: int) -> torch.Tensor:
    """BF16."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def sides() -> dict[str, dict[str, Callable[[], object]]]:
    """What is compared, by name."""
    rows = TOKENS * TOP_K
    x, slope, gate = randn(rows, 2 * WIDTH), randn(rows, WIDTH), torch.rand(rows, device=DEVICE)
    rope = tuple(torch.randn(TOKENS, HEAD // 2, device=DEVICE) for _ in range(2))
    qkv, dq = randn(TOKENS, (HEADS + 2 * KEY_HEADS) * HEAD), randn(TOKENS, HEADS, HEAD)
    dk, dv = randn(TOKENS, KEY_HEADS, HEAD), randn(TOKENS, KEY_HEADS, HEAD)
    sizes = (HEADS, KEY_HEADS, HEAD)
    formulas = {
        "SwiGLU forward": (activation._run_forward, (x, gate)),
        "SwiGLU backward": (activation._run_backward, (slope, x, gate)),
        "rotary embedding forward": (rotary._run_split, (qkv, *rope, sizes, False)),
        "rotary embedding backward": (rotary._run_join, (dq, dk, dv, *rope, False)),
    }
    found: dict[str, dict[str, Callable[[], object]]] = {
        name: {
            "widths are symbols": lambda kernel=kernel, given=given: kernel.fused(*given),
            "widths are known": lambda kernel=kernel, given=given: kernel.fused_by_width(*given),
        }
        for name, (kernel, given) in formulas.items()
    }
    choice = torch.rand(TOKENS, EXPERTS, device=DEVICE).topk(TOP_K, dim=-1).indices
    routed, every = randn(rows, HIDDEN), row_map(choice, 0, EXPERTS, of=EXPERTS)
    expert = choice.flatten()
    found["sorting rows by expert"] = {
        str(dtype): lambda dtype=dtype: expert.to(dtype).argsort(stable=True) for dtype in (torch.int64, torch.int16)
    }
    found["sums of a token's rows"] = {
        "embedding bag": lambda: F.embedding_bag(every.by_token, routed, every.token_start, mode="sum"),
        "side by side": lambda: sum_rows(routed, every),
    }
    counts, total = Groups.of(every.counts, DEVICE), torch.empty(EXPERTS, 2 * WIDTH, HIDDEN, device=DEVICE)

    def one_by_one() -> None:
        start = 0
        for part, count in zip(total.unbind(), counts.counts, strict=True):
            part.copy_(x[start : start + count].t() @ routed[start : start + count])
            start += count

    def at_once() -> None:
        products = grouped_outer(x, routed, counts)
        if products is not None:  # not on a CPU
            Gradient(total).add(products)

    found["weight gradients of experts"] = {"one by one": one_by_one, "at once": at_once}
    return found


def main() -> None:
    """Measure and print."""
    print(torch.cuda.get_device_name() if GPU else "no GPU: times say nothing", f"torch {torch.__version__}", sep=", ")
    for name, compared in sides().items():
        for side, work in compared.items():
            print(f"{name}, {side}: {microseconds(work):.1f} us", flush=True)


if __name__ == "__main__":
    main()
