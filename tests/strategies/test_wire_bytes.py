"""Bytes on the wire and FLOPs: what the operators declare, what runs, and the paper's formulas are the same numbers.

Volumes per rank, in elements, for b rows of s tokens of width h on n ranks (paper, section 3):

    attention, sequence parallel    (2 + 2/m) bsh (n-1) / n^2
    attention, tensor parallel      2 bsh (n-1) / n
    FFN, tensor parallel            2 bsh (n-1) / n
    experts, all-to-all             k/n bsh (n-1) / n each way, routing balanced
    experts, all-gather             bsh (n-1) / n each way

and where the paper has none, ours: n = ep x etp, whose etp ranks share every expert's width, and the vocabulary over n:

    experts, all-to-all             bsh/n k ((ep-1)/ep + etp-1) each way: to the experts' ranks, then on to their peers
    embedding, before the head      bsh (n-1) / n each
    softmax over n parts            3 numbers of 4 bytes for each of bs tokens to n-1 ranks
    latent attention, tp            as tp, but what comes in are latents instead of h: bs (n-1) / n of their widths
    attention, context parallel     bs (n-1) / n of the width of all keys and values, (2/m) bsh (n-1) / n where heads
                                    have equal widths; of that of the latents where keys and values are made of them
    the same between N nodes        that again, and N - 1 times over: each of N n ranks sends the keys and values that
                                    it has to the ranks with its place in other nodes, bs/(nN) (N-1) of the width of
                                    all keys and values; then, if attention is context-parallel in the node too, N
                                    times as much to the n - 1 ranks of its node
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.axis import axes_of, connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.engine.op import Op, Phase, Stream
from megascale_moe.model.counts import attention_flops_per_token, counts
from megascale_moe.model.transformer import build
from megascale_moe.presets import PRESETS
from megascale_moe.strategies import routing
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import model_ops
from megascale_moe.strategies.registry import RELATIVE_COST, cheapest_dispatch
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import random_rows, run_rank

ROWS = 2
CONFIG = ModelConfig(
    layers=1, hidden=32, heads=8, kv_heads=4, experts=8, top_k=2, ffn_hidden=24, vocab=64, sequence_length=16
)
Bytes = dict[tuple[str, Phase], float]
Wire = dict[tuple[str, Any], int]


def layout(
    c: ModelConfig, n: int, dispatch: str = "auto", rows: int = ROWS, dtype: torch.dtype = torch.float32
) -> Layout:
    """Experts by index on a node of n ranks."""
    return Layout(rows, c.sequence_length, axes_of(Mesh(node=n, ep=n), 0), dtype, dispatch)


def strategy(c: ModelConfig, mesh: Mesh, rank: int = 0, **strategies: str) -> Layout:
    """As the cost functions see any other layout; no process group."""
    return Layout(ROWS, c.sequence_length, axes_of(mesh, rank), **strategies)


def declared(c: ModelConfig, where: Layout) -> Bytes:
    """Bytes of the communication operators in forward and backward."""
    ops = [op for forward in model_ops(c, where) for op in (forward, *forward.backward) if op.stream != Stream.COMPUTE]
    return {(op.name.removeprefix("layers.0."), op.phase): op.cost.wire_bytes for op in ops}


# --- declared equals the paper ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.F, Phase.B])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (2, 4)])
def test_sequence_parallel_attention(n: int, m: int, phase: Phase) -> None:
    c = replace(CONFIG, kv_heads=8 // m)
    found = declared(c, layout(c, n))
    bsh = ROWS * c.sequence_length * c.hidden
    elements = (found["scatter_heads", phase] + found["gather_heads", phase]) / 4
    assert elements == pytest.approx((2 + 2 / m) * bsh * (n - 1) / n**2, rel=1e-12)  # the same fractions, rounded once


@pytest.mark.parametrize("name", ["paper-internal-352b", "paper-mixtral-8x7b"])
def test_ratio_to_tensor_parallel_attention(name: str) -> None:
    """The paper's factor (2 + 2/m) / n is 0.3125 at n = 8, m = 4.

    It stands beside bsh (n-1) / n, what one collective of tensor parallelism moves. Tensor parallelism needs two, an
    all-gather and a reduce-scatter, so counted in elements sent on both sides the advantage is twice that: 0.15625.
    """
    c = replace(PRESETS[name], layers=1)
    found = declared(c, layout(c, 8, rows=1, dtype=torch.bfloat16))
    one_collective = c.sequence_length * c.hidden * 7 / 8
    elements = (found["scatter_heads", Phase.F] + found["gather_heads", Phase.F]) / 2
    assert elements / one_collective == 0.3125
    assert elements / (2 * one_collective) == 0.15625


def test_more_ranks_than_key_heads_send_copies_of_them() -> None:
    """Every rank needs at least one key head, so beyond n = kv_heads the formula is a lower bound."""
    c = replace(CONFIG, kv_heads=2)
    elements = declared(c, layout(c, 4))["scatter_heads", Phase.F] / 4
    tokens, width = ROWS * 16 // 4, 4  # of a head
    assert elements == tokens * (2 + 1 + 1) * width * 3  # two query heads, a key and a value head to 3 peers


@pytest.mark.parametrize("phase", [Phase.F, Phase.B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (2, 2), (4, 2), (8, 6), (8, 8)])
def test_experts(n: int, k: int, dtype: torch.dtype, phase: Phase) -> None:
    c = replace(CONFIG, top_k=k, kv_heads=8)
    bsh = ROWS * c.sequence_length * c.hidden
    by_peer = declared(c, layout(c, n, "all_to_all", dtype=dtype))
    gathered = declared(c, layout(c, n, "all_gather", dtype=dtype))
    for name in ("dispatch_all_to_all", "combine_all_to_all"):
        assert by_peer[name, phase] == pytest.approx(dtype.itemsize * k / n * bsh * (n - 1) / n, rel=1e-12)
    for name in ("dispatch_all_gather", "combine_reduce_scatter"):
        assert gathered[name, phase] == pytest.approx(dtype.itemsize * bsh * (n - 1) / n, rel=1e-12)
    # Routing is k indices and k weights of 4 bytes per token to every peer, and in backward the weights' gradients.
    routing = (8 if phase == Phase.F else 4) * k * ROWS * c.sequence_length // n * (n - 1)
    assert by_peer["gather_routing", phase] == gathered["gather_routing", phase] == routing


BOTH = [Phase.F, Phase.B]


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_tensor_parallel_attention(n: int, phase: Phase) -> None:
    c = replace(CONFIG, kv_heads=8)
    found = declared(c, strategy(c, Mesh(node=n, ep=n), attention="tp"))
    bsh = ROWS * c.sequence_length * c.hidden
    assert found["gather_tokens", phase] == found["scatter_tokens", phase] == 4 * bsh * (n - 1) / n
    assert ("scatter_heads", phase) not in found


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize(("n", "kv_heads"), [(2, 4), (4, 1), (4, 8), (8, 2)])
def test_context_parallel_attention(n: int, kv_heads: int, phase: Phase) -> None:
    """Every key head travels once, also where there are fewer than ranks; there is no second message."""
    c = replace(CONFIG, kv_heads=kv_heads)
    found = declared(c, strategy(c, Mesh(node=n, ep=n), attention="cp"))
    bsh, m = ROWS * c.sequence_length * c.hidden, c.heads // kv_heads
    assert found.pop(("gather_keys", phase)) == 4 * 2 / m * bsh * (n - 1) / n
    experts = declared(c, strategy(c, Mesh(node=n, ep=n)))
    assert {key for key in found if key[1] == phase} == {
        key for key in experts if key[1] == phase and key[0] not in ("scatter_heads", "gather_heads")
    }


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize(("nodes", "n"), [(2, 1), (2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("attention", ["sp", "tp", "cp"])
def test_keys_travel_between_nodes(attention: str, nodes: int, n: int, phase: Phase) -> None:
    """Each slice passes the link between nodes once for each node that needs it, whatever attention is in a node."""
    c, m = replace(CONFIG, kv_heads=4), 2
    found = declared(c, strategy(c, Mesh(cp=nodes, node=n, ep=n), attention=attention))
    bsh = ROWS * c.sequence_length * c.hidden
    between = 4 * 2 / m * bsh / (nodes * n) * (nodes - 1)
    if attention == "cp" and n > 1:
        assert found["gather_keys_of_nodes", phase] == between
        assert found["gather_keys", phase] == 4 * 2 / m * bsh * (n - 1) / n
    else:
        assert found["gather_keys", phase] == between
        assert ("gather_keys_of_nodes", phase) not in found
    if attention == "sp" and n > 1:  # of a node's share of the tokens
        elements = (found["scatter_heads", phase] + found["gather_heads", phase]) / 4
        assert elements == pytest.approx((2 + 2 / m) * bsh / nodes * (n - 1) / n**2, rel=1e-12)


def test_routing_of_whole_sequences_travels_where_balance_or_capacity_ask_for_it() -> None:
    """8 bytes an assignment to all ranks that share a sequence, once; nothing of it where the experts' ranks do."""
    tokens, sent = ROWS * CONFIG.sequence_length // 4, ("gather_sequences", Phase.F)
    for c in (replace(CONFIG, balance_loss=0.1), replace(CONFIG, z_loss=0.1), replace(CONFIG, capacity_factor=1.5)):
        found = declared(c, strategy(c, Mesh(cp=2, node=2, ep=2)))
        assert found[sent] == 8 * CONFIG.top_k * tokens * 3
        assert found["gather_routing", Phase.F] == 8 * CONFIG.top_k * tokens
        assert sent not in declared(c, strategy(c, Mesh(cp=2, node=2, ep=4)))
    assert sent not in declared(CONFIG, strategy(CONFIG, Mesh(cp=2, node=2, ep=2)))


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_context_parallel_latent_attention(n: int, phase: Phase) -> None:
    """One message of 20 + 4 numbers a token."""
    found = declared(LATENT, strategy(LATENT, Mesh(node=n, ep=n), attention="cp"))
    assert found["gather_latents", phase] == 4 * ROWS * LATENT.sequence_length * (n - 1) / n * 24
    assert ("gather_keys", phase) not in found


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_tensor_parallel_ffn(n: int, phase: Phase) -> None:
    """Of experts and of a dense layer; the routing travels as with experts by index."""
    bsh = ROWS * CONFIG.sequence_length * CONFIG.hidden
    where = strategy(CONFIG, Mesh(node=n, etp=n), ffn="tp")
    found = declared(CONFIG, where)
    assert found["dispatch_all_gather", phase] == found["combine_reduce_scatter", phase] == 4 * bsh * (n - 1) / n
    routing = (8 if phase == Phase.F else 4) * CONFIG.top_k * ROWS * CONFIG.sequence_length // n * (n - 1)
    assert found["gather_routing", phase] == routing
    dense = declared(replace(CONFIG, dense_layers=1, dense_ffn_hidden=24), where)
    assert dense["gather_ffn", phase] == dense["scatter_ffn", phase] == 4 * bsh * (n - 1) / n


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize(("ep", "etp"), [(2, 2), (4, 2), (2, 4), (1, 2)])
def test_experts_by_index_and_width(ep: int, etp: int, phase: Phase) -> None:
    """All-to-all: a routed row goes to its expert's ranks with probability (ep-1)/ep, and from there to etp-1 more."""
    n, k = ep * etp, CONFIG.top_k
    tokens, row = ROWS * CONFIG.sequence_length // n, 4 * CONFIG.hidden
    mesh = Mesh(node=n, ep=ep, etp=etp)
    gathered = declared(CONFIG, strategy(CONFIG, mesh, ffn="ep+tp", dispatch="all_gather"))
    for name in ("dispatch_all_gather", "combine_reduce_scatter"):
        assert gathered[name, phase] == tokens * row * (n - 1)
    by_peer = declared(CONFIG, strategy(CONFIG, mesh, ffn="ep+tp", dispatch="all_to_all"))
    if ep == 1:  # nobody to send to by index: always the other form
        assert by_peer == gathered
        return
    for first, second in (("dispatch_all_to_all", "dispatch_etp_all_gather"),
                          ("combine_all_to_all", "combine_etp_reduce_scatter")):  # fmt: skip
        assert by_peer[first, phase] == tokens * k * row * (ep - 1) / ep
        assert by_peer[first, phase] + by_peer[second, phase] == tokens * k * row * ((ep - 1) / ep + etp - 1)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_vocabulary(tied: bool, n: int) -> None:
    c = replace(CONFIG, tied_embeddings=tied)
    bs = ROWS * c.sequence_length
    found = declared(c, strategy(c, Mesh(node=n, ep=n), vocabulary="sharded"))
    for phase in BOTH:
        assert found["scatter_embedding", phase] == found["gather_final", phase] == 4 * bs * c.hidden * (n - 1) / n
    # The gradient of the softmax needs nothing that is not there: no message backward.
    assert {phase: size for (name, phase), size in found.items() if name == "gather_statistics"} == {
        Phase.F: 12 * bs * (n - 1)
    }


