"""Compressed communication of activations: the same gradients within what the formats round, bytes as they say.

Covered by pairs (tests/pairs.py): formats, order, rematerialization, pieces and micro-batches at once meet each other,
every mesh, experts with their dispatch, attention and vocabulary, on those models whose communications differ. That
nothing is misplaced is said by the same in float32 (test_passes.py), with a bound that is 10,000 times as narrow.

Gradients are compared as relative errors of whole tensors. A sum of many elements that were rounded independently, each
by at most u of its size, is off by less than u: BF16 has u = 2^-8 and some ten roundings follow each other in two
layers; E4M3 has u = 2^-4 and 0.026 in the mean square, which is 0.1 after some fifteen roundings. Both bounds leave
room for a factor of about two. A communication that lost or misplaced a part would show as 0.3 and more, see
`test_a_lost_part_would_show`. All experts are chosen: else tokens for which two are nearly as good go to another one,
which is no error of a gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale_moe.comm.axis import Axis, axes_of, connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.comm.traffic import Traffic, as_rows, sum_to
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.engine.cost import Rates
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Cost, Op, Phase, Stream, check
from megascale_moe.engine.wire import FORMATS, chooser, compress, in_format
from megascale_moe.kernels.narrow import BFloat16, Float8
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.testing import run_ranks
from tests.pairs import Case, name_of, pairs
from tests.pipeline import plans
from tests.pipeline.plans import MICROS, ROWS, RULES, overlap_of, run_plan
from tests.pipeline.test_passes import SHARED
from tests.strategies.layouts import compare, fitted, parallel_of, wanted_of
from tests.strategies.test_layouts import CASES as ALONE
from tests.strategies.test_layouts import VARIANTS

PARALLEL = {
    "sp+ep all-to-all": ParallelConfig(dp=1, node=4, dispatch="all_to_all"),
    "sp+ep all-gather": ParallelConfig(dp=1, node=4, dispatch="all_gather"),
    "ep over two nodes": ParallelConfig(dp=2, node=2, ep=4, dispatch="all_to_all"),
    "tp+ep": ParallelConfig(dp=2, node=2, attention="tp", dispatch="all_to_all"),
    "sp+tp": ParallelConfig(dp=1, node=4, ffn="tp"),
    "tp+tp": ParallelConfig(dp=2, node=2, attention="tp", ffn="tp", vocabulary="sharded"),
    "ep x etp": ParallelConfig(dp=1, node=4, ffn="ep+tp", ep=2, etp=2, dispatch="all_to_all"),
    "pipeline": ParallelConfig(pp=2, dp=1, node=2, dispatch="all_gather"),
    "cp+ep": ParallelConfig(dp=1, node=4, attention="cp", dispatch="all_gather"),
}
BOUNDS = {"bf16": (1e-6, 2e-2), "fp8": (1e-4, 0.25)}
FACTORS = {
    **plans.FACTORS, "schedule": ("1f1b",),  # the bounds are for two layers, interleaved has four
    "variant": ("gqa", "one-kv-head", "mla"), "sizes": ("node4", "dp2-node2", "dp4", "pp2-node2"),
    "split": ("none", "2", "4"), "remat": ("none", "paper", "full"), "wire": tuple(BOUNDS),
}  # fmt: skip


def dense(model: ModelConfig) -> ModelConfig:
    """The model with all its experts chosen by every token."""
    return replace(model, top_k=model.experts, top_groups=model.expert_groups)


CASES = pairs(FACTORS, *RULES, beside=ALONE)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients_are_those_of_the_plain_model_within_the_format(case: Case) -> None:
    parallel = parallel_of(case)
    config = dense(fitted(VARIANTS[case["variant"]], parallel))
    mesh = mesh_of(parallel, config, 4)
    formats = WireConfig(activations=case["wire"])  # type: ignore[arg-type]
    results = run_ranks(4, run_plan, config, parallel, overlap_of(case), mesh, formats)
    loss, gradient, name = compare(results, wanted_of(config, ROWS * MICROS * mesh.dp))
    least, most = BOUNDS[case["wire"]]
    assert loss < most / 10
    assert least < gradient < most, name


def plan_of(wire: str, parallel: ParallelConfig, rates: Rates | None = None, **overlap: Any) -> StepPlan:
    axes = axes_of(mesh_of(parallel, SHARED, 4), 1)
    return StepPlan(
        SHARED, parallel, axes, torch.float32, 2, overlap=OverlapConfig(**overlap), profile=Profile(rates or Rates()),
        wire=WireConfig(activations=wire),  # type: ignore[arg-type]
    )  # fmt: skip


def sent(plan: StepPlan) -> dict[tuple[str, Phase], float]:
    """Bytes that the communications of layers declare."""
    return {(op.name, op.phase): op.cost.wire_bytes for op in plan.ops if op.stream != Stream.COMPUTE}


@pytest.mark.parametrize("parallel", PARALLEL)
def test_declared_bytes_are_half_and_payload_plus_scales(parallel: str) -> None:
    """Exactly half in BF16, a quarter plus a byte a row or a channel in FP8; routing and pipeline stay as they are."""
    plain, bf16, fp8 = (sent(plan_of(wire, PARALLEL[parallel])) for wire in ("fp32", "bf16", "fp8"))
    assert plain.keys() == bf16.keys() == fp8.keys()
    compressed = 0
    for (name, phase), size in plain.items():
        if "routing" in name or parse(name).layer is None:
            assert bf16[name, phase] == fp8[name, phase] == size
            continue
        compressed += 1
        assert bf16[name, phase] == size / 2
        assert size / 4 < fp8[name, phase] <= size / 4 * (1 + 1 / 4)  # messages have 4 rows or 16 columns at least
    assert compressed >= 6


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("parallel", ["sp+ep all-to-all", "sp+ep all-gather", "tp+tp", "cp+ep"])
def test_counted_bytes_are_the_declared_ones(parallel: str, wire: str) -> None:
    """Over all ranks routed rows are as many as declared; their FP8 scales are as many as messages have channels."""
    mesh = mesh_of(PARALLEL[parallel], SHARED, 4)
    formats = WireConfig(activations=wire)  # type: ignore[arg-type]
    results = run_ranks(4, run_plan, SHARED, PARALLEL[parallel], OverlapConfig(), mesh, formats)
    plan = plan_of(wire, PARALLEL[parallel])
    for (name, phase), size in sent(plan).items():
        if name.startswith("layers."):
            counted = sum(result.wire[name, phase] for result in results)
            assert counted == pytest.approx(4 * MICROS * size, rel=0.1 if "all_to_all" in name else 1e-12)


def of_message(op: Op, word: str) -> str:
    """The communication that an operator encodes or decodes the messages of; empty for others."""
    name = parse(op.name)
    before, _, tensor = name.tensor.partition(" ")
    return str(name._replace(tensor=tensor)) if before == word else ""


def test_passes_find_the_names_they_need() -> None:
    """Every list is consistent, and what hides a communication hides it still: nothing is waited for at once."""
    for parallel in PARALLEL.values():
        plan = plan_of("fp8", parallel, order="scheduled", remat="paper")
        check(plan.ops, plan.program().given)
    ops = plan_of("fp8", PARALLEL["sp+ep all-to-all"], order="paper").ops
    places = {(op.name, op.phase): place for place, op in enumerate(ops)}
    gaps = [
        place - places[moved, op.phase]
        for place, op in enumerate(ops)
        if (moved := of_message(op, "decode"))
    ]
    assert max(gaps) > 1


# --- what is chosen --------------------------------------------------------------------------------------------------


def formats(plan: StepPlan) -> int:
    return sum(bool(of_message(op, "encode")) for op in plan.ops)


def test_auto_compresses_where_the_link_is_the_bottleneck() -> None:
    parallel = PARALLEL["sp+ep all-to-all"]
    slow = Rates(links={Stream.INTRA: 1e6, Stream.INTER: 1e6})
    fast = Rates(links={Stream.INTRA: 1e13, Stream.INTER: 1e13}, latency=0.0)
    everything = formats(plan_of("fp8", parallel))
    assert formats(plan_of("auto", parallel, slow)) == everything > 0
    assert formats(plan_of("auto", parallel, fast)) == 0
    assert formats(plan_of("fp32", parallel, slow)) == 0


def test_auto_chooses_for_each_communication() -> None:
    """Slow links between nodes, fast ones inside: only what leaves the node is compressed."""
    parallel = PARALLEL["ep over two nodes"]
    rates = Rates(links={Stream.INTRA: 1e13, Stream.INTER: 1e6}, latency=0.0)
    ops = plan_of("auto", parallel, rates).ops
    names = {name for op in ops if (name := of_message(op, "encode"))}
    streams = {op.stream for op in ops if op.name in names}
    assert streams == {Stream.INTER}


def test_bf16_does_not_compress_bf16() -> None:
    plan = replace(plan_of("bf16", PARALLEL["tp+tp"]), dtype=torch.bfloat16)
    assert formats(plan) == 0
    assert formats(replace(plan, wire=WireConfig(activations="fp8"))) > 0


def test_gates_come_behind_fc2_in_fp8_runs() -> None:
    parallel = PARALLEL["sp+ep all-to-all"]
    reads = {wire: next(op.reads for op in plan_of(wire, parallel).ops if op.name == "layers.0.fc2")
             for wire in ("fp32", "bf16", "fp8")}  # fmt: skip
    assert "0/layers.0.gate_all" in reads["fp8"]
    assert "0/layers.0.gate_all" not in reads["fp32"] + reads["bf16"]


# --- messages --------------------------------------------------------------------------------------------------------


def exchange_op(axis: Axis, sizes: list[list[int]], width: int, *, sums: bool = False) -> Op:
    """Rank i sends sizes[i][j] rows to rank j; reads "x" and "sizes"."""
    me = axis.index
    traffic = Traffic(
        axis=axis, tag=7, pack=lambda x, sizes: x.split(sizes[me]),
        shapes=lambda sizes: [(row[me], width) for row in sizes], plan=(1,), typical=(1, width), dtype=torch.float32,
        finish=sum_to(torch.float32) if sums else as_rows, sums=sums,
    )  # fmt: skip
    return Op(name="layers.0.move", reads=("x", "sizes"), writes=("y",), run=traffic.start, stream=Stream.INTRA,
              traffic=traffic, cost=Cost(wire_bytes=4.0 * width, axis=axis.name))  # fmt: skip


def run_exchange(sizes: list[list[int]], form: str, sums: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(uncompressed, compressed, bytes sent) on this rank."""
    axis = connect(Mesh(node=4))["node"]
    op = exchange_op(axis, sizes, 48, sums=sums)
    x = torch.randn(sum(sizes[dist.get_rank()]), 48, generator=torch.Generator().manual_seed(dist.get_rank()))
    plain = op.run(x, sizes).wait().clone()
    encode, move, decode = in_format(op, FORMATS[form][0])
    pending = move.run(encode.run(x, sizes), sizes)
    return plain, decode.run(pending.wait(), sizes), pending.wire_bytes


