"""Whose matrix is whose, against counting elements one by one."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from megascale_moe.optim.division import HOPS, Division, Extent, Load, Place, divide

SIZES = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 1), (3, 2, 1), (2, 1, 2), (1, 1, 4), (3, 1, 2)]
# Local parts of matrices of many sizes, some gaps between them.
EXTENTS: tuple[Extent, ...] = (
    (0, 64, 8.0), (64, 80, 1.0), (80, 96, 1.0), (112, 240, 30.0), (240, 247, 0.5), (256, 384, 30.0), (390, 396, 0.25),
)  # fmt: skip
SHARD_OF = {count: -(-400 // count) for count in range(1, 7)}


def places(sizes: Place) -> list[Place]:
    return list(product(*map(range, sizes)))


def divided(sizes: Place, extents: tuple[Extent, ...] = EXTENTS) -> Division:
    return divide(extents, SHARD_OF[sizes[0] * sizes[1]], sizes, Load.none(sizes))


def holder(element: int, part: int, sizes: Place) -> Place:
    """Who has an element of the buffer: shards follow each other, the ranks of a node far apart."""
    row = element // SHARD_OF[sizes[0] * sizes[1]]
    return row % sizes[0], row // sizes[0], part


@pytest.mark.parametrize("sizes", SIZES)
def test_fragments_are_all_elements_where_they_are(sizes: Place) -> None:
    division = divided(sizes)
    found = {
        (fragment.matrix, fragment.holder[2], element): fragment.holder
        for fragment in division.fragments for element in range(fragment.start, fragment.stop)
    }  # fmt: skip
    wanted = {
        (matrix, part, element): holder(element, part, sizes)
        for matrix, (start, stop, _) in enumerate(EXTENTS)
        for part in range(sizes[2])
        for element in range(start, stop)
    }
    assert found == wanted
    assert sum(fragment.size for fragment in division.fragments) == len(wanted)  # none twice
    places_ = [(f.matrix, f.holder[2], f.start) for f in division.fragments]
    assert places_ == sorted(places_)  # the order in which the parts of a matrix are put together


@pytest.mark.parametrize("sizes", SIZES)
def test_hops_along_one_axis_each_end_at_the_owner(sizes: Place) -> None:
    division = divided(sizes)
    for number, fragment in enumerate(division.fragments):
        way = [division.place(number, hops) for hops in range(HOPS + 1)]
        assert way[0] == fragment.holder
        assert way[-1] == division.owners[fragment.matrix]
        for hop, (before, after) in enumerate(pairwise(way)):
            assert all(before[axis] == after[axis] for axis in range(HOPS) if axis != hop)
    for hops in range(HOPS + 1):
        held = [number for place in places(sizes) for number in division.held(place, hops)]
        assert sorted(held) == list(range(len(division.fragments)))


@pytest.mark.parametrize("sizes", SIZES)
def test_owners_hold_something_and_whole_matrices_stay(sizes: Place) -> None:
    division = divided(sizes)
    for matrix, owner in enumerate(division.owners):
        holders = {fragment.holder for fragment in division.fragments if fragment.matrix == matrix}
        assert owner in holders
    whole = {m for m in range(len(EXTENTS)) if sum(f.matrix == m for f in division.fragments) == 1}
    moved = {f.matrix for n, f in enumerate(division.fragments) if division.place(n, HOPS) != f.holder}
    assert not whole & moved


@pytest.mark.parametrize("sizes", SIZES)
def test_the_most_sent_is_that_of_the_busiest_rank(sizes: Place) -> None:
    division = divided(sizes)
    for hop in range(HOPS):
        there, back = dict.fromkeys(places(sizes), 0), dict.fromkeys(places(sizes), 0)
        for number, fragment in enumerate(division.fragments):
            before, after = division.place(number, hop), division.place(number, hop + 1)
            if before != after:
                there[before] += fragment.size
                back[after] += fragment.size
        assert division.most(hop) == max(there.values())
        assert division.most(hop, back=True) == max(back.values())


def test_equal_matrices_that_fill_shards_do_not_travel() -> None:
    """Experts: twelve matrices over two, three, four or six ranks."""
    extents = tuple((100 * index, 100 * (index + 1), 1.0) for index in range(12))
    for ranks in (2, 3, 4, 6):
        division = divide(extents, 1200 // ranks, (ranks, 1, 1), Load.none((ranks, 1, 1)))
        assert [division.most(hop) for hop in range(HOPS)] == [0, 0, 0]
        assert division.load.of == (12 / ranks,) * ranks


def test_work_is_equal_over_groups() -> None:
    """Sixteen layers with one matrix over four ranks: four for each, though every rank holds a quarter of each."""
    load, owners = Load.none((2, 2, 1)), list[Place]()
    for _ in range(16):
        division = divide(((0, 400, 3.0),), 100, (2, 2, 1), load)
        owners += division.owners
        load = division.load
    assert load.of == (12.0,) * 4
    assert all(owners.count(place) == 4 for place in places((2, 2, 1)))


def test_declared_work_is_that_of_the_busiest_rank_and_goes_on_evenly() -> None:
    """One matrix a layer: the busiest of four ranks has one after the first layer and two after the fifth."""
    load, works = Load.none((4, 1, 1)), []
    for _ in range(8):
        division = divide(((0, 400, 3.0),), 100, (4, 1, 1), load)
        works.append(division.work)
        load = division.load
        assert max(load.of) <= load.counted < max(load.of) + 3.0
    assert works == [3.0, *[0.75] * 7]
