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
        of: each place, by `number_of`. counted: what operators have declared so far, at least that of the busiest.
    """

    of: tuple[float, ...]
    counted: float

    @classmethod
    def none(cls, sizes: Place) -> Load:
        """Return the load of ranks that have nothing to do yet."""
        return cls((0.0,) * (sizes[0] * sizes[1] * sizes[2]), 0.0)


@dataclass(frozen=True)
class Fragment:
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

    def place(self, fragment: Fragment, hops: int) -> Place:
        """Return where a fragment is after so many hops: each takes it to its owner's place on one more axis."""
        return self.owners[fragment.matrix][:hops] + fragment.holder[hops:]  # type: ignore[return-value]

    def held(self, place: Place, hops: int) -> Sequence[int]:
        """Return the numbers of the fragments that a rank has after so many hops, ascending."""
        return self._held[hops].get(place, ())

    @cached_property
    def _held(self) -> list[dict[Place, list[int]]]:
        found: list[dict[Place, list[int]]] = []
        for hops in range(HOPS + 1):
            at: dict[Place, list[int]] = defaultdict(list)
            for number, fragment in enumerate(self.fragments):
                at[self.place(fragment, hops)].append(number)
            found.append(dict(at))
        return found

    def most(self, hop: int, *, back: bool = False) -> int:
        """Return the elements sent in a hop (there or back) by the rank that sends most; 0 if nothing moves."""
        sent: dict[Place, int] = defaultdict(int)
        for fragment in self.fragments:
            before, after = self.place(fragment, hop), self.place(fragment, hop + 1)
            if before != after:
                sent[after if back else before] += fragment.size
        return max(sent.values(), default=0)


@lru_cache(maxsize=1024)  # all ranks of a dry run ask for the same ones
def divide(extents: tuple[Extent, ...], shard: int, sizes: Place, load: Load) -> Division:
    """Choose an owner for every matrix among the ranks that hold some of it.

    Matrices that lie on one rank stay there. Of the others, those with most work come first, and each goes to the rank
    that has least work so far; of equal ones to that which holds most of it.

    Args:
        shard: elements of a rank's shard. sizes: of the axes. load: work that the places have already.
    """
    fragments = [fragment for index, extent in enumerate(extents) for fragment in _cut(index, extent, shard, sizes)]
    holders: dict[int, dict[Place, int]] = defaultdict(lambda: defaultdict(int))
    for fragment in fragments:
        holders[fragment.matrix][fragment.holder] += fragment.size
    work, owners = list(load.of), [(0, 0, 0)] * len(extents)
    for index in sorted(holders, key=lambda index: (len(holders[index]) > 1, -extents[index][2], index)):
        held = holders[index]
        owners[index] = min(held, key=lambda place: (work[number_of(place, sizes)], -held[place], place))
        work[number_of(owners[index], sizes)] += extents[index][2]
    mean = sum(extent[2] for extent in extents) / len(work)
    counted = max(max(work), load.counted + mean)
    return Division(tuple(fragments), tuple(owners), Load(tuple(work), counted), counted - load.counted)


def _cut(matrix: int, extent: Extent, shard: int, sizes: Place) -> list[Fragment]:
    """The fragments of a matrix: row [intra, inter] of a buffer is the shard of that place."""
    start, stop, _ = extent
    rows = range(start // shard, -(-stop // shard))
    return [
        Fragment(matrix, (row % sizes[0], row // sizes[0], part), max(start, row * shard), min(stop, (row + 1) * shard))
        for part, row in product(range(sizes[2]), rows)
    ]


def number_of(place: Place, sizes: Place) -> int:
    """Return the number of a place among all of some sizes."""
    return (place[0] * sizes[1] + place[1]) * sizes[2] + place[2]
