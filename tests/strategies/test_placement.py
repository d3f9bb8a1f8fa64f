"""Parts of weights over all ranks of a layout: together they are the model, as often as there are replicas.

Elements are followed by number: a weight whose values are 0, 1, 2, ... shows in a rank's part which elements it has.
No process group is needed, a layout is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes, axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.model.counts import parameter_matrices, parameter_shapes
from megascale_moe.model.transformer import build
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Placement, columns, everything, rows, share
from megascale_moe.strategies.stages import parts_of_rank, stage_parts, together
from megascale_moe.strategies.weights import initial, placements

SMALL = ModelConfig(
    layers=4, hidden=16, heads=8, kv_heads=4, experts=8, top_k=2, ffn_hidden=8, vocab=24, sequence_length=8,
    shared_experts=2, shared_gate=True, qk_norm="head", dense_layers=1, dense_ffn_hidden=12, correction_bias=True,
)  # fmt: skip
MODELS = {
    "gqa": SMALL,
    "tied": replace(SMALL, tied_embeddings=True, dense_layers=0, qk_norm="none"),
    "mla": replace(SMALL, attention="mla", q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2,
                   v_head_dim=6),
    "biases": replace(SMALL, attention_bias=True, attention_sinks=True, router_bias=True, expert_bias=True),
}  # fmt: skip
TP = {"attention": "tp", "ffn": "tp"}
LAYOUTS: dict[str, tuple[Mesh, dict[str, Any]]] = {
    "one rank": (Mesh(), {}),
    "dp": (Mesh(dp=3), {}),
    "sp ep": (Mesh(node=4, ep=4), {}),
    "sp ep over nodes": (Mesh(dp=2, node=2, ep=4), {}),
    "ep within dp": (Mesh(dp=4, node=1, ep=2), {}),
    "tp": (Mesh(dp=2, node=4, etp=4), TP),
    "tp ep": (Mesh(node=4, ep=4), {"attention": "tp"}),
    "sharded": (Mesh(dp=2, node=2, ep=2), {"vocabulary": "sharded"}),
    "ep+tp": (Mesh(node=4, ep=2, etp=2), {"ffn": "ep+tp"}),
    "ep+tp over nodes": (Mesh(dp=2, node=2, ep=2, etp=2), {"ffn": "ep+tp", "attention": "tp"}),
    "pp": (Mesh(pp=4), {}),
    "pp uneven": (Mesh(pp=2, dp=2), {"stage_layers": (1, 3)}),
    "pp interleaved tp": (Mesh(pp=2, node=2, etp=2),
                          {**TP, "vocabulary": "sharded", "schedule": "interleaved", "virtual_stages": 2}),
    "all": (Mesh(pp=2, dp=2, node=2, ep=2, etp=2), {"attention": "tp", "ffn": "ep+tp", "vocabulary": "sharded"}),
}  # fmt: skip


def placed_by_rank(config: ModelConfig, layout: str) -> Iterator[tuple[Axes, dict[str, Placement]]]:
    """Of every rank: its axes and its parts."""
    mesh, more = LAYOUTS[layout]
    parallel = ParallelConfig(pp=mesh.pp, dp=mesh.dp, node=mesh.node, ep=mesh.ep, etp=mesh.etp, **more)
    stages = stage_parts(parallel, config)
    for rank in range(mesh.world):
        axes = axes_of(mesh, rank)
        where = Layout.of(parallel, 1, config.sequence_length, axes, torch.float32)
        yield axes, placements(config, where, together(parts_of_rank(stages, mesh.pp, axes["pp"].index)))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape)


def copies(placement: Placement, axes: Axes) -> int:
    """How many ranks hold the part, by the axes that its gradient is summed over."""
    return math.prod(axes[axis].size for axis in placement.replicas if axis)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_cover_every_weight_once_per_replica(model: str, layout: str) -> None:
    config = MODELS[model]
    shapes = parameter_shapes(config)
    times = {name: torch.zeros(math.prod(shape), dtype=torch.int64) for name, shape in shapes.items()}
    wanted: dict[str, set[int]] = {name: set() for name in shapes}
    for axes, placed in placed_by_rank(config, layout):
        for name, placement in placed.items():
            assert placement.whole == shapes[name]
            part = placement.take(numbered(shapes[name]))
            assert part.shape == placement.shape
            times[name] += part.flatten().bincount(minlength=len(times[name]))
            wanted[name].add(copies(placement, axes))
    for name, seen in times.items():
        (count,) = wanted[name]  # every rank says the same
        assert (seen == count).all(), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_the_replica_axes_hold_the_same_part(model: str, layout: str) -> None:
    """Gradients are summed over those ranks element by element: the others of a stage must hold something else."""
    config, (mesh, _) = MODELS[model], LAYOUTS[layout]
    parts = [placed for _, placed in placed_by_rank(config, layout)]
    for rank, mine in enumerate(parts):
        for name, placement in mine.items():
            intra, inter = placement.replicas
            peers = [rank] if not intra else mesh.ranks(intra, rank)
            group = {other for peer in peers for other in (mesh.ranks(inter, peer) if inter else [peer])}
            same = {other for other, placed in enumerate(parts)
                    if name in placed and placed[name].boxes == placement.boxes}  # fmt: skip
            assert same == group, name


def matrices_of(whole: Tensor, heights: tuple[int, ...]) -> list[Tensor]:
    """The matrices of a weight, one expert after the other."""
    return [matrix for each in whole.view(-1, *whole.shape[-2:]) for matrix in each.split(list(heights))]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_matrix_are_where_they_say(model: str, layout: str) -> None:
    """Each is contiguous in the flattened part; the ranks of the axis that cuts it have equal shares of one side."""
    config = MODELS[model]
    heights = parameter_matrices(config)
    for axes, placed in placed_by_rank(config, layout):
        for name, placement in placed.items():
            assert placement.matrices == heights[name]
            whole, flat = numbered(placement.whole), placement.take(numbered(placement.whole)).flatten()
            matrices = matrices_of(whole, heights[name]) if heights[name] else []
            end = 0
            for part in placement.matrix_parts:
                values, end = flat[part.start : part.stop].view(part.size), part.stop
                (matrix,) = [each for each in matrices if each[0, 0] <= values[0, 0] <= each[-1, -1]]
                assert tuple(matrix.shape) == part.shape
                (top, left), (rows_, columns_) = part.offset, part.size
                assert torch.equal(matrix[top : top + rows_, left : left + columns_], values)
                count, index = (axes[placement.cut].size, axes[placement.cut].index) if placement.cut else (1, 0)
                shares = {(part.shape[0] // count, part.shape[1]): (index * part.shape[0] // count, 0),
                          (part.shape[0], part.shape[1] // count): (0, index * part.shape[1] // count)}  # fmt: skip
                assert shares[part.size] == part.offset, name
            assert end == (len(flat) if heights[name] else 0), name  # all of a weight, or nothing


def test_the_matrices_of_a_layer() -> None:
    """Queries, keys and values, gate and up are one matrix each; vectors and the ends of the model are none."""
    inside = {name.split(".", 2)[-1]: rows for name, rows in parameter_matrices(SMALL).items() if ".1." in name}
    assert inside == {
        "attention.qkv.weight": (16, 8, 8), "attention.out.weight": (16,), "attention.q_norm.weight": (),
        "attention.k_norm.weight": (), "attention_norm.weight": (), "ffn_norm.weight": (), "ffn.router.weight": (8,),
        "ffn.experts.w13": (8, 8), "ffn.experts.w2": (16,), "ffn.shared.w13.weight": (16, 16),
        "ffn.shared.w2.weight": (16,), "ffn.shared.gate.weight": (),
    }  # fmt: skip
    whole = parameter_matrices(SMALL)
    assert [name for name, rows in whole.items() if not name.startswith("layers.") and rows] == []
    assert whole["layers.0.ffn.w13.weight"] == (12, 12)
    latent = parameter_matrices(MODELS["mla"])
    assert latent["layers.0.attention.kv_down.weight"] == (8, 2)  # the latent, and the key that all heads share
    assert latent.keys() == parameter_shapes(MODELS["mla"]).keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_is_its_boxes_one_behind_the_other(layout: str) -> None:
    """What checkpoints and the flat buffers rely on."""
    for _, placed in placed_by_rank(SMALL, layout):
        for name, placement in placed.items():
            whole = numbered(placement.whole)
            part, end = placement.take(whole).flatten(), 0
            for (offset, size), start, stop in placement.ranges:
                assert start == end
                end = stop
                box = whole[tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))]
                assert torch.equal(part[start:stop], box.flatten()), name
            assert end == len(part)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_those_of_the_whole_model(model: str, layout: str) -> None:
    """Bit for bit, whatever the layout: else no two layouts could be compared."""
    config = MODELS[model]
    whole = {name: value.detach() for name, value in build(config, seed=3).named_parameters()}
    for _, placed in placed_by_rank(config, layout):
        for name, placement in placed.items():
            value = initial(name, placement, config, seed=3)
            assert value.dtype == torch.float32
            assert torch.equal(value, placement.take(whole[name])), name


def test_a_tensor_parallel_rank_holds_whole_heads_and_matching_halves() -> None:
    """By hand: rank 1 of 2, heads of 2 rows, 8 for queries and 4 each for keys and values; experts 8 wide."""
    config = replace(SMALL, dense_layers=0)
    where = Layout(1, 8, axes_of(Mesh(node=2, etp=2), 1), **TP)
    placed = placements(config, where, together(dict(enumerate(stage_parts(ParallelConfig(), config)))))
    qkv = placed["layers.0.attention.qkv.weight"]
    assert qkv.boxes == (((8, 0), (8, 16)), ((20, 0), (4, 16)), ((28, 0), (4, 16)))
    assert placed["layers.0.attention.out.weight"].boxes == (((0, 8), (16, 8)),)
    w13, w2 = placed["layers.0.ffn.experts.w13"], placed["layers.0.ffn.experts.w2"]
    assert w13.boxes[:3] == (((0, 4, 0), (1, 4, 16)), ((0, 12, 0), (1, 4, 16)), ((1, 4, 0), (1, 4, 16)))
    assert w2.boxes == (((0, 0, 4), (8, 16, 4)),)
    assert placed["layers.0.ffn.shared.w13.weight"].boxes == (((8, 0), (8, 16)), ((24, 0), (8, 16)))
    assert placed["layers.0.ffn.shared.gate.weight"].boxes == (((0, 0), (1, 16)),)  # one row: replicated


def test_the_ways_to_cut_a_weight() -> None:
    whole, both = numbered((6, 4)), ("node", "data")
    assert torch.equal(everything((6, 4), both).take(whole), whole)
    assert torch.equal(rows((6, 4), [range(1, 2), range(4, 6)], both).take(whole), whole[[1, 4, 5]])
    assert torch.equal(columns((6, 4), share(4, 2, 1), both).take(whole), whole[:, 2:])
    assert [list(share(6, 3, index)) for index in range(3)] == [[0, 1], [2, 3], [4, 5]]