LATENT = replace(
    CONFIG, attention="mla", q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4, kv_heads=8
)


@pytest.mark.parametrize("phase", BOTH)
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(("rank", "name"), [(12, "gather_q_low_norm"), (0, "gather_ln1_out")])
def test_tensor_parallel_latent_attention(rank: int, name: str, n: int, phase: Phase) -> None:
    """Behind the down-projections: latents are gathered, or hidden states for queries that have none."""
    c = replace(LATENT, q_lora_rank=rank)
    found = declared(c, strategy(c, Mesh(node=n, ep=n), attention="tp"))
    per_width = 4 * ROWS * c.sequence_length * (n - 1) / n
    assert found[name, phase] == per_width * (rank or c.hidden)
    assert found["gather_kv_latent", phase] == per_width * 20
    assert found["gather_k_shared", phase] == per_width * 4
    assert found["scatter_tokens", phase] == per_width * c.hidden
    assert ("gather_tokens", phase) not in found


def test_one_rank_sends_nothing() -> None:
    assert declared(CONFIG, layout(CONFIG, 1)) == {}
    everything = {"attention": "tp", "ffn": "tp", "vocabulary": "sharded"}
    assert declared(LATENT, strategy(LATENT, Mesh(), **everything)) == {}


# --- what runs equals what is declared -------------------------------------------------------------------------------


