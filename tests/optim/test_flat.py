"""Flat buffers: views, shards, and which elements of which box a rank's shard holds."""

from __future__ import annotations

import math

import pytest
import torch

from megascale_moe.comm.axis import Axis
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.strategies.placement import Placement, columns, everything, rows

REPLICAS = ("node", "tensor_data")
PLACES = {
    "vector": everything((7,), REPLICAS),
    "matrix": everything((13, 5), REPLICAS),
    "qkv": rows((24, 3), [range(2, 4), range(10, 12), range(18, 20)], REPLICAS),  # three boxes
    "out": columns((5, 12), range(4, 8), REPLICAS),
    "scalar": everything((1,), REPLICAS),
}


def flat(n: int = 1, d: int = 1, intra: int = 0, inter: int = 0, dtype: torch.dtype = torch.float32,
         device: str = "cpu") -> FlatWeights:  # fmt: skip
    axes = Axis("node", n, intra), Axis("tensor_data", d, inter)
    return FlatWeights(PLACES, *axes, decay=True, dtype=dtype, device=torch.device(device), name="replicated")


def test_views_and_shards_share_the_flat_memory() -> None:
    places = {"a": everything((3, 5), REPLICAS), "b": everything((7,), REPLICAS)}
    whole = FlatWeights(
        places, Axis(""), Axis("tensor_data"), decay=True, dtype=torch.float32, device=torch.device("cpu")
    )
    views = {name: (weight, gradient) for name, weight, gradient in whole.views()}
    assert [(slot.start, slot.stop) for slot in whole.slots] == [(0, 15), (16, 23)]
    assert whole.shares_memory
    assert whole.master.data_ptr() == whole.weights.data_ptr()  # float32: no copy
    whole.set(whole.slots[1], torch.arange(7.0))
    assert views["b"][0].tolist() == list(range(7))
    assert whole.weights[15] == 0
    views["a"][1].add(torch.ones(3, 5))
    assert whole.gradients.tolist() == [1.0] * 15 + [0.0] * 17


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_hold_every_element_of_every_box_once(n: int, d: int, dtype: torch.dtype) -> None:
    """Each element's value is its place in the whole weight: read back from the masters of all ranks, box by box."""
    covered = {name: torch.zeros(place.whole) for name, place in PLACES.items()}
    for rank in range(n * d):
        mine = flat(n, d, rank // d, rank % d, dtype)
        assert mine.shard == slice(rank * len(mine.master), (rank + 1) * len(mine.master))
        for slot in mine.slots:
            place = PLACES[slot.name]
            whole = torch.arange(float(math.prod(place.whole))).view(place.whole)
            mine.set(slot, place.take(whole))
            for part in mine.owned(slot):
                box = tuple(slice(start, start + size) for start, size in zip(*part.box, strict=True))
                assert mine.master[part.place].tolist() == whole[box].flatten()[part.first : part.last].tolist()
                count = torch.zeros(part.box[1]).flatten()
                count[part.first : part.last] = 1
                covered[slot.name][box] += count.view(part.box[1])
    for name, place in PLACES.items():
        assert torch.equal(covered[name], held(place)), name


def held(place: Placement) -> torch.Tensor:
    """One where the placement has an element of the whole weight."""
    ones = torch.zeros(place.whole)
    for box in place.boxes:
        ones[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))] = 1
    return ones


def test_masters_are_exact_where_weights_are_rounded() -> None:
    mine = flat(dtype=torch.bfloat16)
    value = torch.full((13, 5), 1 + 2.0**-12)
    mine.set(mine.slots[1], value)
    (part,) = mine.owned(mine.slots[1])
    assert not mine.shares_memory
    assert torch.equal(mine.master[part.place], value.flatten())
    assert {name: weight for name, weight, _ in mine.views()}["matrix"].unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_buffers_have_shapes_only(dtype: torch.dtype) -> None:
    mine = flat(2, 3, 1, 2, dtype, "meta")
    mine.set(mine.slots[1], torch.empty(13, 5, device="meta"))
    assert mine.shares_memory == (dtype == torch.float32)
    assert mine.master.is_meta
    assert mine.weights.shape == mine.gradients.shape == (6 * len(mine.master),)
