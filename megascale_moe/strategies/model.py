"""The model, or the part of it that a pipeline stage has, as one list: embedding, blocks, norm, head and loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, grad, product
from megascale_moe.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_loss
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.attention import attention_ops
from megascale_moe.strategies.dense import add, add_norm, dense_ffn, norm
from megascale_moe.strategies.experts import moe_ops, tensor_parallel_ffn
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.vocabulary import embedding_ops, head_ops, rank_order

Head = Literal["train", "loss", "logits"]
INPUTS = ("tokens", "targets", "rope", "segments", "loss_scale", "auxiliary_scale")


def block_ops(prefix: str, config: ModelConfig, layout: Layout, x: str, y: str, dense: bool = False) -> list[Op]:
    """One layer: hidden state x -> y, both [tokens, hidden]. Reads "rope" and "segments"."""
    p, c = prefix, config
    attention_norm = norm(
        f"{p}attention_norm", x, f"{p}ln1_out", f"{p}attention_norm.weight", c.norm_eps, layout, width=c.hidden,
        skip=f"{p}hidden",
    )
    ffn_norm = add_norm(
        f"{p}ffn_norm", (f"{p}hidden", f"{p}attn_out"), f"{p}ln2_in", f"{p}ln2_out", f"{p}ffn_norm.weight", c.norm_eps,
        layout, c.hidden,
    )
    if dense and layout.tensor_ffn:
        ffn = tensor_parallel_ffn(p, c, layout)
    elif dense:
        ffn = dense_ffn(p, f"{p}ffn.", f"{p}ln2_out", f"{p}ffn_out", c.hidden, c.dense_ffn_hidden, False, layout)
    else:
        ffn = moe_ops(p, c, layout)
    terms = [f"{p}ln2_in", f"{p}ffn_out"]
    if not dense and c.shared_hidden and not layout.tensor_ffn:
        terms.append(f"{p}shared_out")
    residual = add(f"{p}residual", tuple(terms), y, layout, c.hidden)
    return [attention_norm, *attention_ops(p, c, layout), ffn_norm, *ffn, residual]


def model_ops(config: ModelConfig, layout: Layout, head: Head = "train") -> list[Op]:
    """tokens int64 [tokens] -> "loss", a sum over this rank's targets ("logits" [tokens, vocab] for head "logits").

    Reads the names in `INPUTS`; per MoE layer writes "layers.i.load" and, with auxiliary losses, "layers.i.auxiliary".
    """
    return part_ops(config, layout, Part.whole(config), head)


def part_ops(config: ModelConfig, layout: Layout, part: Part, head: Head = "train") -> list[Op]:
    """The list of consecutive layers: reads "hidden_i" of its first layer i unless it has the embedding, and writes
    "hidden_j" of the layer j behind its last unless it has the head.
    """
    c = config
    ops: list[Op] = []
    if part.first:
        ops += embedding_ops(c, layout) if layout.shards_vocabulary else [_embedding(c, layout)]
    for index in part.layers:
        names = (f"hidden_{index}", f"hidden_{index + 1}")
        ops += block_ops(f"layers.{index}.", c, layout, *names, dense=index < c.dense_layers)
    if not part.last:
        return ops
    ops.append(norm("norm", f"hidden_{c.layers}", "final", "norm.weight", c.norm_eps, layout, width=c.hidden))
    weight = "embedding.weight" if c.tied_embeddings else "head.weight"
    if layout.shards_vocabulary:
        return ops + head_ops(weight, head, c, layout)
    return [*ops, {"train": _train_head, "loss": _loss_head, "logits": _logits_head}[head](weight, c, layout)]


def gradient_bytes(name: str, config: ModelConfig, layout: Layout) -> float:
    """Bytes of a gradient that several operators add to, "d:name": that of a hidden state, of all ranks' where it was
    gathered; 0 of the others (logits, gating weights), which are small.
    """
    ranks = {"ln1_out": 1, "ln2_out": 1, "ln2_out_ag": layout.group.size, "ln1_out_ag": layout.node.size}
    return layout.bytes(ranks.get(name.rpartition(".")[2], 0) * layout.tokens * config.hidden)


def moe_layers(config: ModelConfig, part: Part | None = None) -> list[int]:
    """The layers with experts."""
    layers = range(config.layers) if part is None else part.layers
    return [index for index in layers if index >= config.dense_layers]


def auxiliary_names(config: ModelConfig, part: Part | None = None) -> list[str]:
    """The auxiliary losses of the list, one per MoE layer; none where the model has no such loss."""
    if not (config.balance_loss or config.z_loss):
        return []
    return [f"layers.{index}.auxiliary" for index in moe_layers(config, part)]


def load_names(config: ModelConfig, part: Part | None = None) -> list[str]:
    """Tokens per expert of every MoE layer, int64 [E], of this rank's tokens."""
    return [f"layers.{index}.load" for index in moe_layers(config, part)]


