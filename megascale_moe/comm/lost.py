"""A rank that others wait for and that does not answer: who waited, for whom, in which operator.

A killed rank is noticed at once, its connections are closed; one that is stopped or hangs only when the group's timeout
is over. gloo then tells a network address or nothing. Messages here are point to point, so a rank knows for whom it
waited and says so. That may be a rank that is itself waiting: the lost one is named by others and says nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from megascale_moe.comm.axis import Axis

PLACE = re.compile(r"^\[[^]]*\]\s*")  # "[../third_party/gloo/.../pair.cc:534] ", of no use to a reader


class LostPeer(RuntimeError):
    """A communication failed because of another rank.

    Attributes:
        ranks: for whom this rank waited, as ranks of the job. operator: what it waited in, if an operator did.
    """

    def __init__(self, axis: str, rank: int, ranks: Sequence[int], reason: str) -> None:
        super().__init__(axis, rank, tuple(ranks), reason)
        self.axis, self.rank, self.ranks, self.reason = axis, rank, tuple(ranks), reason
        self.operator = ""

    def __str__(self) -> str:
        one = len(self.ranks) == 1
        whom = f"rank {self.ranks[0]}" if one else f"one of ranks {', '.join(map(str, self.ranks))}"
        where = f"{self.operator}, axis {self.axis}" if self.operator else f"axis {self.axis}"
        return f"rank {self.rank} waited for {whom} in vain ({where}): {self.reason}"


@contextlib.contextmanager
def waiting(axis: Axis, peer: int | None = None) -> Iterator[None]:
    """Turn the failure of a communication with one peer (its index on the axis), or with all (None), into a `LostPeer`.

    Raises:
        LostPeer: the communication failed.
    """
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(axis.group)
        others = [index for index in range(axis.size) if index != axis.index] if peer is None else [peer]
        reason = PLACE.sub("", str(error).splitlines()[0]).split(". ")[0]
        raise LostPeer(axis.name, ranks[axis.index], [ranks[index] for index in others], reason) from error
