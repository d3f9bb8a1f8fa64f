"""A small training state, saved in several layouts by threads that stand for ranks."""

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale_moe.checkpoint import Checkpoint, TensorPiece, save
from megascale_moe.checkpoint.boxes import Box

EXPERTS, ROWS, COLUMNS = 8, 6, 5
W13 = "parameters.layers.3.ffn.experts.w13"


def whole(name: str, value: Tensor) -> TensorPiece:
    return TensorPiece(name, tuple(value.shape), (0,) * value.dim(), tuple(value.shape), 0, value.flatten())


def boxed(name: str, value: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> TensorPiece:
    box = value[Box(offset, size).slices((0,) * value.dim())]
    return TensorPiece(name, tuple(value.shape), offset, size, 0, box.flatten())


def shares(values: Tensor, ranks: int) -> list[tuple[int, Tensor]]:
    """Unequal flat ranges: what rank r of a sharded optimizer holds of one tensor, maybe nothing."""
    borders = [values.numel() * rank**2 // ranks**2 for rank in range(ranks + 1)]
    return [(begin, values[begin:end]) for begin, end in pairwise(borders)]


def make_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator)
    return {
        W13: experts.bfloat16(),
        "exp_avg.layers.3.ffn.experts.w13": experts * 3,
        "parameters.norm.weight": torch.randn(7, generator=generator),
        "parameters.half.weight": torch.randn(3, 4, generator=generator).half(),
        "buffers.tokens": torch.randint(-(2**40), 2**40, (EXPERTS,), generator=generator),
        "buffers.flags": torch.tensor([True, False, True]),
        "buffers.scale": torch.randn((), generator=generator).double(),
        "buffers.empty": torch.zeros(0, 4),
    }


def pieces_of(state: dict[str, Tensor], rank: int, ep: int, dp: int) -> list[TensorPiece]:
    """What a rank of an ep x dp layout saves: its experts' weights, flat ranges of their moments, rank 0 the rest."""
    expert_rank, data_rank = divmod(rank, dp)
    count = EXPERTS // ep
    offset, size = (expert_rank * count, 0, 0), (count, ROWS, COLUMNS)
    weights, moments = state[W13], state["exp_avg.layers.3.ffn.experts.w13"]
    box = moments[offset[0] : offset[0] + count].flatten()
    start, values = shares(box, dp)[data_rank]
    pieces = [TensorPiece("exp_avg.layers.3.ffn.experts.w13", tuple(moments.shape), offset, size, start, values)]
    if data_rank == 0:
        pieces.append(boxed(W13, weights, offset, size))
    if rank == 0:
        pieces += [whole(name, value) for name, value in state.items() if "experts" not in name]
    return pieces


def save_on(world: int, action: Callable[[int, Callable[[], None]], Any]) -> list[Any]:
    """Call `action(rank, barrier)` on as many threads; their results, or the exceptions they ended with."""
    barrier = threading.Barrier(world)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = action(rank, lambda: void(barrier.wait(timeout=10)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def void(_: object) -> None:
    """Nothing."""


def save_state(folder: Path, step: int, state: dict[str, Tensor], ep: int = 1, dp: int = 1, keep: int = 0) -> list[Any]:
    def action(rank: int, barrier: Callable[[], None]) -> Path:
        pieces = pieces_of(state, rank, ep, dp)
        return save(folder, step, pieces, {"step": step}, rank=rank, world=ep * dp, barrier=barrier, keep=keep)

    return save_on(ep * dp, action)


def save_alone(folder: Path, step: int, state: dict[str, Tensor], keep: int = 0) -> Path:
    pieces = [whole(name, value) for name, value in state.items()]
    return save(folder, step, pieces, {"step": step}, rank=0, world=1, barrier=lambda: None, keep=keep)


def assert_holds(path: Path, state: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint(path)
    checkpoint.require({name: tuple(value.shape) for name, value in state.items()})
    for name, value in state.items():
        read = checkpoint.read(name, (0,) * value.dim(), tuple(value.shape))
        assert read.dtype == value.dtype
        assert torch.equal(read, value), name
    checkpoint.verify()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