def _embedding(c: ModelConfig, layout: Layout) -> Op:
    cost = Cost(memory_bytes=layout.bytes(2 * layout.tokens * c.hidden))

    def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
        sink.value().index_add_(0, tokens, d.to(sink.buffer.dtype))

    backward = Op(
        name="embedding", phase=Phase.W, reads=("tokens", grad("hidden_0")), writes=(), gradients=("embedding.weight",),
        run=weight_gradient, cost=cost,
    )
    return Op(
        name="embedding", reads=("tokens",), writes=("hidden_0",), weights=("embedding.weight",), cost=cost,
        run=lambda tokens, w: w.index_select(0, tokens), backward=(backward,),
    )


def _head_cost(c: ModelConfig, layout: Layout, products: int) -> Cost:
    T = layout.tokens
    moved = layout.bytes(products * c.vocab * c.hidden, 2 * T * c.hidden)
    return product(T, c.vocab, c.hidden, moved, products)


def _train_head(weight: str, c: ModelConfig, layout: Layout) -> Op:
    """Loss with both gradients at once, because a block of logits is best used while it is in cache."""

    def run(x: Tensor, targets: Tensor, scale: float, w: Tensor, sink: Gradient) -> tuple[Any, ...]:
        return linear_cross_entropy(x, w, targets, scale, sink.add_mm)

    backward = Op(
        name="head", phase=Phase.B, reads=("final.slope",), writes=(grad("final"),), run=lambda slope: slope
    )
    return Op(
        name="head", reads=("final", "targets", "loss_scale"), writes=("loss", "final.slope"), weights=(weight,),
        gradients=(weight,), run=run, cost=_head_cost(c, layout, 3), backward=(backward,),
    )


def _loss_head(weight: str, c: ModelConfig, layout: Layout) -> Op:
    return Op(
        name="head", reads=("final", "targets"), writes=("loss",), weights=(weight,), cost=_head_cost(c, layout, 1),
        run=lambda x, targets, w: linear_cross_entropy_loss(x, w, targets),
    )


def _logits_head(weight: str, c: ModelConfig, layout: Layout) -> Op:
    return Op(
        name="head", reads=("final",), writes=("logits",), weights=(weight,), cost=_head_cost(c, layout, 1),
        run=lambda x, w: (x @ w.t()).float(),
    )


def local_inputs(
    tokens: Tensor, targets: Tensor | None, layout: Layout, segments: Segments, config: ModelConfig
) -> dict[str, Any]:
    """A micro-batch's inputs as this rank's list reads them: tokens and targets int64 [rows, length].

    They are its slice of every row, but all tokens in rank order where the vocabulary is sharded; "rope" is for the
    tokens that its attention projects.
    """
    node, device = layout.node, tokens.device
    whole = layout.attention == "tp" or node.size == 1
    positions = segments.positions() if whole else segments.positions(node.index, node.size)
    width = layout.length // node.size
    part = slice(node.index * width, (node.index + 1) * width)

    def local(x: Tensor) -> Tensor:
        return rank_order(x, node.size) if layout.shards_vocabulary else x[:, part].reshape(-1)

    values = {"tokens": local(tokens), "rope": rotary_table(config, positions.to(device)), "segments": segments}
    return values if targets is None else values | {"targets": local(targets)}


def buffer_shapes(config: ModelConfig) -> list[tuple[int, str, tuple[int, ...]]]:
    """(layer, name, shape) of the state of the whole model that is no weight: the router's correction bias."""
    if not config.correction_bias:
        return []
    return [(index, f"layers.{index}.ffn.router.bias", (config.experts,)) for index in moe_layers(config)]


def buffers_of(config: ModelConfig, part: Part, device: torch.device) -> dict[str, Tensor]:
    """That state of a part of the model, zero."""
    shapes = buffer_shapes(config)
    return {name: torch.zeros(shape, device=device) for layer, name, shape in shapes if layer in part.layers}
