"""Tensor-parallel attention (Megatron-LM; paper, section 3.1): all tokens are gathered, each rank attends with its
share of the heads, and the partial outputs are summed where the tokens belong: 2 bsh (n-1)/n elements travel per rank.

The gathered tokens are not kept but gathered again in backward, behind the input gradient (as Megatron-LM does).
"""

from __future__ import annotations

from dataclasses import replace

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig, require
from megascale_moe.config.refusals import divides
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.strategies.attention_core import attend, own_tokens_attention
from megascale_moe.strategies.collective import gather_tokens, scatter_sums
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.heads import Chosen, spans
from megascale_moe.strategies.layer import SEQUENCES, Layer, Piece, pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import tensor_rules
from megascale_moe.strategies.projection import heads, shared
from megascale_moe.strategies.strategy import AttentionStrategy, Rules


class TensorParallel(AttentionStrategy):
    """Each rank a share of the heads; on one rank the same as any other attention."""

    name = "tp"
    title = "tensor-parallel attention"

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        node = mesh.node
        divides("model.heads", model.heads, "parallel.node", node)
        grouped = [spec for spec in model.layer_kinds if spec.attention == "gqa"]
        require(
            node == 1 or all(spec.qk_norm != "full" for spec in grouped),
            "parallel.attention = 'tp' cuts between heads, model.qk_norm = 'full' spans them; use attention = 'sp'",
        )
        if grouped:
            divides("model.kv_heads", model.kv_heads, "parallel.node", node, " (or parallel.attention = 'sp')")

    def rope_axis(self, layout: Layout, model: ModelConfig) -> str:
        return "node"

    def ops(self, layer: Layer, x: Value) -> tuple[list[Op], Value]:
        alone = layer.layout.node.size == 1
        return own_tokens_attention(layer, x) if alone else tensor_parallel_attention(layer, x)

    def rules(self, model: ModelConfig, layout: Layout) -> Rules:
        """The rows of the rank's heads, and the columns of the output projection behind them."""
        if layout.node.size == 1:
            return {}
        of_heads, out = tensor_rules(layout.node.size, layout.node.index)
        return {
            "attention.qkv.weight": of_heads, "attention.q_up.weight": of_heads, "attention.kv_up.weight": of_heads,
            "attention.out.weight": out, "attention.qkv.bias": of_heads, "attention.sinks": of_heads,
        }  # fmt: skip


TENSOR_PARALLEL = TensorParallel()


def tensor_parallel_attention(layer: Layer, x: Value) -> tuple[list[Op], Value]:
    """From the normed input x [tokens, hidden] to the attention's result, [tokens, hidden]."""
    c, node = layer.model, layer.layout.node
    (piece,) = pieces_of(node, 1)
    ops, inputs = shared(layer, x)
    gathers = [_gather(layer, value, piece) for value in inputs]
    again = None
    if layer.spec.attention == "gqa":
        gather = gathers[0]
        twice = gather.writes[0].named(layer.name("ln1_out_again"))  # type: ignore[attr-defined]
        again = replace(gather, phase=Phase.R, writes=(twice,), backward=())
    chosen = Chosen.of_rank(node.index, node.size, c)
    made, found = heads(layer, [op.writes[0] for op in gathers], chosen, None, again)  # type: ignore[misc]
    mine = spans(chosen.queries, c.value_dim)
    shard = Shard(("attn",), SEQUENCES, columns=mine)
    attn = layer.value("attn", (layer.node_tokens, sum(map(len, mine))), shard=shard)
    partial = layer.value(
        "attn_partial", (layer.node_tokens, c.hidden), shard=Shard(("attn_out",), SEQUENCES, partial="node"),
        keep=Keep.NONE,
    )
    y = layer.tokens("attn_out", c.hidden, Keep.NONE)
    return [
        *ops,
        *gathers,
        *made,
        *attend(layer, found, found.sizes, attn),
        linear(layer.name("out"), attn, partial, layer.name("attention.out.weight")),
        scatter_sums(layer.layout, layer.name("scatter_tokens"), partial, y, piece, slices=layer.slices.within),
    ], y


def _gather(layer: Layer, x: Value, piece: Piece) -> Op:
    """All tokens of the node, in their order."""
    tensor = parse(x).tensor
    name = "gather_tokens" if layer.spec.attention == "gqa" else f"gather_{tensor}"
    shard = Shard((tensor,), SEQUENCES, partial_gradient="node")
    y = layer.value(f"{tensor}_ag", (layer.node_tokens, x.shape[1]), shard=shard, keep=Keep.NONE)
    return gather_tokens(layer.layout, layer.name(name), x, y, piece, slices=layer.slices.within)
