"""Which rank works on which whole matrix, and which of its elements have to travel there. Pure arithmetic.

Shards are cut evenly, wherever that falls in a matrix: cutting only between matrices would pad a buffer to (ranks x
its largest matrix), many times its size where ranks outnumber the matrices of a layer. So a matrix lies in fragments on
several ranks, in rows of the buffer as the axes of its replicas cut it (`FlatWeights`), and in parts of its rows or
columns where tensor parallelism cuts it. One of the ranks that hold a fragment is its owner, chosen so that owners have
equal work. Fragments reach it in at most three hops, one along each axis (between nodes, inside of the node, over the
ranks of tensor parallelism), and results go back the same way.

Only what is cut travels: a rank's shard of S elements holds all but the first and the last of its matrices whole, and
where matrices are larger than that, all its S elements are sent once and come back once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

Place = tuple[int, int, int]
"""Of a rank on the axes (inter, intra, cut) of a group of weights."""

Extent = tuple[int, int, float]
"""Where the local part of a matrix starts and stops in the flat buffer, and the work that the whole matrix is."""

HOPS = 3


class Load(NamedTuple):
    """Work of the ranks at all places of some axes.

    Attributes:
        of: each place, the last axis fastest. counted: what operators have declared so far, at least that of the
            busiest.
    """

    of: tuple[float, ...]
    counted: float

    @classmethod
    def none(cls, sizes: Place) -> Load:
        """Return the load of ranks that have nothing to do yet."""
        return cls((0.0,) * math.prod(sizes), 0.0)


class Fragment(NamedTuple):
    """Elements `start` to `stop` of the flat buffer of the ranks at `holder`, part of a matrix, in the holder's shard.

    Attributes:
        matrix: its number in the group.
    """

    matrix: int
    holder: Place
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Division:
    """The matrices of a group divided among the ranks that hold it; the same object for all of them.

    Attributes:
        fragments: of all ranks, by matrix, then by part of the matrix, then by place in it.
        owners: of each matrix. load: after this group and those before it.
        work: what the group's operator declares on every rank. Over several groups it adds up to the work of the
            busiest rank, but for one matrix: groups go on evenly after the first, so that what a further one takes can
            be told from the last.
    """

    fragments: tuple[Fragment, ...]
    owners: tuple[Place, ...]
    load: Load
    work: float

    def place(self, number: int, hops: int) -> Place:
        """Return where a fragment is after so many hops: each takes it to its owner's place on one more axis."""
        fragment = self.fragments[number]
        return self.owners[fragment.matrix][:hops] + fragment.holder[hops:]  # type: ignore[return-value]

    def held(self, place: Place, hops: int) -> Sequence[int]:
        """Return the numbers of the fragments that a rank has after so many hops, ascending."""
        return self._held[hops].get(place, ())

    @cached_property
    def _held(self) -> list[dict[Place, list[int]]]:
        after: list[dict[Place, list[int]]] = [defaultdict(list) for _ in range(HOPS + 1)]
        for hops, held in enumerate(after):
            for number in range(len(self.fragments)):
                held[self.place(number, hops)].append(number)
        return after

    def most(self, hop: int, *, back: bool = False) -> int:
        """Return the elements sent in a hop (there or back) by the rank that sends most; 0 if nothing moves."""
        sent: dict[Place, int] = defaultdict(int)
        for number, fragment in enumerate(self.fragments):
            if fragment.holder[hop] != self.owners[fragment.matrix][hop]:
                sent[self.place(number, hop + back)] += fragment.size
        return max(sent.values(), default=0)


@lru_cache(maxsize=1024)  # all ranks of a dry run ask for the same ones
def divide(extents: tuple[Extent, ...], shard: int, sizes: Place, load: Load) -> Division:
    """Choose an owner for every matrix among the ranks that hold some of it.

    Matrices that lie on one rank stay there. Of the others, those with most work come first, and each goes to the rank
    that has least work so far; of equal ones to that which holds most of it.

    Args:
        shard: elements of a rank's shard. sizes: of the axes. load: work that the places have already.
    """
    fragments = []
    elements: list[dict[Place, int]] = []  # of each matrix, by holder
    for matrix, (start, stop, _) in enumerate(extents):
        elements.append({})
        for part, row in product(range(sizes[2]), range(start // shard, -(-stop // shard))):
            holder = row % sizes[0], row // sizes[0], part  # row [intra, inter] of a buffer is the shard of that place
            fragments.append(Fragment(matrix, holder, max(start, row * shard), min(stop, (row + 1) * shard)))
            elements[matrix][holder] = fragments[-1].size
    work = dict(zip(product(*map(range, sizes)), load.of, strict=True))
    owners = [(0, 0, 0)] * len(extents)
    for matrix in sorted(range(len(extents)), key=lambda index: (len(elements[index]) > 1, -extents[index][2])):
        held = elements[matrix]
        owner = min(held, key=lambda place: (work[place], -held[place], place))
        owners[matrix] = owner
        work[owner] += extents[matrix][2]
    mean = sum(extent[2] for extent in extents) / len(work)
    counted = max(*work.values(), load.counted + mean)
    return Division(tuple(fragments), tuple(owners), Load(tuple(work.values()), counted), counted - load.counted)
