"""Which rank sits where, as pure arithmetic, and what `mesh_of` refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megascale_moe.comm.axis import axes_of, single
from megascale_moe.comm.mesh import AXES, Mesh
from megascale_moe.config import ConfigError, ModelConfig, ParallelConfig
from megascale_moe.strategies.fit import mesh_of

MODEL = ModelConfig(heads=8, experts=8, sequence_length=64)

MESHES = [
    Mesh(),
    Mesh(dp=3),
    Mesh(node=4, ep=4),
    Mesh(dp=2, node=2, ep=2),
    Mesh(dp=4, node=2, ep=4),  # expert parallelism over two nodes
    Mesh(dp=4, node=2, ep=8),  # over all four
    Mesh(dp=2, node=4, ep=1),
    Mesh(pp=3, dp=2, node=2, ep=4),
    Mesh(pp=15, dp=12, node=8, ep=8),  # the paper's 1,440 GPUs
    Mesh(dp=2, node=4, ep=1, etp=4),  # tensor parallelism alone
    Mesh(pp=2, dp=4, node=2, ep=2, etp=4),
    Mesh(dp=2, cp=2, node=2, ep=2),  # sequences over two nodes, experts in one
    Mesh(pp=2, cp=3, node=2, ep=6),
    Mesh(dp=2, cp=4, ep=8),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_groups_of_an_axis_hold_every_rank_once(mesh: Mesh, axis: str) -> None:
    groups = mesh.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
    if axis != "tied" or mesh.pp <= 2:  # stages between the first and the last share no embedding
        assert len({len(group) for group in groups}) == 1
    assert all(mesh.ranks(axis, rank) == group for group in groups for rank in group)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sizes_of_axes(mesh: Mesh) -> None:
    sizes = {axis: len(mesh.ranks(axis, mesh.world - 1)) for axis in AXES}
    assert sizes == {
        "node": mesh.node, "ffn": mesh.ep * mesh.etp, "ep": mesh.ep, "etp": mesh.etp, "cp": mesh.cp,
        "sequence": mesh.cp * mesh.node, "data": mesh.dp * mesh.cp * mesh.node,
        "expert_data": mesh.stage // (mesh.ep * mesh.etp), "tensor_data": mesh.dp * mesh.cp,
        "tied": mesh.dp * mesh.cp * min(mesh.pp, 2), "pp": mesh.pp,
        "world": mesh.pp * mesh.dp * mesh.cp * mesh.node,
    }  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_expert_is_held_once_along_ep_and_synchronised_along_expert_data(mesh: Mesh) -> None:
    """ffn x expert_data is the stage, ep x etp is ffn: two ranks that share both factors are the same rank."""
    for rank in range(mesh.world):
        assert set(mesh.ranks("ffn", rank)) & set(mesh.ranks("expert_data", rank)) == {rank}
        assert set(mesh.ranks("ep", rank)) & set(mesh.ranks("etp", rank)) == {rank}
        assert {peer for ep in mesh.ranks("ep", rank) for peer in mesh.ranks("etp", ep)} == set(mesh.ranks("ffn", rank))
        assert set(mesh.ranks("node", rank)) & set(mesh.ranks("tensor_data", rank)) == {rank}
        assert set(mesh.ranks("node", rank)) <= set(mesh.ranks("data", rank))


def test_groups_of_eight_ranks() -> None:
    mesh = Mesh(dp=4, node=2, ep=4)
    assert mesh.groups("node") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert mesh.groups("ep") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert mesh.groups("expert_data") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert mesh.groups("data") == [tuple(range(8))]
    assert Mesh(pp=2, dp=2, node=2, ep=2).groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_groups_of_sequences_that_two_nodes_share() -> None:
    mesh = Mesh(dp=2, cp=2, node=2, ep=2)
    assert mesh.groups("sequence") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert mesh.groups("cp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert mesh.groups("node") == mesh.groups("ffn") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert mesh.groups("tensor_data") == [(0, 2, 4, 6), (1, 3, 5, 7)]  # two nodes add to one sum, whatever they share
    assert [mesh.replica(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_groups_of_experts_that_are_cut_too() -> None:
    mesh = Mesh(pp=3, dp=2, node=4, ep=2, etp=2)
    assert mesh.groups("etp")[:2] == [(0, 1), (2, 3)]
    assert mesh.groups("ep")[:2] == [(0, 2), (1, 3)]
    assert mesh.groups("expert_data")[:2] == [(0, 4), (1, 5)]
    assert mesh.ranks("tied", 1) == mesh.ranks("tied", 21) == (1, 5, 17, 21)
    assert mesh.ranks("tied", 9) == (9,)  # between the first and the last stage there is no embedding


def test_axes_of_a_rank_without_a_process_group() -> None:
    axes = axes_of(Mesh(pp=2, dp=2, node=2, ep=2), 6)
    found = {name: (axes[name].size, axes[name].index) for name in ("pp", "node", "tensor_data", "data", "world")}
    assert found == {"pp": (2, 1), "node": (2, 0), "tensor_data": (2, 1), "data": (4, 2), "world": (8, 6)}
    assert all(axis.group is None for axis in axes.values())


def test_unknown_axis() -> None:
    with pytest.raises(KeyError, match="tp"):
        Mesh().ranks("tp", 0)


def test_single_has_every_axis_without_a_group() -> None:
    assert {name: (axis.size, axis.index, axis.group) for name, axis in single().items()} == dict.fromkeys(
        AXES, (1, 0, None)
    )


@pytest.mark.parametrize(
    ("given", "world", "sizes"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (1, 4, 4)),
        ({"node": 2}, 4, (2, 2, 2)),
        ({"dp": 2}, 4, (2, 2, 2)),
        ({"ep": 2}, 8, (4, 2, 2)),
        ({"node": 2, "ep": 8}, 8, (4, 2, 8)),
        ({"node": 1, "ep": 4}, 4, (4, 1, 4)),
        ({"dp": 4, "node": 2, "ep": 4}, 8, (4, 2, 4)),
        ({"pp": 2}, 8, (1, 4, 4)),
        ({"pp": 2, "dp": 2}, 8, (2, 2, 2)),
        ({"node": 4, "ffn": "tp"}, 8, (2, 4, 1)),
        ({"node": 4, "ffn": "ep+tp", "etp": 2}, 8, (2, 4, 2)),
        ({"node": 2, "ffn": "ep+tp", "etp": 2, "ep": 4}, 8, (4, 2, 4)),
        ({"ffn": "ep+tp", "etp": 2, "ep": 2}, 8, (2, 4, 2)),
        ({"cp": 2}, 8, (1, 4, 4)),
        ({"cp": 2, "dp": 2}, 8, (2, 2, 2)),
        ({"cp": 2, "ep": 2}, 8, (2, 2, 2)),
        ({"cp": 2, "node": 2, "ep": 8}, 8, (2, 2, 8)),
        ({"cp": 4, "node": 1, "pp": 2}, 8, (1, 1, 1)),
    ],
)
def test_mesh_of_works_out_what_is_left_open(given: dict[str, Any], world: int, sizes: tuple[int, int, int]) -> None:
    mesh = mesh_of(ParallelConfig(**given), MODEL, world)
    assert (mesh.dp, mesh.node, mesh.ep) == sizes
    assert mesh.world == world


@pytest.mark.parametrize(
    ("given", "model", "world", "message"),
    [
        ({"node": 3}, {}, 4, "parallel.node = 3 does not divide the 4 ranks; use one of 1, 2, 4"),
        ({"node": 8}, {}, 4, "parallel.node = 8 does not divide the 4 ranks; use one of 1, 2, 4"),
        ({"ep": 3}, {}, 4, "parallel.ep = 3 does not divide the 4 ranks; use one of 1, 2, 4"),
        ({"dp": 4, "node": 2}, {}, 4, "parallel.dp x parallel.node = 4 x 2 is not the 4 ranks that were started"),
        ({"dp": 3}, {}, 4, "parallel.dp x parallel.node = 3 x 1 is not the 4 ranks that were started"),
        ({"dp": 5}, {}, 2, "parallel.dp x parallel.node = 5 x 1 is not the 2 ranks that were started"),
        ({"node": 2, "ep": 3}, {}, 4, "parallel.ep = 3: must be a multiple of parallel.node = 2"),
        ({"node": 2, "ep": 1}, {}, 4, "parallel.ep = 1: must be a multiple of parallel.node = 2"),
        ({"node": 1, "ep": -2}, {}, 4, "parallel.ep = -2: must be a multiple of parallel.node = 1"),
        ({"node": 2, "ep": 6}, {}, 4, "that divides the 4 ranks"),
        ({"pp": 3}, {}, 4, "parallel.pp = 3 does not divide the 4 ranks; use one of 1, 2, 4"),
        ({"pp": 2, "node": 4}, {}, 4, "parallel.node = 4 does not divide the 2 ranks of a pipeline stage; use one of"),
        ({"etp": 2}, {}, 4, "parallel.etp = 2 needs parallel.ffn = 'ep+tp'"),
        ({"ffn": "tp", "ep": 2}, {}, 4, "parallel.ep = 2 with parallel.ffn = 'tp': use 1, or ffn = 'ep+tp'"),
        ({"ffn": "tp", "etp": 2, "node": 4}, {}, 4, "parallel.etp = 2 with parallel.ffn = 'tp': every rank of a node"),
        ({"ffn": "tp", "dispatch": "all_to_all"}, {}, 4, "with parallel.ffn = 'tp': use 'all_gather'"),
        ({"ffn": "ep+tp", "ep": 3, "etp": 2, "node": 4}, {}, 8,
         "parallel.ep x parallel.etp = 6: must be a multiple of parallel.node = 4 that divides the 8 ranks of a stage; "
         "use one of 4, 8"),
        ({"attention": "tp"}, {"kv_heads": 2}, 4, "model.kv_heads = 2 is not divisible by parallel.node = 4; use one "
         "of 1, 2 (or parallel.attention = 'sp')"),
        ({"attention": "tp", "node": 2}, {"qk_norm": "full"}, 4, "model.qk_norm = 'full' spans them; use attention"),
        ({"ffn": "tp"}, {"ffn_hidden": 30}, 4, "model.ffn_hidden = 30 is not divisible by parallel.node = 4"),
        ({"ffn": "tp"}, {"ffn_hidden": 32, "shared_ffn_hidden": 30}, 4, "the width of the shared experts = 30 is not"),
        ({"vocabulary": "sharded"}, {"vocab": 30}, 4, "model.vocab = 30 is not divisible by parallel.node = 4; use one "
         "of 1, 2, 3, 5, 6, 10, 15, 30 (or parallel.vocabulary = 'replicated')"),
        ({}, {"sequence_length": 62}, 4, "model.sequence_length = 62 is not divisible by parallel.node = 4"),
        ({"cp": 3}, {}, 4, "parallel.cp = 3 does not divide the 4 nodes of 1 ranks; use one of 1, 2, 4"),
        ({"cp": 2, "node": 4}, {}, 4, "parallel.cp = 2 does not divide the 1 nodes of 4 ranks; use one of 1"),
        ({"cp": 2, "node": 2, "dp": 2}, {}, 4, "parallel.dp x parallel.cp x parallel.node = 2 x 2 x 2 is not the 4 "
         "ranks that were started; use dp = 1"),
        ({"cp": 2, "node": 2}, {"sequence_length": 36}, 4, "model.sequence_length = 36 is not divisible by "
         "2 x parallel.cp x parallel.node = 8; use one of 1, 2, 3, 4, 6, 9, 12, 18, 36"),
        ({"cp": 3, "node": 2, "ep": 4}, {"sequence_length": 48}, 12, "parallel.ep x parallel.etp = 4 with parallel.cp "
         "x parallel.node = 3 x 2: one must be a multiple of the other; use an ep x etp of 2 or a multiple of 6"),
        ({}, {"heads": 6}, 4, "model.heads = 6 is not divisible by parallel.node = 4; use one of 1, 2, 3, 6"),
        ({}, {"experts": 6}, 4, "model.experts = 6 is not divisible by parallel.ep = 4; use one of 1, 2, 3, 6"),
    ],
)
def test_mesh_of_refuses_in_one_line(given: dict[str, Any], model: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        mesh_of(ParallelConfig(**given), replace(MODEL, **model), world)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
