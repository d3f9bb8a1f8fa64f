"""Expert-parallel FFN, in both dispatch forms of the paper (section 3.2).

    all-to-all      each token's hidden state goes to the ranks of its k experts and comes back: 2k/n bsh (n-1)/n
    all-gather      every rank sees all tokens, scatters and drops locally, a reduce-scatter brings sums back:
                    2 bsh (n-1)/n, cheaper per byte and for large k

Both begin with one small all-gather of the routing (k indices and weights per token), from which every rank works
out all row maps, all message sizes and what capacity drops, with no further exchange. The gating weight is applied
before FC2, so FC2's output need not be kept. On one rank the communication is gone and both forms are the same list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, all_gather, all_to_all, reduce_scatter, tag_of
from megascale_moe.config import ModelConfig
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, Stream, grad
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.grouped import grouped_mm
from megascale_moe.kernels.rows import RowMap, row_map, sum_rows, take_rows
from megascale_moe.model.router import balance_weights, route, within_capacity, z_sum
from megascale_moe.model.segments import Segments
from megascale_moe.parallel.dense import dense_ffn
from megascale_moe.parallel.layout import Layout


def moe_ops(prefix: str, config: ModelConfig, layout: Layout) -> list[Op]:
    """From `prefix`ln2_out to `prefix`ffn_out (and `prefix`shared_out), [tokens, hidden]; writes `prefix`load."""
    p, c = prefix, config
    ops = [_router(p, c, layout)]
    if layout.ep.size > 1:
        ops.append(_gather_routing(p, c, layout))
    if c.balance_loss or c.z_loss:
        ops.append(_balance(p, c, layout))
    form = layout.dispatch_for(c) if layout.ep.size > 1 else "local"
    ops.append(_plan(p, c, layout))
    ops += {"local": _local, "all_to_all": _all_to_all, "all_gather": _all_gather}[form](p, c, layout)
    if c.shared_hidden:
        args = (f"{p}ln2_out", f"{p}shared_out", c.hidden, c.shared_hidden, c.shared_gate, layout)
        ops += dense_ffn(f"{p}shared.", f"{p}ffn.shared.", *args)
    return ops


# --- routing ---------------------------------------------------------------------------------------------------------


def _router(p: str, c: ModelConfig, layout: Layout) -> Op:
    def run(x: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        logits = x.float() @ weight.float().t()
        gate, choice, probabilities = route(logits, bias[0] if bias else None, c)
        load = torch.bincount(choice.flatten(), minlength=c.experts)
        return gate, choice, probabilities, z_sum(logits) if c.z_loss else logits.new_zeros(()), load

    writes = tuple(f"{p}{name}" for name in ("gate", "choice", "probabilities", "z", "load"))
    T = layout.tokens
    return autograd_op(
        f"{p}router", run, reads=(f"{p}ln2_out",), differentiable=(f"{p}ln2_out",), writes=writes,
        weights=(f"{p}ffn.router.weight",), constants=(f"{p}ffn.router.bias",) if c.correction_bias else (),
        cost=Cost(2.0 * T * c.hidden * c.experts, layout.bytes(T * c.hidden) + 16.0 * T * c.experts),
    )


def _gather_routing(p: str, c: ModelConfig, layout: Layout) -> Op:
    """All ranks' choices and gating weights in one message: int32 and float32 side by side."""
    name, axis, k = f"{p}gather_routing", layout.ep, c.top_k

    def run(gate: Tensor, choice: Tensor) -> Pending:
        packed = torch.cat((gate.view(torch.int32), choice.int()), dim=1)
        return all_gather(packed, axis, tag_of(name)).then(unpack)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :k].contiguous().view(torch.float32), x[:, k:].long()

    cost = Cost(wire_bytes=8.0 * layout.tokens * k * (axis.size - 1), axis="ep")
    backward = Op(
        name=name, phase=Phase.B, reads=(grad(f"{p}gate_all"),), writes=(grad(f"{p}gate"),), stream=Stream.INTRA,
        run=lambda d: reduce_scatter(d, axis, tag_of(name + " B")),
        cost=Cost(wire_bytes=cost.wire_bytes / 2, axis="ep"),
    )
    return Op(
        name=name, reads=(f"{p}gate", f"{p}choice"), writes=(f"{p}gate_all", f"{p}choice_all"), run=run,
        stream=Stream.INTRA, cost=cost, backward=(backward,),
    )


