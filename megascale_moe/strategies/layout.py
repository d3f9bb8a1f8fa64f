"""What a strategy needs to know of where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megascale_moe.comm.axis import Axes, Axis, single
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.op import Stream


@dataclass(frozen=True)
class Layout:
    """A micro-batch of `rows` x `length` tokens on this rank's axes, and the strategy of each module.

    Between operators of a layer the tokens are sharded by sequence: this rank holds the `node.index`-th slice of
    every row, flattened to [tokens, ...].

    Attributes:
        attention: "sp" or "tp". ffn: "ep", "tp" or "ep+tp". dispatch: "auto", "all_to_all" or "all_gather".
        vocabulary: "replicated" or "sharded": embedding and head by vocabulary over the node.
        pieces: into how many a communication and the computation next to it are cut, by peers; 1: not cut.
        gates_last: whether gating weights are applied behind FC2 rather than before it.
    """

    rows: int
    length: int
    axes: Axes
    dtype: torch.dtype = torch.float32
    dispatch: str = "auto"
    attention: str = "sp"
    ffn: str = "ep"
    vocabulary: str = "replicated"
    pieces: int = 1
    gates_last: bool = False

    @classmethod
    def alone(cls, rows: int, length: int, dtype: torch.dtype = torch.float32) -> Layout:
        """One rank, no communication."""
        return cls(rows, length, single(), dtype)

    @classmethod
    def of(
        cls, parallel: ParallelConfig, rows: int, length: int, axes: Axes, dtype: torch.dtype, pieces: int = 1
    ) -> Layout:
        """As a config says."""
        p = parallel
        return cls(rows, length, axes, dtype, p.dispatch, p.attention, p.ffn, p.vocabulary, pieces)

    @property
    def node(self) -> Axis:
        """The ranks that share a sequence (or, tensor-parallel, heads)."""
        return self.axes["node"]

    @property
    def ep(self) -> Axis:
        """The expert-parallel ranks."""
        return self.axes["ep"]

    @property
    def etp(self) -> Axis:
        """The ranks that share every expert's width."""
        return self.axes["etp"]

    @property
    def group(self) -> Axis:
        """The ranks that share one set of experts, ep x etp."""
        return self.axes["ffn"]

    @property
    def tokens(self) -> int:
        """Tokens this rank holds between operators."""
        return self.rows * self.length // self.node.size

    @property
    def shards_vocabulary(self) -> bool:
        """Whether embedding and head are cut by vocabulary."""
        return self.vocabulary == "sharded" and self.node.size > 1

    @property
    def tensor_attention(self) -> bool:
        """Whether attention is tensor-parallel."""
        return self.attention == "tp" and self.node.size > 1

    @property
    def tensor_ffn(self) -> bool:
        """Whether the FFN is tensor-parallel alone: then dense and shared FFNs are, too."""
        return self.ffn == "tp" and self.etp.size > 1

    def stream(self, axis: Axis) -> Stream:
        """The link that messages along an axis take."""
        span = {"node": 1, "etp": axis.size}.get(axis.name, self.group.size)  # consecutive ranks that it reaches over
        return Stream.INTRA if span <= self.node.size else Stream.INTER

    def bytes(self, *elements: float) -> float:
        """Bytes of so many elements in the compute dtype."""
        return sum(elements) * self.dtype.itemsize

    def dispatch_for(self, config: ModelConfig) -> str:
        """The dispatch form of the experts: as configured, or the cheaper one."""
        if self.ep.size == 1:
            return "all_gather"
        if self.dispatch != "auto":
            return self.dispatch
        native = self.group.native
        return cheaper_dispatch(config.top_k, self.ep.size, RELATIVE_COST["nccl" if native else "gloo"], self.etp.size)


# Time per byte of an all-to-all relative to all-gather and reduce-scatter. NCCL: the paper's dispatch times on 8 GPUs
# (all-to-all 1030 us at k = 8 against a mean of 778 us, at equal volume). gloo: both are the same point-to-point
# exchange here, benchmarks/dispatch measures the ratio.
RELATIVE_COST = {"nccl": 1030 / 777.5, "gloo": 1.0}


def cheaper_dispatch(top_k: int, ep: int, relative_cost: float, etp: int = 1) -> str:
    """The form that moves less (paper, section 3.2), weighed by time per byte.

    Each way and per token, all-to-all sends k (ep-1)/ep rows to the experts' ranks and k (etp-1) on to those that
    share them; all-gather (and reduce-scatter back) sends one row to each of ep x etp - 1 ranks.

    Args:
        relative_cost: time per byte of an all-to-all over that of all-gather and reduce-scatter.
    """
    by_peer = top_k * ((ep - 1) / ep * relative_cost + etp - 1)
    return "all_to_all" if by_peer <= ep * etp - 1 else "all_gather"
