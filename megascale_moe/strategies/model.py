"""The model, or the part of it that a pipeline stage has, as one list: embedding, blocks, norm, head and loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.config import ModelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad, in_layer
from megascale_moe.engine.op import Cost, Op, Phase, product
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_loss
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.attention_sp import sequence_parallel_attention
from megascale_moe.strategies.attention_tp import tensor_parallel_attention
from megascale_moe.strategies.dense import add, add_norm, norm
from megascale_moe.strategies.experts_all_gather import all_gather_experts
from megascale_moe.strategies.experts_all_to_all import all_to_all_experts
from megascale_moe.strategies.ffn import dense_ffn, swiglu_ffn
from megascale_moe.strategies.layer import Layer, pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.routing import routing_ops
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.vocabulary import embedding_ops, head_ops, rank_order

Head = Literal["train", "loss", "logits"]
INPUTS = ("tokens", "targets", "rope", "segments", "loss_scale", "auxiliary_scale")


def block_ops(layer: Layer, x: Value, y: Value) -> list[Op]:
    """One layer: hidden state x -> y, both [tokens, hidden]. Reads "rope" and "segments"."""
    c, layout = layer.model, layer.layout
    hidden = x.called(layer.name("hidden"))
    ln1 = layer.tokens("ln1_out", c.hidden, keep=Keep.NONE)
    attention_norm = norm(
        layer.name("attention_norm"), x, ln1, layer.name("attention_norm.weight"), c.norm_eps, skip=hidden
    )
    attend = tensor_parallel_attention if layout.tensor_attention else sequence_parallel_attention
    attention, attended = attend(layer, ln1)
    total, ln2 = layer.tokens("ln2_in", c.hidden), layer.tokens("ln2_out", c.hidden, keep=Keep.NONE)
    ffn_norm = add_norm(
        layer.name("ffn_norm"), (hidden, attended), total, ln2, layer.name("ffn_norm.weight"), c.norm_eps
    )
    ffn, terms = (dense_ffn if layer.dense else moe_ops)(layer, ln2)
    residual = add(layer.name("residual"), (total, *terms), y)
    return [attention_norm, *attention, ffn_norm, *ffn, residual]


def moe_ops(layer: Layer, x: Value) -> tuple[list[Op], list[Value]]:
    """Experts, and shared experts unless they are among what the experts' ranks sum: from x to the terms of the sum."""
    c, layout = layer.model, layer.layout
    travels = layout.group.size > 1 and layout.dispatch_for(c) == "all_to_all"
    pieces = pieces_of(layout.ep if travels else layout.group, layout.pieces)
    ops, routing = routing_ops(layer, x, pieces, travels=travels)
    experts, y = (all_to_all_experts if travels else all_gather_experts)(layer, x, routing)
    terms = [y]
    if c.shared_hidden and not layout.tensor_ffn:
        terms.append(layer.tokens("shared_out", c.hidden, keep=Keep.NONE))
        experts += swiglu_ffn(layer, "shared", x, terms[-1], c.shared_hidden, Axis(""))
    return [*ops, *experts], terms


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
    x = hidden_state(part.layers[0], c, layout)
    if part.first:
        ops += embedding_ops(x, c, layout) if layout.shards_vocabulary else [_embedding(x)]
    for index in part.layers:
        y = hidden_state(index + 1, c, layout)
        ops += block_ops(Layer(c, layout, index, dense=index < c.dense_layers), x, y)
        x = y
    if not part.last:
        return ops
    final = Value("final", x.shape, x.dtype, shard=Shard(), keep=Keep.FULL)
    ops.append(norm("norm", x, final, "norm.weight", c.norm_eps))
    weight = "embedding.weight" if c.tied_embeddings else "head.weight"
    if layout.shards_vocabulary:
        return ops + head_ops(weight, head, final, c, layout)
    return [*ops, {"train": _train_head, "loss": _loss_head, "logits": _logits_head}[head](weight, final, c.vocab)]


