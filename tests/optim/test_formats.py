"""Gradients and weights in narrower formats: bits of the sums, what every rank ends up with, bytes and memory.

Meshes, formats, dtypes and sizes of chunks are covered by pairs (tests/pairs.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import WireConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.trace import Trace
from megascale_moe.kernels.narrow import BLOCK, BFloat16, Float8, Format
from megascale_moe.optim.flat import FlatWeights, Formats
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.narrow_sums import CAST, FORMS
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.optim.sync import CHUNK, arrived, gather_job, given, pipelined, reduce, shard_of, updated
from megascale_moe.strategies.placement import everything
from megascale_moe.testing import run_ranks
from tests.optim.test_sharded import CONFIG
from tests.optim.test_sync import gather_ops
from tests.pairs import Case, name_of, pairs

MESHES = {"dp2-node2": Mesh(dp=2, node=2), "node3": Mesh(node=3), "dp2": Mesh(dp=2)}
CHUNKS = {"one": CHUNK, "several": 200}
PLACES = {"a": everything((13, 5), ("node", "tensor_data")), "b": everything((24, 30), ("node", "tensor_data"))}
PARAMETERS: dict[str, Format | None] = {"fp32": None, "bf16": BFloat16(), "fp8": Float8("rows")}


def flat(
    mesh: Mesh, gradients: str = "fp32", parameters: str = "fp32", dtype: torch.dtype = torch.float32
) -> FlatWeights:
    axes = connect(mesh)
    return FlatWeights(
        PLACES, axes["node"], axes["tensor_data"], decay=True, dtype=dtype, device=torch.device("cpu"),
        formats=Formats(gradients, PARAMETERS[parameters]),
    )  # fmt: skip


def gradient(size: int, rank: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


# --- gradients -------------------------------------------------------------------------------------------------------


def sum_on_rank(mesh: Mesh, gradients: str, chunk: int) -> tuple[Tensor, slice, Tensor, int]:
    """(this rank's sums, its shard, the gradient it had, bytes sent); padding held zeros and must count as such."""
    group = flat(mesh, gradients)
    mine = torch.zeros_like(group.gradients)
    for slot in group.slots:
        mine[slot.start : slot.stop] = gradient(slot.stop - slot.start, dist.get_rank())
    for _ in range(2):  # the second time, the buffer holds what the first left
        for slot in group.slots:
            group.gradients[slot.start : slot.stop] = mine[slot.start : slot.stop]
        trace = Trace()
        values = Program(reduce([group], chunk), given([group]), [shard_of(group)]).run(given([group]), {}, trace=trace)
        found = resolve(values, shard_of(group))
    return found, group.shard, mine, sum(trace.wire_bytes().values())


def rounded(x: Tensor, gradients: str) -> Tensor:
    """Each part that travels, as it arrives."""
    if gradients == "bf16":
        return x.bfloat16().float()
    rows = x.view(-1, BLOCK)
    return Float8("rows").decode(Float8("rows").encode(rows), torch.empty_like(rows)).flatten()


SUMS = {"mesh": tuple(MESHES), "gradients": ("bf16", "fp8"), "chunks": tuple(CHUNKS)}


@pytest.mark.parametrize("case", pairs(SUMS), ids=name_of)
def test_sums_are_float32_sums_of_rounded_terms(case: Case) -> None:
    """Bit for bit: rounded once, summed in rank order inside the node, rounded once more, summed over nodes."""
    mesh, gradients = MESHES[case["mesh"]], case["gradients"]
    results = run_ranks(mesh.world, sum_on_rank, mesh, gradients, CHUNKS[case["chunks"]])
    nodes = []
    for node in range(mesh.dp):
        terms = [results[node * mesh.node + place][2] for place in range(mesh.node)]
        nodes.append(sum_of([rounded(term, gradients) for term in terms] if mesh.node > 1 else terms))
    wanted = sum_of([rounded(node, gradients) for node in nodes] if mesh.dp > 1 else nodes)
    for found, shard, _, _ in results:
        assert torch.equal(found, wanted[shard])


def sum_of(terms: list[Tensor]) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_bytes_are_half_and_a_quarter_plus_scales(mesh: Mesh) -> None:
    sent = {form: [r[3] for r in run_ranks(mesh.world, sum_on_rank, mesh, form, CHUNK)] for form in ("bf16", "fp8")}
    size = 13 * 5 + 24 * 30
    for form, unit in (("bf16", 16), ("fp8", BLOCK)):
        padded = -(-(-(-65 // 16) * 16 + 720) // (unit * mesh.world)) * unit * mesh.world
        assert padded >= size
        per_element = FORMS[form].element
        wanted = padded * (1 - 1 / mesh.node) + padded / mesh.node * (1 - 1 / mesh.dp)
        assert sent[form] == pytest.approx([per_element * wanted] * mesh.world, rel=1e-12)


def ring_on_rank(mesh: Mesh) -> tuple[Tensor, slice, Tensor, int]:
    return sum_on_rank(mesh, "bf16_ring", CHUNK)


def test_the_ring_rounds_at_every_hop() -> None:
    """The bad example is a real ring: rank r's part starts behind r, and every rank adds in BF16."""
    results = run_ranks(4, ring_on_rank, Mesh(node=4))
    terms = [result[2].bfloat16() for result in results]
    for rank, (found, shard, _, sent) in enumerate(results):
        total = terms[(rank + 1) % 4][shard]
        for hop in range(2, 5):
            total = total + terms[(rank + hop) % 4][shard]
        assert torch.equal(found, total.float())
        assert sent == 2 * 3 * (shard.stop - shard.start)


def memory_on_rank(gradients: str) -> int:
    """The most bytes that a reduction takes beside the buffers that are there anyway."""
    axes = connect(Mesh(node=2))
    places = {"a": everything((1 << 21,), ("node", "tensor_data"))}
    group = FlatWeights(places, axes["node"], axes["tensor_data"], decay=False, dtype=torch.float32,
                        device=torch.device("cpu"), formats=Formats(gradients))  # fmt: skip
    program = Program(reduce([group], chunk=1 << 40), given([group]), [shard_of(group)])
    with Meter() as meter:
        values = program.run(given([group]), {})
        resolve(values, shard_of(group))
    return meter.peak


@pytest.mark.bulky
def test_casting_in_place_takes_no_memory_but_the_sum(torch_compiler: None) -> None:
    """What comes lies in the half of the buffer that the cast left; float32 needs a second buffer instead."""
    size = 1 << 21
    assert max(run_ranks(2, memory_on_rank, "bf16")) <= 4 * size // 2 + 2 * CAST
    assert min(run_ranks(2, memory_on_rank, "fp32")) >= 4 * size


# --- weights ---------------------------------------------------------------------------------------------------------


def gather_on_rank(mesh: Mesh, parameters: str, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor, slice]:
    """(all weights as this rank has them, its masters, its shard), by the list behind a step and by the hidden one."""
    group = flat(mesh, parameters=parameters, dtype=dtype)
    group.master.copy_(gradient(len(group.weights), 0)[group.shard])
    for ops in (
        [replace(op, run=lambda: updated([group])["weights.updated"]) if op.name.startswith("update.") else op
         for op in gather_ops([group], chunk)],
        [*pipelined([gather_job(group)]), arrived(group)],
    ):  # fmt: skip
        group.weights.fill_(-1.0)
        hidden = not any(op.name.startswith("update.") for op in ops)
        Program(ops, updated([group]) if hidden else {}).run(dict(updated([group])) if hidden else {}, {})
        if not hidden:
            first = group.weights.clone()
    assert torch.equal(first, group.weights)
    return group.weights, group.master, group.shard


WEIGHTS = {
    "mesh": ("dp2-node2", "node3"), "parameters": ("bf16", "fp8"), "dtype": ("float32", "bfloat16"),
    "chunks": tuple(CHUNKS),
}  # fmt: skip


@pytest.mark.parametrize("case", pairs(WEIGHTS), ids=name_of)
def test_all_ranks_have_the_same_rounded_weights(case: Case) -> None:
    """Also the rank whose shard it is; it keeps the exact ones beside."""
    mesh, parameters, dtype = MESHES[case["mesh"]], case["parameters"], getattr(torch, case["dtype"])
    results = run_ranks(mesh.world, gather_on_rank, mesh, parameters, dtype, CHUNKS[case["chunks"]])
    exact = gradient(len(results[0][0]), 0)
    wanted = rounded(exact, parameters).to(dtype)
    for weights, master, shard in results:
        assert torch.equal(weights, wanted)
        assert torch.equal(master, exact[shard])


# --- a whole update --------------------------------------------------------------------------------------------------


def update_on_rank(mesh: Mesh, wire: WireConfig) -> tuple[float, float, Tensor]:
    """(norm as the optimizer has it, as the shards' sums have it, this rank's masters)."""
    axes = connect(mesh)
    groups = flat_groups(PLACES, axes, torch.float32, torch.device("cpu"), wire=wire)
    optimizer = ShardedOptimizer(groups, axes, replace(CONFIG, clip_norm=0.5), 200)
    (group,) = groups
    for name, sink in optimizer.gradients.items():
        sink.add(gradient(sink.buffer.numel(), dist.get_rank()).view(PLACES[name].shape))
    sums = resolve(
        Program(reduce([group]), given([group]), [shard_of(group)]).run(given([group]), {}), shard_of(group)
    ).clone()
    squares = sums.double().square().sum()
    dist.all_reduce(squares)
    optimizer.end(0.0)
    for name, sink in optimizer.gradients.items():
        sink.add(gradient(sink.buffer.numel(), dist.get_rank()).view(PLACES[name].shape))
    return optimizer.step(1e-2), float(squares.sqrt()), group.master


@pytest.mark.parametrize(
    "wire", [{"gradients": "bf16"}, {"gradients": "fp8", "parameters": "fp8"}, {"gradients": "auto"}], ids=str
)
def test_clipping_is_by_the_exact_norm_of_what_was_summed(wire: dict[str, Any]) -> None:
    mesh = Mesh(dp=2, node=2)
    formats = WireConfig(**wire)
    plain = run_ranks(4, update_on_rank, mesh, WireConfig())
    for (norm, exact, master), (plain_norm, _, wanted) in zip(
        run_ranks(4, update_on_rank, mesh, formats), plain, strict=True
    ):
        assert norm == pytest.approx(exact, rel=1e-6)
        assert norm != plain_norm
        assert norm == pytest.approx(plain_norm, rel=0.01)
        if len(master) == len(wanted):  # FP8 shards are padded to whole blocks
            assert (master - wanted).abs().max() <= 2e-2  # the first step of AdamW is the sign of the gradient


def test_without_replicas_nothing_is_rounded() -> None:
    """Nothing travels, so there is nothing to write in fewer bytes."""
    axes = single()
    group = FlatWeights(PLACES, axes["node"], axes["tensor_data"], decay=True, dtype=torch.float32,
                        device=torch.device("cpu"), formats=Formats("bf16", BFloat16()))  # fmt: skip
    assert group.shares_memory
    assert group.formats == Formats()
