"""The router: which expert works on which token, known on every rank before anything else is sent.

One small all-gather of choices and gating weights (8 bytes per assignment) tells every rank all row maps, all message
sizes and what capacity drops, with no further exchange, in both dispatch forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, all_gather, reduce_scatter
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, product
from megascale_moe.engine.value import Rows, Shard, Value
from megascale_moe.kernels.rows import count
from megascale_moe.model.router import balance_weights, route, z_sum
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.exchange import tag
from megascale_moe.strategies.layer import Layer, Piece
from megascale_moe.strategies.row_maps import Routing, plan_rows


def routing_ops(layer: Layer, x: Value, pieces: Sequence[Piece], *, travels: bool) -> tuple[list[Op], Routing]:
    """Return the operators from x [tokens, hidden] to the routing; they also write load and auxiliary losses.

    Args:
        travels: whether rows travel to their experts, rather than tokens to all ranks.
    """
    c, layout = layer.model, layer.layout
    logits = layer.value("logits", (layer.layout.tokens, c.experts), Shard(), dtype=torch.float32)
    routed, (gate, choice, probabilities, z) = _route(layer, logits)
    ops = [_router(layer, x, logits), routed]
    whole, own = (gate, choice), (gate, choice)
    if layout.group.size > 1:
        gather, gate, choice = _gather_routing(layer, *own, layout.group)
        ops.append(gather)
        whole = (gate, choice)
    if layout.sequence.size > layout.group.size and (c.balance_loss or c.z_loss or c.capacity_factor):
        gather, *whole = _gather_routing(layer, *own, layout.sequence)  # type: ignore[assignment]
        ops.append(replace(gather, backward=()))
    if c.balance_loss or c.z_loss:
        ops.append(_balance(layer, probabilities, z, whole[1]))
    plan, routing = plan_rows(layer, (gate, choice), whole, pieces, travels=travels)
    return [*ops, plan], routing


def _router(layer: Layer, x: Value, y: Value) -> Op:
    """Compute logits, always in float32; backward is explicit: autograd would keep the tokens in float32 as well."""
    weights = (layer.name("ffn.router.weight"),)
    trained = (*weights, layer.name("ffn.router.logits_bias")) if layer.spec.router_bias else weights

    def forward(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = x.float() @ w.float().t()
        return logits if bias is None else logits.add_(bias.float())

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient, bias: Gradient | None = None) -> None:
        sink.add(d.t() @ x.float())
        if bias is not None:
            bias.add(d.sum(0))

    cost = product(y.shape[0], y.shape[1], x.shape[1], x.nbytes + y.nbytes)
    op = Op(layer.name("router"), (x,), (y,), forward, weights=trained, cost=cost)
    op = op.input_gradient((x,), (grad(y),), lambda d, w: (d @ w.float()).to(x.dtype), weights=weights)
    return op.weight_gradient((x, grad(y)), weight_gradient)


def _route(layer: Layer, logits: Value) -> tuple[Op, tuple[Value, Value, Value, Value]]:
    """Choose experts and gating weights; also returned is what the auxiliary losses need of each token and of all."""
    c, T = layer.model, layer.layout.tokens
    gate = layer.value("gate", (T, c.top_k), Shard(routing=True), dtype=torch.float32)
    choice = layer.value("choice", (T, c.top_k), Shard(routing=True), dtype=torch.int64)
    probabilities = layer.value("probabilities", (T, c.experts), Shard(), dtype=torch.float32)
    z = layer.value("z", (), dtype=torch.float32)
    load = layer.value("load", (c.experts,), dtype=torch.int64)

    def run(logits: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        gate, choice, probabilities = route(logits, bias[0] if bias else None, c)
        load = count(choice.flatten(), c.experts)
        return gate, choice, probabilities, z_sum(logits) if c.z_loss else logits.new_zeros(()), load

    op = autograd_op(
        layer.name("route"), run, reads=(logits,), differentiable=(logits,),
        writes=(gate, choice, probabilities, z, load),
        constants=(layer.name("ffn.router.bias"),) if c.correction_bias else (),
        cost=Cost(memory_bytes=16.0 * T * c.experts),
    )  # fmt: skip
    return op, (gate, choice, probabilities, z)


def _gather_routing(layer: Layer, gate: Value, choice: Value, axis: Axis) -> tuple[Op, Value, Value]:
    """Gather all ranks' choices and gating weights in one message: int32 and float32 side by side.

    Over the ranks that share the experts, whose work it says; and over those that share a sequence, if they are more:
    balance and capacity are those of whole sequences.
    """
    layout, k = layer.layout, layer.model.top_k
    what, whose = ("gather_routing", "all") if axis is layout.group else ("gather_sequences", axis.name)
    name = layer.name(what)
    shape, rows = (axis.size * layout.tokens, k), Rows("gathered", axis.name)
    shard = Shard(("gate",), rows, partial_gradient=axis.name, routing=True)
    gates = layer.value(f"gate_{whose}", shape, shard, dtype=torch.float32)
    choices = layer.value(f"choice_{whose}", shape, Shard(("choice",), rows, routing=True), dtype=torch.int64)

    def run(gate: Tensor, choice: Tensor) -> Pending:
        packed = torch.cat((gate.view(torch.int32), choice.int()), dim=1)
        return all_gather(packed, axis, tag(name, Phase.F)).then(unpack)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :k].contiguous().view(torch.float32), x[:, k:].long()

    def run_backward(d: Tensor) -> Pending:
        return reduce_scatter(d, axis, tag(name, Phase.B))

    cost = Cost(wire_bytes=8.0 * layout.tokens * k * (axis.size - 1), axis=axis.name)
    op = Op(name, (gate, choice), (gates, choices), run, stream=layout.stream(axis), cost=cost)
    half = cost._replace(wire_bytes=cost.wire_bytes / 2)
    return op.input_gradient((gate,), (grad(gates),), run_backward, cost=half), gates, choices


def _balance(layer: Layer, probabilities: Value, z: Value, choice: Value) -> Op:
    """Compute the auxiliary losses: value for the metrics, gradient straight into probabilities and z.

    How crowded an expert is needs the choices of whole documents, which the gathered routing holds; the rest is linear
    in this rank's probabilities, so no further sum over ranks is needed.
    """
    c, layout, sequence = layer.model, layer.layout, layer.layout.sequence
    auxiliary = layer.value("auxiliary", (), dtype=torch.float32)
    per_token = layer.value("balance_weights", (layout.tokens, c.experts), Shard(), dtype=torch.float32)

    def run(probabilities: Tensor, z: Tensor, choice: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        device, documents = choice.device, segments.documents()
        whole = layer.slices.sequences(choice).split(len(documents))[layout.group.index // sequence.size]
        weights = balance_weights(whole, documents.to(device), segments.lengths.to(device), c)
        per_token = weights[layer.slices.take(documents, sequence.index).to(device)] * c.balance_loss
        return (per_token * probabilities).sum() + c.z_loss * z, per_token

    op = Op(layer.name("balance"), (probabilities, z, choice, "segments"), (auxiliary, per_token), run)
    return op.input_gradient(
        (probabilities, z), (per_token, "auxiliary_scale"),
        lambda per_token, scale: (per_token * scale, scale * c.z_loss),
    )  # fmt: skip