def balanced_route(logits: Tensor, bias: Tensor | None, c: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Token t chooses experts t k ... t k + k - 1, round and round: every expert gets equally many from every rank."""
    tokens = torch.arange(len(logits))[:, None]
    choice = (tokens * c.top_k + torch.arange(c.top_k)) % c.experts
    probabilities = logits.softmax(-1)
    return probabilities.gather(1, choice), choice, probabilities


def run_balanced(c: ModelConfig, mesh: Mesh, dispatch: str, strategies: dict[str, str] | None = None) -> Wire:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "route", balanced_route)
        return run_rank(c, random_rows(c, rows=ROWS * mesh.dp), mesh, dispatch, **strategies or {}).wire


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize(("mesh", "k", "kv_heads"), [
    (Mesh(node=2, ep=2), 2, 4), (Mesh(node=4, ep=4), 1, 4), (Mesh(node=4, ep=4), 4, 8), (Mesh(node=2, ep=2), 8, 1),
])  # fmt: skip
def test_bytes_that_travel_are_those_declared(mesh: Mesh, k: int, kv_heads: int, dispatch: str) -> None:
    c = replace(CONFIG, top_k=k, kv_heads=kv_heads)
    wanted = declared(c, layout(c, mesh.node, dispatch))
    for wire in run_ranks(mesh.world, run_balanced, c, mesh, dispatch):
        assert {(name.removeprefix("layers.0."), phase): size for (name, phase), size in wire.items()} == wanted


WIDE = replace(LATENT, dense_layers=1, dense_ffn_hidden=16, layers=2, shared_experts=1, tied_embeddings=True)
TP, CP, SHARDED = {"attention": "tp"}, {"attention": "cp"}, {"vocabulary": "sharded"}


@pytest.mark.parametrize(("c", "mesh", "dispatch", "strategies"), [
    (CONFIG, Mesh(node=2, ep=2), "all_to_all", TP),
    (CONFIG, Mesh(node=4, etp=4), "auto", {**TP, **SHARDED, "ffn": "tp"}),
    (WIDE, Mesh(node=2, etp=2), "auto", {**TP, **SHARDED, "ffn": "tp"}),
    (WIDE, Mesh(node=4, ep=2, etp=2), "all_to_all", {**TP, "ffn": "ep+tp"}),
    (CONFIG, Mesh(node=4, ep=2, etp=2), "all_gather", {**SHARDED, "ffn": "ep+tp"}),
    (CONFIG, Mesh(dp=2, node=2, ep=2, etp=2), "all_to_all", {**SHARDED, "ffn": "ep+tp"}),
    (CONFIG, Mesh(dp=2, node=2, etp=2), "auto", {"ffn": "tp"}),
    (CONFIG, Mesh(node=4, ep=4), "all_to_all", {**CP, **SHARDED}),
    (WIDE, Mesh(dp=2, node=2, ep=2), "all_gather", CP),
    (WIDE, Mesh(cp=2, node=2, ep=2), "all_gather", CP),
    (CONFIG, Mesh(cp=2, node=2, ep=4), "all_to_all", {**TP, **SHARDED}),
    (replace(CONFIG, kv_heads=1, balance_loss=0.1), Mesh(cp=2, node=2, ep=2), "all_to_all", {}),
])  # fmt: skip
def test_bytes_of_strategies_that_travel_are_those_declared(
    c: ModelConfig, mesh: Mesh, dispatch: str, strategies: dict[str, str]
) -> None:
    for rank, wire in enumerate(run_ranks(mesh.world, run_balanced, c, mesh, dispatch, strategies)):
        wanted = declared(c, strategy(c, mesh, rank, dispatch=dispatch, **strategies))
        assert {(name.removeprefix("layers.0."), phase): size for (name, phase), size in wire.items()} == wanted


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_expert_parallelism_over_two_nodes(dispatch: str) -> None:
    """ep 4 over nodes of 2: the formulas with n = 4 for experts and b twice the rows, n = 2 for attention."""
    bytes_bsh = 4 * 2 * ROWS * CONFIG.sequence_length * CONFIG.hidden
    each_way = bytes_bsh * (3 / 4) * (CONFIG.top_k / 4 if dispatch == "all_to_all" else 1)
    for wire in run_ranks(4, run_balanced, CONFIG, Mesh(dp=2, node=2, ep=4), dispatch):
        found = {name.removeprefix("layers.0."): size for (name, phase), size in wire.items() if phase == Phase.F}
        names = [name for name in found if name.startswith(("dispatch_", "combine_"))]
        assert [found[name] for name in names] == [each_way] * 2
        assert found["scatter_heads"] + found["gather_heads"] == 4 * 3 * ROWS * 16 * 32 * (1 / 4)  # m = 2


def run_skewed(c: ModelConfig) -> tuple[Wire, int]:
    """Real routing; and how many of this rank's rows go elsewhere."""
    result = run_rank(c, random_rows(c, rows=ROWS), Mesh(node=2, ep=2), "all_to_all")
    load = result.load["layers.0.load"]
    place = connect(Mesh(node=2, ep=2))["ep"].index
    return result.wire, int(load.view(2, -1)[1 - place].sum())


def test_unbalanced_routing_sends_what_it_must() -> None:
    """A rank sends exactly the rows whose experts live on the other; back come as many."""
    results = run_ranks(2, run_skewed, CONFIG)
    row = 4 * CONFIG.hidden
    sent = [rows for _, rows in results]
    assert sent[0] != sent[1]
    for rank, (wire, rows) in enumerate(results):
        dispatch, combine = "layers.0.dispatch_all_to_all", "layers.0.combine_all_to_all"
        assert wire[dispatch, Phase.F] == wire[combine, Phase.B] == rows * row
        assert wire[combine, Phase.F] == wire[dispatch, Phase.B] == sent[1 - rank] * row


# --- the choice of dispatch ------------------------------------------------------------------------------------------


def test_all_gather_wins_from_k_above_6_on_8_gpus() -> None:
    """The paper's measured dispatch: all-to-all at k = 6 takes 752 us, all-gather and reduce-scatter 765 and 790."""
    chosen = [cheapest_dispatch(k, 8, RELATIVE_COST["nccl"]).name for k in range(1, 9)]
    assert chosen == ["all_to_all"] * 6 + ["all_gather"] * 2


def test_choice_by_volume_alone_changes_at_k_equal_n() -> None:
    chosen = [cheapest_dispatch(k, 4, RELATIVE_COST["gloo"]).name for k in range(1, 9)]
    assert chosen == ["all_to_all"] * 4 + ["all_gather"] * 4


@pytest.mark.parametrize(("k", "name"), [(2, "dispatch_all_to_all"), (8, "dispatch_all_gather")])
def test_auto_takes_the_cheaper_form(k: int, name: str) -> None:
    c = replace(CONFIG, top_k=k)
    assert (name, Phase.F) in declared(c, layout(c, 4))


# --- FLOPs -----------------------------------------------------------------------------------------------------------

# Elementwise operators declare FLOPs too, but model FLOPs are those of matrix products and attention.
ELEMENTWISE = ("norm", "rope", "swiglu", "residual", "arrange", "scatter", "gather")


def is_product(op: Op) -> bool:
    return not op.name.endswith(ELEMENTWISE)


def model_flops(c: ModelConfig, where: Layout) -> float:
    """Declared FLOPs of this rank as the model counts them.

    The attention core's backward declares 2.5x its forward: five products, one of which recomputes the scores. Model
    FLOPs recompute nothing, so of it 2x counts.
    """
    total = 0.0
    for forward in model_ops(c, where):
        for op in (forward, *forward.backward):
            if is_product(op):
                recomputed = op.phase == Phase.B and op.name.endswith(".attention")
                total += op.cost.flops * (2 / 2.5 if recomputed else 1.0)
    return total


FLOPS = {
    "mixtral": replace(PRESETS["mixtral-8x7b"], layers=2),
    "352b": replace(PRESETS["paper-internal-352b"], layers=2),
    "deepseek-moe": replace(PRESETS["deepseek-moe"], layers=3),
    "deepseek-v3": replace(PRESETS["deepseek-v3"], layers=4),
    "tied-window": replace(PRESETS["quickstart"], sliding_window=100),
    "gated": replace(CONFIG, shared_experts=1, shared_gate=True, kv_heads=8),
}


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_all_operators_are_those_of_the_model(name: str, n: int) -> None:
    c = FLOPS[name]
    for dispatch in ("all_to_all", "all_gather"):
        where = layout(c, n, dispatch)
        per_token = model_flops(c, where) * n / (ROWS * c.sequence_length)
        assert per_token == pytest.approx(counts(c).flops_per_token, rel=1e-12)  # sums of exact products in float64


PARALLEL: dict[str, dict[str, str]] = {
    "attention": TP,
    "vocabulary": SHARDED,
    "ffn": {"ffn": "tp"},
    "ep+tp, all-to-all": {"ffn": "ep+tp", "dispatch": "all_to_all"},
    "ep+tp, all-gather": {"ffn": "ep+tp", "dispatch": "all_gather"},
    "all tensor-parallel": {**TP, **SHARDED, "ffn": "tp"},
}


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("name", FLOPS)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_flops_of_strategies_are_those_of_the_model(parallel: str, name: str, n: int) -> None:
    """n ranks together do the model's work once: what is not cut by heads, width or vocabulary is cut by tokens.

    But one thing: the gate of shared experts, a product with one row, is computed for all tokens by every rank of a
    tensor-parallel FFN, where each weighs its own partial sum.
    """
    c, strategies = FLOPS[name], PARALLEL[parallel]
    if strategies.get("attention") == "tp" and c.attention == "gqa" and c.kv_heads % n:
        c = replace(c, kv_heads=c.heads)
    ffn = strategies.get("ffn", "ep")
    mesh = {"ep": Mesh(node=n, ep=n), "tp": Mesh(node=n, etp=n), "ep+tp": Mesh(node=n, ep=n // 2, etp=2)}[ffn]
    per_token = model_flops(c, strategy(c, mesh, **strategies)) * n / (ROWS * c.sequence_length)
    gates = 6 * c.hidden * (c.layers - c.dense_layers) if c.shared_gate and ffn == "tp" else 0
    # Sums of exact products in float64.
    assert per_token == pytest.approx(counts(c).flops_per_token + (n - 1) * gates, rel=1e-12)


def test_backward_of_attention_declares_the_recomputed_scores() -> None:
    (core,) = (op for op in model_ops(CONFIG, layout(CONFIG, 1)) if op.name == "layers.0.attention")
    assert core.cost.flops == ROWS * CONFIG.sequence_length * attention_flops_per_token(CONFIG)
    assert core.backward[0].cost.flops == 2.5 * core.cost.flops


def test_elementwise_operators_are_a_small_rest() -> None:
    """Else leaving them out of the sum above would hide something."""
    c = FLOPS["mixtral"]
    ops = [op for forward in model_ops(c, layout(c, 8)) for op in (forward, *forward.backward)]
    rest = sum(op.cost.flops for op in ops if not is_product(op))
    assert 0 < rest < 1e-3 * sum(op.cost.flops for op in ops)


def test_every_weight_of_a_product_has_declared_flops() -> None:
    """A weight matrix of T tokens costs 2 T x size in forward and twice that in backward; experts by their share."""
    c = FLOPS["gated"]
    sizes = {name: value.numel() for name, value in build(c).named_parameters() if value.dim() > 1}
    tokens = ROWS * c.sequence_length
    found: dict[str, float] = {}
    for forward in model_ops(c, layout(c, 1)):
        for op in (forward, *forward.backward):
            for name in {*op.weights, *op.gradients} & sizes.keys():
                found[name] = found.get(name, 0.0) + op.cost.flops
    for name, size in sizes.items():
        share = c.top_k / c.experts if ".experts." in name else 1.0
        wanted = 0.0 if name == "embedding.weight" else 6 * tokens * size * share  # a look-up is no product
        assert found[name] == wanted, name
