"""The model, or the part of it that a pipeline stage has, as one list: embedding, blocks, norm, head and loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.config import ModelConfig
from megascale_moe.engine.names import in_layer
from megascale_moe.engine.op import Op
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.dense import add, add_bias, add_norm, norm
from megascale_moe.strategies.ffn import dense_ffn, swiglu_ffn
from megascale_moe.strategies.layer import Layer, pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.registry import slices_of, strategies_of
from megascale_moe.strategies.routing import routing_ops
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.strategy import Head as Head

INPUTS = ("tokens", "targets", "rope", "segments", "loss_scale", "auxiliary_scale")


def block_ops(layer: Layer, x: Value, y: Value) -> list[Op]:
    """Return one layer: hidden state x -> y, both [tokens, hidden]. It reads "rope" and "segments"."""
    c = layer.model
    hidden = x.called(layer.name("hidden"))
    ln1 = layer.tokens("ln1_out", c.hidden, Keep.NONE)
    attention_norm = norm(
        layer.name("attention_norm"), x, ln1, layer.name("attention_norm.weight"), c.norm_eps, skip=hidden
    )
    attention, attended = layer.strategies.attention.ops(layer, ln1)
    if layer.spec.attention_bias:  # behind whatever sum over ranks the strategy ends with
        biased = layer.tokens("attn_biased", c.hidden, Keep.NONE)
        attention.append(add_bias(layer.name("out_bias"), attended, biased, layer.name("attention.out.bias")))
        attended = biased
    total, ln2 = layer.tokens("ln2_in", c.hidden), layer.tokens("ln2_out", c.hidden, Keep.NONE)
    ffn_norm = add_norm(
        layer.name("ffn_norm"), (hidden, attended), total, ln2, layer.name("ffn_norm.weight"), c.norm_eps
    )
    ffn, terms = (dense_ffn if layer.spec.dense else moe_ops)(layer, ln2)
    residual = add(layer.name("residual"), (total, *terms), y)
    return [attention_norm, *attention, ffn_norm, *ffn, residual]


def moe_ops(layer: Layer, x: Value) -> tuple[list[Op], list[Value]]:
    """Return experts, and shared experts unless the experts' ranks sum them, too: from x to the terms of the sum."""
    c, layout, dispatch = layer.model, layer.layout, layer.strategies.dispatch
    pieces = pieces_of(dispatch.axis(layout), layout.pieces)
    ops, routing = routing_ops(layer, x, pieces, travels=dispatch.travels)
    experts, y = dispatch.ops(layer, x, routing)
    terms = [y]
    if c.shared_hidden and not layer.shares_width:
        terms.append(layer.tokens("shared_out", c.hidden, Keep.NONE))
        experts += swiglu_ffn(layer, "shared", x, terms[-1], c.shared_hidden, Axis(""))
    return [*ops, *experts], terms


def model_ops(config: ModelConfig, layout: Layout, head: Head = "train") -> list[Op]:
    """tokens int64 [tokens] -> "loss", a sum over this rank's targets ("logits" [tokens, vocab] for head "logits").

    Reads the names in `INPUTS`; per MoE layer writes "layers.i.load" and, with auxiliary losses, "layers.i.auxiliary".
    """
    return part_ops(config, layout, Part.whole(config), head)


def part_ops(config: ModelConfig, layout: Layout, part: Part, head: Head = "train") -> list[Op]:
    """Return the list of consecutive layers: it reads "hidden_i" of its first layer i unless it has the embedding, and
    writes "hidden_j" of the layer j behind its last unless it has the head.
    """
    c, strategies = config, strategies_of(layout, config)
    ops: list[Op] = []
    x = hidden_state(part.layers[0], c, layout)
    if part.first:
        ops += strategies.vocabulary.embedding_ops(x, c, layout)
    for index in part.layers:
        y = hidden_state(index + 1, c, layout)
        ops += block_ops(Layer(c, layout, strategies, c.layer_specs[index], index), x, y)
        x = y
    if not part.last:
        return ops
    final = Value("final", x.shape, x.dtype, shard=Shard(), keep=Keep.FULL)
    ops.append(norm("norm", x, final, "norm.weight", c.norm_eps))
    weight = "embedding.weight" if c.tied_embeddings else "head.weight"
    return ops + strategies.vocabulary.head_ops(weight, head, final, c, layout)


def hidden_state(layer: int, config: ModelConfig, layout: Layout) -> Value:
    """Declare what a layer begins with, [tokens, hidden]; behind the last layer, what the final norm reads."""
    shape = (layout.tokens, config.hidden)
    return Value(f"hidden_{layer}", shape, layout.dtype, shard=Shard(), keep=Keep.FULL)


def moe_layers(config: ModelConfig, part: Part | None = None) -> list[int]:
    """Return the layers with experts."""
    layers = range(config.layers) if part is None else part.layers
    return [index for index in layers if not config.layer_specs[index].dense]


def auxiliary_names(config: ModelConfig, part: Part | None = None) -> list[str]:
    """Return the names of the auxiliary losses, one per MoE layer; none where the model has no such loss."""
    if not (config.balance_loss or config.z_loss):
        return []
    return [in_layer(index, "auxiliary") for index in moe_layers(config, part)]


def load_names(config: ModelConfig, part: Part | None = None) -> list[str]:
    """Return the names of every MoE layer's tokens per expert, int64 [E], of this rank's tokens."""
    return [in_layer(index, "load") for index in moe_layers(config, part)]


def local_inputs(
    tokens: Tensor, targets: Tensor | None, layout: Layout, segments: Segments, config: ModelConfig
) -> dict[str, Any]:
    """Return a micro-batch's inputs as this rank's list reads them: tokens and targets int64 [rows, length].

    They are its slice of every row, but those of its node in rank order where the vocabulary is sharded; "rope" is for
    the tokens that its attention projects.
    """
    device, strategies, slices = tokens.device, strategies_of(layout, config), slices_of(layout)

    def of(axis: str, x: Tensor) -> Tensor:
        """Return the tokens of this rank, of its node in order, or of all ranks that share a sequence."""
        if axis == "sequence":
            return x
        return slices.between.take(x, layout.cp.index) if axis == "node" else slices.take(x, layout.sequence.index)

    def local(x: Tensor) -> Tensor:
        gathers, flat = strategies.vocabulary.gathers_tokens(layout), x.reshape(-1)
        return slices.within.by_rank(of("node", flat)) if gathers else of("", flat)

    positions = of(strategies.attention.rope_axis(layout, config), segments.positions())
    values = {"tokens": local(tokens), "rope": rotary_table(config, positions.to(device)), "segments": segments}
    return values if targets is None else values | {"targets": local(targets)}


def buffer_shapes(config: ModelConfig) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return (layer, name, shape) of the model's state that is no weight: the router's correction bias."""
    if not config.correction_bias:
        return []
    return [(index, in_layer(index, "ffn.router.bias"), (config.experts,)) for index in moe_layers(config)]


def buffers_of(config: ModelConfig, part: Part, device: torch.device) -> dict[str, Tensor]:
    """Return that state of a part of the model, zero."""
    shapes = buffer_shapes(config)
    return {name: torch.zeros(shape, device=device) for layer, name, shape in shapes if layer in part.layers}
