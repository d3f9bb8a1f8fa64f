"""Experts by all-gather (paper, section 3.2): every rank sees all tokens of its group, scatters and drops locally, and
a reduce-scatter brings sums back: 2 bsh (n-1)/n elements, cheaper per byte and for large k than an all-to-all.

It is the only form of pure tensor parallelism; shared experts then have their width over the same ranks, and their
partial sums travel with those of the routed experts. On one rank the communication is gone.
"""

from __future__ import annotations

from megascale_moe.comm.axis import Axis
from megascale_moe.engine.op import Op
from megascale_moe.engine.value import Value
from megascale_moe.strategies.dense import add
from megascale_moe.strategies.ffn import on_gathered_tokens, swiglu_ffn
from megascale_moe.strategies.grouped import expert_input, expert_ops, gather, scatter
from megascale_moe.strategies.layer import Layer, Piece
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.row_maps import Routing
from megascale_moe.strategies.strategy import DispatchForm


class AllGather(DispatchForm):
    """Tokens to all ranks of the group, sums back."""

    name = "all_gather"
    title = "dispatch by all-gather"

    def axis(self, layout: Layout) -> Axis:
        return layout.group

    def rows(self, top_k: int, ep: int, etp: int, relative_cost: float) -> float:
        return ep * etp - 1  # one to each other rank

    def ops(self, layer: Layer, x: Value, routing: Routing) -> tuple[list[Op], Value]:
        c, layout = layer.model, layer.layout
        rows = dict(zip(routing.pieces, routing.rows, strict=True))
        shares = layer.shares_width and c.shared_hidden > 0

        def work(piece: Piece, x: Value, partial: Value) -> list[Op]:
            of_experts = of_shared = partial
            if shares:
                of_experts, of_shared = (
                    partial.named(layer.name(f"{kind}_partial", piece)) for kind in ("routed", "shared")
                )
                if partial.shard:
                    of_experts, of_shared = of_experts.lying(whole=("ffn_out",)), of_shared.lying(whole=("shared_out",))
            source = expert_input(layer, piece)
            experts, result = expert_ops(layer, source, rows[piece], routing.gate, piece)
            ops = [
                scatter(layer.name("scatter", piece), rows[piece], x, source),
                *experts,
                gather(layer.name("gather", piece), rows[piece], result, of_experts),
            ]
            if shares:
                ops += swiglu_ffn(layer, "shared", x, of_shared, c.shared_hidden, layout.etp, piece)
                ops.append(add(layer.name("add_shared", piece), (of_experts, of_shared), partial))
            return ops

        names = ("dispatch_all_gather", "combine_reduce_scatter")
        whole = ("ffn_out", "shared_out") if shares and layout.group.size > 1 else ()
        return on_gathered_tokens(layer, x, routing.pieces, names, work, whole)


ALL_GATHER = AllGather()