def _routing_names(p: str, layout: Layout) -> tuple[str, str]:
    """The routing of every token this rank's experts may see."""
    return (f"{p}gate_all", f"{p}choice_all") if layout.ep.size > 1 else (f"{p}gate", f"{p}choice")


def rows_in_order(x: Tensor, layout: Layout) -> Tensor:
    """x [ep * tokens, k], slices of rows as ranks hold them -> [ep / node, rows * length, k], whole rows in order."""
    blocks = x.view(-1, layout.node.size, layout.rows, layout.length // layout.node.size, x.shape[-1])
    return blocks.transpose(1, 2).reshape(len(blocks), layout.rows * layout.length, x.shape[-1])


def _slices_of_rows(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of `rows_in_order`."""
    blocks = x.view(len(x), layout.rows, layout.node.size, layout.length // layout.node.size, x.shape[-1])
    return blocks.transpose(1, 2).reshape(-1, x.shape[-1])


def _balance(p: str, c: ModelConfig, layout: Layout) -> Op:
    """The auxiliary losses: value for the metrics, gradient straight into probabilities and z.

    How crowded an expert is needs the choices of whole documents, which the gathered routing holds; the rest is linear
    in this rank's probabilities, so no further sum over ranks is needed.
    """
    node = layout.node

    def run(probabilities: Tensor, z: Tensor, choice: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        whole = rows_in_order(choice, layout)[layout.ep.index // node.size]
        device = whole.device
        weights = balance_weights(whole, segments.documents().to(device), segments.lengths.to(device), c)
        per_token = weights[segments.documents(node.index, node.size).to(device)] * c.balance_loss
        return (per_token * probabilities).sum() + c.z_loss * z, per_token

    def run_backward(per_token: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return per_token * scale, scale * c.z_loss

    auxiliary, per_token = f"{p}auxiliary", f"{p}balance_weights"
    reads = (f"{p}probabilities", f"{p}z", _routing_names(p, layout)[1], "segments")
    backward = Op(
        name=f"{p}balance", phase=Phase.B, reads=(per_token, "auxiliary_scale"),
        writes=(grad(f"{p}probabilities"), grad(f"{p}z")), run=run_backward,
    )
    return Op(name=f"{p}balance", reads=reads, writes=(auxiliary, per_token), run=run, backward=(backward,))


@dataclass(frozen=True)
class Dispatch:
    """Row maps of one layer.

    Attributes:
        experts: this rank's routed rows out of all tokens of the expert-parallel ranks.
        own: routed rows of this rank's own tokens, grouped by global expert (all-to-all form only).
        send, receive: rows to and from each rank.
        arrange: received rows, ordered by sender, into expert order; arrange_back its inverse.
    """

    experts: RowMap
    own: RowMap
    send: list[int]
    receive: list[int]
    arrange: Tensor
    arrange_back: Tensor


def _plan(p: str, c: ModelConfig, layout: Layout) -> Op:
    """Row maps from the routing; the only operator whose result the host waits for."""
    ep = layout.ep
    local = c.experts // ep.size

    def run(gate: Tensor, choice: Tensor) -> RowMap | Dispatch:
        kept = None
        if c.capacity_factor:
            whole = [rows_in_order(x, layout).flatten(0, 1) for x in (choice, gate)]
            rows = layout.rows * ep.size // layout.node.size
            kept_rows = within_capacity(whole[0], whole[1], rows, c)
            kept = _slices_of_rows(kept_rows.view(-1, layout.rows * layout.length, c.top_k), layout)
        experts = row_map(choice, ep.index * local, local, kept)
        if ep.size == 1 or layout.dispatch_for(c) == "all_gather":
            return experts
        return _dispatch(experts, choice, kept, c, layout)

    return Op(name=f"{p}plan", reads=_routing_names(p, layout), writes=(f"{p}rows",), run=run)


def _dispatch(experts: RowMap, choice: Tensor, kept: Tensor | None, c: ModelConfig, layout: Layout) -> Dispatch:
    ep, T = layout.ep, layout.tokens
    local = c.experts // ep.size
    mine = slice(ep.index * T, (ep.index + 1) * T)
    own = row_map(choice[mine], 0, c.experts, None if kept is None else kept[mine])
    send = [sum(own.counts[rank * local : (rank + 1) * local]) for rank in range(ep.size)]
    # Rows arrive ordered by (sender, expert); `experts` lists them by (expert, sender, token).
    sender = experts.source // T
    expert = choice.flatten()[experts.slot] - ep.index * local
    arrange_back = (sender * local + expert).argsort(stable=True)
    arrange = torch.empty_like(arrange_back)
    arrange[arrange_back] = torch.arange(len(arrange), device=arrange.device)
    return Dispatch(experts, own, send, torch.bincount(sender, minlength=ep.size).tolist(), arrange, arrange_back)


# --- the three forms -------------------------------------------------------------------------------------------------


def _local(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    return [
        _scatter(f"{p}scatter", p, f"{p}ln2_out", f"{p}ffn_in", _itself, c, layout),
        *_expert_ops(p, c, layout),
        _gather(f"{p}gather", p, f"{p}fc2_out", f"{p}ffn_out", _itself, c, layout),
    ]


def _all_gather(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    everyone, partial = f"{p}ln2_out_ag", f"{p}fc2_out_gathered"
    return [
        _collective(f"{p}dispatch_all_gather", f"{p}ln2_out", everyone, all_gather, reduce_scatter, c, layout),
        _scatter(f"{p}scatter", p, everyone, f"{p}ffn_in", _itself, c, layout),
        *_expert_ops(p, c, layout),
        _gather(f"{p}gather", p, f"{p}fc2_out", partial, _itself, c, layout),
        _collective(f"{p}combine_reduce_scatter", partial, f"{p}ffn_out", reduce_scatter, all_gather, c, layout),
    ]


def _all_to_all(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    return [
        _scatter(f"{p}scatter", p, f"{p}ln2_out", f"{p}dispatch_in", _own, c, layout),
        _swap(f"{p}dispatch_all_to_all", p, f"{p}dispatch_in", f"{p}dispatch_out", True, c, layout),
        _moved(
            f"{p}arrange", p, f"{p}dispatch_out", f"{p}ffn_in",
            lambda x, rows: take_rows(x, rows.arrange), lambda d, rows: take_rows(d, rows.arrange_back), c, layout,
        ),
        *_expert_ops(p, c, layout),
        _moved(
            f"{p}arrange_back", p, f"{p}fc2_out", f"{p}combine_in",
            lambda x, rows: take_rows(x, rows.arrange_back), lambda d, rows: take_rows(d, rows.arrange), c, layout,
        ),
        _swap(f"{p}combine_all_to_all", p, f"{p}combine_in", f"{p}combine_out", False, c, layout),
        _gather(f"{p}gather", p, f"{p}combine_out", f"{p}ffn_out", _own, c, layout),
    ]


# --- their operators -------------------------------------------------------------------------------------------------

Move = Callable[[Tensor, Any], Tensor]
Collective = Callable[[Tensor, Axis, int], Pending]


def _itself(rows: Any) -> RowMap:
    return rows  # type: ignore[no-any-return]


def _own(rows: Any) -> RowMap:
    return rows.own  # type: ignore[no-any-return]


def _routed(c: ModelConfig, layout: Layout) -> float:
    """Routed rows per rank when routing is balanced."""
    return layout.tokens * c.top_k


def _moved(name: str, p: str, x: str, y: str, forward: Move, backward: Move, c: ModelConfig, layout: Layout) -> Op:
    """y = forward(x, row maps); the gradient moves by `backward`."""
    rows, cost = f"{p}rows", Cost(memory_bytes=layout.bytes(2 * _routed(c, layout) * c.hidden))
    b = Op(name=name, phase=Phase.B, reads=(grad(y), rows), writes=(grad(x),), run=backward, cost=cost)
    return Op(name=name, reads=(x, rows), writes=(y,), run=forward, cost=cost, backward=(b,))


def _scatter(
    name: str, p: str, x: str, y: str, part: Callable[[Any], RowMap], c: ModelConfig, layout: Layout
) -> Op:
    """Token rows to routed rows."""

    def forward(x: Tensor, rows: Any) -> Tensor:
        return take_rows(x, part(rows).source)

    def backward(d: Tensor, rows: Any) -> Tensor:
        return sum_rows(d, part(rows).by_token, part(rows).token_start)

    return _moved(name, p, x, y, forward, backward, c, layout)


def _gather(name: str, p: str, x: str, y: str, part: Callable[[Any], RowMap], c: ModelConfig, layout: Layout) -> Op:
    """Sum of each token's routed rows; the dual of `_scatter`."""

    def forward(x: Tensor, rows: Any) -> Tensor:
        return sum_rows(x, part(rows).by_token, part(rows).token_start)

    def backward(d: Tensor, rows: Any) -> Tensor:
        return take_rows(d, part(rows).source)

    return _moved(name, p, x, y, forward, backward, c, layout)


def _collective(
    name: str, x: str, y: str, forward: Collective, backward: Collective, c: ModelConfig, layout: Layout
) -> Op:
    """All-gather or reduce-scatter of hidden states; each is the other's dual."""
    axis = layout.ep
    cost = Cost(wire_bytes=layout.bytes(layout.tokens * c.hidden) * (axis.size - 1), axis="ep")
    b = Op(
        name=name, phase=Phase.B, reads=(grad(y),), writes=(grad(x),), stream=Stream.INTRA, cost=cost,
        run=lambda d: backward(d, axis, tag_of(name + " B")),
    )
    return Op(
        name=name, reads=(x,), writes=(y,), stream=Stream.INTRA, cost=cost, backward=(b,),
        run=lambda x: forward(x, axis, tag_of(name)),
    )


def _swap(name: str, p: str, x: str, y: str, outward: bool, c: ModelConfig, layout: Layout) -> Op:
    """All-to-all of routed rows, from tokens to experts (`outward`) or home."""
    axis, rows = layout.ep, f"{p}rows"
    wire = layout.bytes(_routed(c, layout) * c.hidden) * (axis.size - 1) / axis.size
    cost = Cost(wire_bytes=wire, axis="ep")

    def mover(phase: Phase, outward: bool) -> Callable[[Tensor, Dispatch], Pending]:
        def run(x: Tensor, rows: Dispatch) -> Pending:
            sizes = (rows.send, rows.receive) if outward else (rows.receive, rows.send)
            return all_to_all(x, *sizes, axis, tag_of(f"{name} {phase}"))

        return run

    b = Op(
        name=name, phase=Phase.B, reads=(grad(y), rows), writes=(grad(x),), run=mover(Phase.B, not outward),
        stream=Stream.INTRA, cost=cost,
    )
    return Op(
        name=name, reads=(x, rows), writes=(y,), run=mover(Phase.F, outward), stream=Stream.INTRA, cost=cost,
        backward=(b,),
    )


def _expert_ops(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """ffn_in [R, hidden] -> fc2_out [R, hidden], rows grouped by local expert."""
    experts = f"{p}ffn.experts."
    return [
        _grouped_linear(f"{p}fc13", p, f"{p}ffn_in", f"{p}fc13_out", f"{experts}w13", (c.hidden, 2 * c.ffn_hidden), c,
                        layout),
        _gated_swiglu(p, c, layout),
        _grouped_linear(f"{p}fc2", p, f"{p}fc2_in", f"{p}fc2_out", f"{experts}w2", (c.ffn_hidden, c.hidden), c, layout),
    ]


def _expert_rows(rows: RowMap | Dispatch) -> RowMap:
    return rows.experts if isinstance(rows, Dispatch) else rows


def _grouped_linear(
    name: str, p: str, x: str, y: str, weight: str, sizes: tuple[int, int], c: ModelConfig, layout: Layout
) -> Op:
    """y = x @ weight[expert of the row].T; weight [experts, outputs, inputs]."""
    inputs, outputs = sizes
    R, rows = _routed(c, layout), f"{p}rows"
    local = c.experts // layout.ep.size
    cost = Cost(2.0 * R * inputs * outputs, layout.bytes(R * inputs, R * outputs, local * inputs * outputs))

    def forward(x: Tensor, rows: RowMap | Dispatch, w: Tensor) -> Tensor:
        m = _expert_rows(rows)
        return grouped_mm(x, w.transpose(1, 2), m.counts, m.offsets)

    def input_gradient(dy: Tensor, rows: RowMap | Dispatch, w: Tensor) -> Tensor:
        m = _expert_rows(rows)
        return grouped_mm(dy, w, m.counts, m.offsets)

    def weight_gradient(x: Tensor, dy: Tensor, rows: RowMap | Dispatch, sink: Gradient) -> None:
        sink.add_grouped_mm(dy, x, _expert_rows(rows).counts)

    return Op(
        name=name, reads=(x, rows), writes=(y,), weights=(weight,), run=forward, cost=cost,
        backward=(
            Op(
                name=name, phase=Phase.B, reads=(grad(y), rows), writes=(grad(x),), weights=(weight,),
                run=input_gradient, cost=cost,
            ),
            Op(
                name=name, phase=Phase.W, reads=(x, grad(y), rows), writes=(), gradients=(weight,),
                run=weight_gradient, cost=cost,
            ),
        ),
    )


def _gated_swiglu(p: str, c: ModelConfig, layout: Layout) -> Op:
    """fc2_in = silu(a) * b * gating weight for fc13_out = [a, b]."""
    gates, x, y, rows = _routing_names(p, layout)[0], f"{p}fc13_out", f"{p}fc2_in", f"{p}rows"
    R = _routed(c, layout)
    cost = Cost(6.0 * R * c.ffn_hidden, layout.bytes(3 * R * c.ffn_hidden))

    def forward(x: Tensor, gates: Tensor, rows: RowMap | Dispatch) -> Tensor:
        return swiglu(x, gates.flatten()[_expert_rows(rows).slot])

    def backward(x: Tensor, gates: Tensor, rows: RowMap | Dispatch, dy: Tensor) -> tuple[Tensor, Tensor]:
        slot = _expert_rows(rows).slot
        dx, dgate = swiglu_backward(dy, x, gates.flatten()[slot])
        assert dgate is not None  # there was a gate
        dgates = torch.zeros_like(gates)
        dgates.view(-1)[slot] = dgate
        return dx, dgates

    b = Op(
        name=f"{p}swiglu", phase=Phase.B, reads=(x, gates, rows, grad(y)), writes=(grad(x), grad(gates)), run=backward,
        cost=Cost(2 * cost.flops, 5 / 3 * cost.memory_bytes),
    )
    return Op(name=f"{p}swiglu", reads=(x, gates, rows), writes=(y,), run=forward, cost=cost, backward=(b,))
