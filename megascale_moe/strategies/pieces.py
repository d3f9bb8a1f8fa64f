"""Into which pieces a communication and the computation next to it are cut.

A piece is a set of peers, given by their distance: from a rank at distance d things come that this rank sends to the
rank at distance d on the other side. Piece 0 is the rank itself, which needs no message; then the distances in rising
order, so that at each moment every rank sends to another one.
"""

from __future__ import annotations


def distances(ranks: int, pieces: int) -> list[list[int]]:
    """The distances of each piece: [0], then 1 .. ranks - 1 in at most `pieces - 1` groups, as even as possible.

    Small groups come first: what is sent first is needed first, and the sooner it is there the better.
    """
    groups = min(max(pieces - 1, 1), ranks - 1)
    least, more = divmod(ranks - 1, groups)
    sizes = [least] * (groups - more) + [least + 1] * more
    found, start = [[0]], 1
    for size in sizes:
        found.append(list(range(start, start + size)))
        start += size
    return found