def hidden_state(layer: int, config: ModelConfig, layout: Layout) -> Value:
    """Declare what a layer begins with, [tokens, hidden]; behind the last layer, what the final norm reads."""
    shape = (layout.tokens, config.hidden)
    return Value(f"hidden_{layer}", shape, layout.dtype, shard=Shard(), keep=Keep.FULL)


def moe_layers(config: ModelConfig, part: Part | None = None) -> list[int]:
    """The layers with experts."""
    layers = range(config.layers) if part is None else part.layers
    return [index for index in layers if index >= config.dense_layers]


def auxiliary_names(config: ModelConfig, part: Part | None = None) -> list[str]:
    """The auxiliary losses of the list, one per MoE layer; none where the model has no such loss."""
    if not (config.balance_loss or config.z_loss):
        return []
    return [in_layer(index, "auxiliary") for index in moe_layers(config, part)]


def load_names(config: ModelConfig, part: Part | None = None) -> list[str]:
    """Tokens per expert of every MoE layer, int64 [E], of this rank's tokens."""
    return [in_layer(index, "load") for index in moe_layers(config, part)]


def _embedding(y: Value) -> Op:
    cost = Cost(memory_bytes=2 * y.nbytes)

    def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
        sink.value().index_add_(0, tokens, d.to(sink.buffer.dtype))

    backward = Op(
        name="embedding", phase=Phase.W, reads=("tokens", grad(y)), writes=(), gradients=("embedding.weight",),
        run=weight_gradient, cost=cost,
    )
    return Op(
        name="embedding", reads=("tokens",), writes=(y,), weights=("embedding.weight",), cost=cost,
        run=lambda tokens, w: w.index_select(0, tokens), backward=(backward,),
    )


def _head_cost(x: Value, vocab: int, products: int) -> Cost:
    T, hidden = x.shape
    return product(T, vocab, hidden, products * vocab * hidden * x.dtype.itemsize + 2 * x.nbytes, products)


LOSS = Value("loss", (), torch.float32, keep=Keep.FULL)


def _train_head(weight: str, x: Value, vocab: int) -> Op:
    """Loss with both gradients at once, because a block of logits is best used while it is in cache."""
    slope = x.named("final.slope")

    def run(x: Tensor, targets: Tensor, scale: float, w: Tensor, sink: Gradient) -> tuple[Any, ...]:
        return linear_cross_entropy(x, w, targets, scale, sink.add_mm)

    backward = Op(name="head", phase=Phase.B, reads=(slope,), writes=(x.gradient,), run=lambda slope: slope)
    return Op(
        name="head", reads=(x, "targets", "loss_scale"), writes=(LOSS, slope), weights=(weight,), gradients=(weight,),
        run=run, cost=_head_cost(x, vocab, 3), backward=(backward,),
    )


def _loss_head(weight: str, x: Value, vocab: int) -> Op:
    return Op(
        name="head", reads=(x, "targets"), writes=(LOSS,), weights=(weight,), cost=_head_cost(x, vocab, 1),
        run=lambda x, targets, w: linear_cross_entropy_loss(x, w, targets),
    )


def _logits_head(weight: str, x: Value, vocab: int) -> Op:
    logits = Value("logits", (x.shape[0], vocab), torch.float32, keep=Keep.FULL)
    return Op(
        name="head", reads=(x,), writes=(logits,), weights=(weight,), cost=_head_cost(x, vocab, 1),
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
    return [(index, in_layer(index, "ffn.router.bias"), (config.experts,)) for index in moe_layers(config)]


def buffers_of(config: ModelConfig, part: Part, device: torch.device) -> dict[str, Tensor]:
    """That state of a part of the model, zero."""
    shapes = buffer_shapes(config)
    return {name: torch.zeros(shape, device=device) for layer, name, shape in shapes if layer in part.layers}