@pytest.mark.parametrize("form", FORMATS)
def test_uneven_splits_and_empty_messages(form: str) -> None:
    sizes = [[3, 0, 5, 130], [0, 0, 0, 0], [1, 257, 0, 2], [4, 4, 0, 1]]
    bytes_of = FORMATS[form][0].size
    for rank, (plain, compressed, wire) in enumerate(run_ranks(4, run_exchange, sizes, form, False)):
        assert plain.shape == compressed.shape
        assert (plain - compressed).abs().max().item() < 0.5 if plain.numel() else True
        own = slice(sum(sizes[r][rank] for r in range(rank)), sum(sizes[r][rank] for r in range(rank + 1)))
        assert torch.equal(plain[own], compressed[own])  # what stays on a rank is not rewritten
        assert wire == sum(bytes_of(rows, 48) for peer, rows in enumerate(sizes[rank]) if peer != rank)


def test_sums_are_float32_sums_of_what_arrived() -> None:
    sizes = [[6] * 4] * 4
    form = Float8("rows")
    inputs = [torch.randn(24, 48, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    for rank, (_, compressed, _) in enumerate(run_ranks(4, run_exchange, sizes, "fp8", True)):
        total = torch.zeros(6, 48)
        for peer, x in enumerate(inputs):
            part = x[6 * rank : 6 * rank + 6]
            total += part if peer == rank else form.decode(form.encode(part), torch.empty_like(part))
        assert torch.equal(compressed, total)


def test_a_lost_part_would_show() -> None:
    """The bound on FP8 gradients is well below what a wrong operator does: here one that returns no expert's result."""
    wanted = wanted_of(SHARED, 2)
    gradient = wanted.gradients["layers.0.ffn.experts.w2"]
    half = gradient.clone()
    half[::4] = 0  # one of four ranks
    assert ((half - gradient).norm() / gradient.norm()).item() > BOUNDS["fp8"][1]


def test_a_communication_without_traffic_is_left_alone() -> None:
    op = Op(name="layers.0.x", reads=("a",), writes=("b",), run=print, stream=Stream.INTRA)
    assert compress([op], lambda op: BFloat16()) == [op]
    assert chooser("fp8", Rates().seconds)(op) is None
