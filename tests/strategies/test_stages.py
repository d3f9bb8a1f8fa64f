"""Layers of pipeline stages: even where nothing is said, as asked where it can be, refused in words where not."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from megascale_moe.config import ConfigError, ModelConfig, ParallelConfig
from megascale_moe.strategies.stages import Part, parts_of_rank, stage_parts, together


def parts(layers: int, pp: int, virtual: int = 1, sizes: tuple[int, ...] = ()) -> list[Part]:
    parallel = ParallelConfig(pp=pp, virtual_stages=virtual, stage_layers=sizes,
                              schedule="interleaved" if virtual > 1 else "1f1b")  # fmt: skip
    return stage_parts(parallel, ModelConfig(layers=layers))


@pytest.mark.parametrize(("layers", "stages", "sizes"), [
    (8, 1, [8]),
    (8, 4, [2, 2, 2, 2]),
    (9, 4, [2, 3, 2, 2]),  # the first stage has the embedding, the last the head: one more goes in between
    (10, 4, [2, 3, 3, 2]),
    (11, 4, [3, 3, 3, 2]),  # and then to the first, whose embedding costs less than a head
    (3, 2, [2, 1]),
    (61, 8, [7, 8, 8, 8, 8, 8, 7, 7]),
])  # fmt: skip
def test_as_even_as_possible(layers: int, stages: int, sizes: list[int]) -> None:
    assert [len(part.layers) for part in parts(layers, stages)] == sizes


def test_every_layer_once_in_order_for_any_sizes() -> None:
    for layers, pp, virtual in itertools.product(range(1, 20), range(1, 5), range(1, 4)):
        if layers < pp * virtual:
            continue
        found = parts(layers, pp, virtual)
        assert [layer for part in found for layer in part.layers] == list(range(layers))
        sizes = [len(part.layers) for part in found]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] >= sizes[-1]
        assert [part.first for part in found] == [True] + [False] * (pp * virtual - 1)
        assert [part.last for part in found] == [False] * (pp * virtual - 1) + [True]


def test_stages_that_no_model_has_layers_for_are_refused_before_they_are_counted() -> None:
    """A list with an entry for each of a hundred million stages was made first."""
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"are fewer than the 100000000 stages"):
        parts(4, 10_000, 10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_sizes_as_given() -> None:
    assert [part.layers for part in parts(6, 2, 2, (1, 2, 1, 2))] == [(0,), (1, 2), (3,), (4, 5)]


def test_stages_of_a_rank() -> None:
    """Stage s lives on rank s mod pp; what a rank holds is all of its stages."""
    found = parts(8, 2, 2)
    assert [list(parts_of_rank(found, 2, rank)) for rank in range(2)] == [[0, 2], [1, 3]]
    assert together(parts_of_rank(found, 2, 0)) == Part((0, 1, 4, 5), first=True, last=False)
    assert together(parts_of_rank(found, 2, 1)) == Part((2, 3, 6, 7), first=False, last=True)
    assert together(parts_of_rank(parts(8, 1, 2), 1, 0)) == Part.whole(ModelConfig(layers=8))


@pytest.mark.parametrize(("layers", "pp", "virtual", "sizes", "message"), [
    (3, 4, 1, (), "model.layers = 3 are fewer than the 4 stages of parallel.pp x parallel.virtual_stages = 4 x 1; "
                  "use at most 3 stages"),
    (5, 3, 2, (), "model.layers = 5 are fewer than the 6 stages of parallel.pp x parallel.virtual_stages = 3 x 2; "
                  "use at most 5 stages"),
    (4, 2, 1, (1, 1, 2), "parallel.stage_layers = [1, 1, 2]: must have 2 numbers, one for each of pp x virtual_stages "
                         "stages"),
    (4, 2, 1, (4, 0), "parallel.stage_layers = [4, 0]: every stage needs a layer"),
    (4, 2, 1, (5, -1), "parallel.stage_layers = [5, -1]: every stage needs a layer"),
    (4, 2, 1, (1, 2), "parallel.stage_layers = [1, 2]: add up to 3, model.layers = 4"),
    (4, 1, 1, (3,), "parallel.stage_layers = [3]: add up to 3, model.layers = 4"),
])  # fmt: skip
def test_refusals(layers: int, pp: int, virtual: int, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parts(layers, pp, virtual, sizes)
    assert str(caught.value) == message
