"""What a strategy needs to know of where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megascale_moe.comm.axis import Axes, Axis, single
from megascale_moe.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """A micro-batch of `rows` x `length` tokens on this rank's axes.

    Between operators of a layer the tokens are sharded by sequence: this rank holds the `node.index`-th slice of
    every row, flattened to [tokens, ...].
    """

    rows: int
    length: int
    axes: Axes
    dtype: torch.dtype = torch.float32
    dispatch: str = "auto"

    @classmethod
    def alone(cls, rows: int, length: int, dtype: torch.dtype = torch.float32) -> Layout:
        """One rank, no communication."""
        return cls(rows, length, single(), dtype)

    @property
    def node(self) -> Axis:
        """The sequence-parallel ranks."""
        return self.axes["node"]

    @property
    def ep(self) -> Axis:
        """The expert-parallel ranks."""
        return self.axes["ep"]

    @property
    def tokens(self) -> int:
        """Tokens this rank holds between operators."""
        return self.rows * self.length // self.node.size

    def bytes(self, *elements: float) -> float:
        """Bytes of so many elements in the compute dtype."""
        return sum(elements) * self.dtype.itemsize

    def dispatch_for(self, config: ModelConfig) -> str:
        """The dispatch form of the experts: as configured, or the cheaper one."""
        if self.dispatch != "auto":
            return self.dispatch
        native = self.ep.native
        return cheaper_dispatch(config.top_k, self.ep.size, RELATIVE_COST["nccl" if native else "gloo"])


# Time per byte of an all-to-all relative to all-gather and reduce-scatter. NCCL: the paper's dispatch times on 8 GPUs
# (all-to-all 1030 us at k = 8 against a mean of 778 us, at equal volume). gloo: both are the same point-to-point
# exchange here, benchmarks/dispatch measures the ratio.
RELATIVE_COST = {"nccl": 1030 / 777.5, "gloo": 1.0}


def cheaper_dispatch(top_k: int, size: int, relative_cost: float) -> str:
    """All-to-all moves k / n of what all-gather and reduce-scatter move (paper, section 3.2); weighed by time per byte.

    Args:
        relative_cost: time per byte of an all-to-all over that of all-gather and reduce-scatter.
    """
    return "all_to_all" if top_k / size * relative_cost <= 1.0 else "all_gather"
