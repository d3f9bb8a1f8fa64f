"""The MoE FFN: experts parallel by index (ep), by width (etp), or both, in both dispatch forms of the paper (3.2).

    all-to-all      each token's hidden state goes to the ranks of its k experts and comes back: 2k/n bsh (n-1)/n;
                    where etp ranks share an expert's width they pass on to each other what they received
    all-gather      every rank sees all tokens, scatters and drops locally, a reduce-scatter brings sums back:
                    2 bsh (n-1)/n, cheaper per byte and for large k; the only form of pure tensor parallelism

Both begin with one small all-gather of the routing (k indices and weights per token), from which every rank works
out all row maps, all message sizes and what capacity drops, with no further exchange. The gating weight is applied
before FC2, so FC2's output need not be kept. On one rank the communication is gone and both forms are the same list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending, all_gather, reduce_scatter, tag_of
from megascale_moe.comm.traffic import Traffic, as_rows, sum_to
from megascale_moe.config import ModelConfig
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, grad, product
from megascale_moe.kernels.rows import RowMap, count, row_map, take_rows
from megascale_moe.model.router import balance_weights, route, z_sum
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.collective import communication, gather_tokens, scatter_sums, with_backward
from megascale_moe.strategies.dense import add, dense_ffn
from megascale_moe.strategies.expert_ops import (
    Dispatch,
    expert_ops,
    gather,
    moved,
    routing_names,
    rows_in_order,
    rows_within_capacity,
    scatter,
)
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.split_experts import split_all_gather, split_all_to_all, split_plan


def moe_ops(prefix: str, config: ModelConfig, layout: Layout) -> list[Op]:
    """From `prefix`ln2_out to `prefix`ffn_out (and `prefix`shared_out), [tokens, hidden]; writes `prefix`load."""
    p, c = prefix, config
    ops = _router(p, c, layout)
    if layout.group.size > 1:
        ops.append(_gather_routing(p, c, layout))
    if c.balance_loss or c.z_loss:
        ops.append(_balance(p, c, layout))
    form = layout.dispatch_for(c) if layout.group.size > 1 else "local"
    if layout.pieces > 1 and can_split_experts(form, c, layout):
        ops.append(split_plan(p, c, layout))
        ops += {"all_to_all": split_all_to_all, "all_gather": split_all_gather}[form](p, c, layout)
    else:
        ops.append(_plan(p, c, layout))
        ops += {"local": _local, "all_to_all": _all_to_all, "all_gather": _all_gather}[form](p, c, layout)
    if c.shared_hidden and not layout.tensor_ffn:
        ops += _shared(p, f"{p}ln2_out", f"{p}shared_out", c, c.shared_hidden, layout)
    return ops


def can_split_experts(form: str, c: ModelConfig, layout: Layout) -> bool:
    """Whether the FFN can be cut by peer: not where it passes two axes, or a shared expert's sums join the others'."""
    if form == "all_to_all":
        return layout.etp.size == 1
    return form == "all_gather" and not (layout.tensor_ffn and c.shared_hidden)


def _shared(p: str, x: str, y: str, c: ModelConfig, width: int, layout: Layout) -> list[Op]:
    return dense_ffn(f"{p}shared.", f"{p}ffn.shared.", x, y, c.hidden, width, c.shared_gate, layout)


def tensor_parallel_ffn(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """The FFN of a dense layer, its width over the ranks of a node: `p`ln2_out -> `p`ffn_out."""
    n, everyone, partial = layout.etp.size, f"{p}ln2_out_ag", f"{p}ffn_partial"
    width = c.dense_ffn_hidden // n
    return [
        gather_tokens(f"{p}gather_ffn", f"{p}ln2_out", everyone, c.hidden, layout.etp, layout),
        *dense_ffn(p, f"{p}ffn.", everyone, partial, c.hidden, width, False, layout.whole),
        scatter_sums(f"{p}scatter_ffn", partial, f"{p}ffn_out", c.hidden, layout.etp, layout),
    ]


# --- routing ---------------------------------------------------------------------------------------------------------


def _router(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """Logits, always in float32, with an explicit backward: a graph would keep the tokens in float32 as well."""
    T, weight = layout.tokens, f"{p}ffn.router.weight"
    x, logits = f"{p}ln2_out", f"{p}logits"
    cost = product(T, c.experts, c.hidden, layout.bytes(T * c.hidden) + 4.0 * T * c.experts)

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient) -> None:
        sink.add(d.t() @ x.float())

    linear = Op(
        name=f"{p}router", reads=(x,), writes=(logits,), weights=(weight,), cost=cost,
        run=lambda x, w: x.float() @ w.float().t(),
        backward=(
            Op(
                name=f"{p}router", phase=Phase.B, reads=(grad(logits),), writes=(grad(x),), weights=(weight,),
                run=lambda d, w: (d @ w.float()).to(layout.dtype), cost=cost,
            ),
            Op(
                name=f"{p}router", phase=Phase.W, reads=(x, grad(logits)), writes=(), gradients=(weight,), cost=cost,
                run=weight_gradient,
            ),
        ),
    )
    return [linear, _route(p, c, layout)]


def _route(p: str, c: ModelConfig, layout: Layout) -> Op:
    def run(logits: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        gate, choice, probabilities = route(logits, bias[0] if bias else None, c)
        load = count(choice.flatten(), c.experts)
        return gate, choice, probabilities, z_sum(logits) if c.z_loss else logits.new_zeros(()), load

    return autograd_op(
        f"{p}route", run, reads=(f"{p}logits",), differentiable=(f"{p}logits",),
        writes=tuple(f"{p}{name}" for name in ("gate", "choice", "probabilities", "z", "load")),
        constants=(f"{p}ffn.router.bias",) if c.correction_bias else (),
        cost=Cost(memory_bytes=16.0 * layout.tokens * c.experts),
    )


def _gather_routing(p: str, c: ModelConfig, layout: Layout) -> Op:
    """All ranks' choices and gating weights in one message: int32 and float32 side by side."""
    name, axis, k = f"{p}gather_routing", layout.group, c.top_k

    def run(gate: Tensor, choice: Tensor) -> Pending:
        packed = torch.cat((gate.view(torch.int32), choice.int()), dim=1)
        return all_gather(packed, axis, tag_of(name)).then(unpack)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :k].contiguous().view(torch.float32), x[:, k:].long()

    cost = Cost(wire_bytes=8.0 * layout.tokens * k * (axis.size - 1), axis=axis.name)
    stream = layout.stream(axis)
    backward = Op(
        name=name, phase=Phase.B, reads=(grad(f"{p}gate_all"),), writes=(grad(f"{p}gate"),), stream=stream,
        run=lambda d: reduce_scatter(d, axis, tag_of(name + " B")),
        cost=Cost(wire_bytes=cost.wire_bytes / 2, axis=axis.name),
    )
    return Op(
        name=name, reads=(f"{p}gate", f"{p}choice"), writes=(f"{p}gate_all", f"{p}choice_all"), run=run,
        stream=stream, cost=cost, backward=(backward,),
    )


def _balance(p: str, c: ModelConfig, layout: Layout) -> Op:
    """The auxiliary losses: value for the metrics, gradient straight into probabilities and z.

    How crowded an expert is needs the choices of whole documents, which the gathered routing holds; the rest is linear
    in this rank's probabilities, so no further sum over ranks is needed.
    """
    node = layout.node

    def run(probabilities: Tensor, z: Tensor, choice: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        whole = rows_in_order(choice, layout)[layout.group.index // node.size]
        device = whole.device
        weights = balance_weights(whole, segments.documents().to(device), segments.lengths.to(device), c)
        per_token = weights[segments.documents(node.index, node.size).to(device)] * c.balance_loss
        return (per_token * probabilities).sum() + c.z_loss * z, per_token

    def run_backward(per_token: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return per_token * scale, scale * c.z_loss

    auxiliary, per_token = f"{p}auxiliary", f"{p}balance_weights"
    reads = (f"{p}probabilities", f"{p}z", routing_names(p, layout)[1], "segments")
    backward = Op(
        name=f"{p}balance", phase=Phase.B, reads=(per_token, "auxiliary_scale"),
        writes=(grad(f"{p}probabilities"), grad(f"{p}z")), run=run_backward,
    )
    return Op(name=f"{p}balance", reads=reads, writes=(auxiliary, per_token), run=run, backward=(backward,))


def _plan(p: str, c: ModelConfig, layout: Layout) -> Op:
    """Row maps from the routing; the only operator whose result the host waits for, where rows travel."""
    group, ep = layout.group, layout.ep
    local = c.experts // ep.size

    def run(gate: Tensor, choice: Tensor) -> RowMap | Dispatch:
        kept = None
        if c.capacity_factor:
            kept = rows_within_capacity(choice, gate, c, layout)
        experts = row_map(choice, ep.index * local, local, kept, c.experts)
        if group.size == 1 or layout.dispatch_for(c) == "all_gather":
            return experts
        return _dispatch(experts, choice, kept, c, layout)

    return Op(name=f"{p}plan", reads=routing_names(p, layout), writes=(f"{p}rows",), run=run)


def _dispatch(experts: RowMap, choice: Tensor, kept: Tensor | None, c: ModelConfig, layout: Layout) -> Dispatch:
    group, ep, etp, T = layout.group, layout.ep, layout.etp, layout.tokens
    local = c.experts // ep.size
    mine = slice(group.index * T, (group.index + 1) * T)
    own = row_map(choice[mine], 0, c.experts, None if kept is None else kept[mine])
    send = [sum(own.counts[rank * local : (rank + 1) * local]) for rank in range(ep.size)]
    # Rows arrive ordered by (etp place of the sender, its ep place, expert); `experts` lists them by (expert, sender,
    # token), where the group's ranks count ep x etp, etp fastest.
    sender = experts.source // T
    expert = choice.flatten()[experts.slot] - ep.index * local
    arrival = (sender % etp.size) * ep.size + sender // etp.size
    arrange_back = (arrival * local + expert).argsort(stable=True)
    arrange = torch.empty_like(arrange_back)
    arrange[arrange_back] = torch.arange(len(arrange), device=arrange.device)
    received = experts.rows_of(sender, group.size)
    share = [sum(received[place :: etp.size]) for place in range(etp.size)]
    return Dispatch(experts, own, send, received[etp.index :: etp.size], share, arrange, arrange_back)


# --- the three forms -------------------------------------------------------------------------------------------------


def _local(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    return [
        scatter(f"{p}scatter", f"{p}rows", f"{p}ln2_out", f"{p}ffn_in", _itself, c, layout),
        *expert_ops(p, c, layout),
        gather(f"{p}gather", f"{p}rows", f"{p}fc2_out", f"{p}ffn_out", _itself, c, layout),
    ]


def _all_gather(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    everyone, partial, group = f"{p}ln2_out_ag", f"{p}fc2_out_gathered", layout.group
    ops = [
        gather_tokens(f"{p}dispatch_all_gather", f"{p}ln2_out", everyone, c.hidden, group, layout),
        scatter(f"{p}scatter", f"{p}rows", everyone, f"{p}ffn_in", _itself, c, layout),
        *expert_ops(p, c, layout),
        gather(f"{p}gather", f"{p}rows", f"{p}fc2_out", partial, _itself, c, layout),
    ]
    if c.shared_hidden and layout.tensor_ffn:  # its partial sums travel with those of the routed experts
        shared, both, whole = f"{p}shared_partial", f"{p}ffn_partial", layout.whole
        ops += _shared(p, everyone, shared, c, c.shared_hidden // layout.etp.size, whole)
        ops.append(add(f"{p}add_shared", (partial, shared), both, whole, c.hidden))
        partial = both
    return [*ops, scatter_sums(f"{p}combine_reduce_scatter", partial, f"{p}ffn_out", c.hidden, group, layout)]


def _all_to_all(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    several = layout.etp.size > 1
    arrived, leaving = (f"{p}dispatch_all", f"{p}combine_all") if several else (f"{p}dispatch_out", f"{p}combine_in")
    ops = [
        scatter(f"{p}scatter", f"{p}rows", f"{p}ln2_out", f"{p}dispatch_in", _own, c, layout),
        _swap(f"{p}dispatch_all_to_all", p, f"{p}dispatch_in", f"{p}dispatch_out", True, c, layout),
    ]
    if several:
        ops.append(_spread(f"{p}dispatch_etp_all_gather", p, f"{p}dispatch_out", arrived, True, c, layout))
    ops += [
        moved(
            f"{p}arrange", f"{p}rows", arrived, f"{p}ffn_in",
            lambda x, rows: take_rows(x, rows.arrange), lambda d, rows: take_rows(d, rows.arrange_back), c, layout,
        ),
        *expert_ops(p, c, layout),
        moved(
            f"{p}arrange_back", f"{p}rows", f"{p}fc2_out", leaving,
            lambda x, rows: take_rows(x, rows.arrange_back), lambda d, rows: take_rows(d, rows.arrange), c, layout,
        ),
    ]
    if several:
        ops.append(_spread(f"{p}combine_etp_reduce_scatter", p, leaving, f"{p}combine_in", False, c, layout))
    return [
        *ops,
        _swap(f"{p}combine_all_to_all", p, f"{p}combine_in", f"{p}combine_out", False, c, layout),
        gather(f"{p}gather", f"{p}rows", f"{p}combine_out", f"{p}ffn_out", _own, c, layout),
    ]


# --- their messages --------------------------------------------------------------------------------------------------


def _itself(rows: Any) -> RowMap:
    return rows  # type: ignore[no-any-return]


def _own(rows: Any) -> RowMap:
    return rows.own  # type: ignore[no-any-return]


def _swap(name: str, p: str, x: str, y: str, outward: bool, c: ModelConfig, layout: Layout) -> Op:
    """All-to-all of routed rows, from tokens to experts (`outward`) or home."""
    axis, h = layout.ep, c.hidden
    rows = layout.tokens * c.top_k / axis.size  # to each rank

    def traffic(phase: Phase, outward: bool) -> Traffic:
        def sizes(rows: Dispatch) -> tuple[list[int], list[int]]:
            return (rows.send, rows.receive) if outward else (rows.receive, rows.send)

        return Traffic(
            axis=axis, tag=tag_of(f"{name} {phase}"), pack=lambda x, rows: x.contiguous().split(sizes(rows)[0]),
            shapes=lambda rows: [(count, h) for count in sizes(rows)[1]], plan=(1,), finish=as_rows,
            typical=(rows, h), dtype=layout.dtype,
        )  # fmt: skip

    there, back = traffic(Phase.F, outward), traffic(Phase.B, not outward)
    return _both_ways(name, p, x, y, there, back, rows * h * (axis.size - 1), layout)


def _spread(name: str, p: str, x: str, y: str, outward: bool, c: ModelConfig, layout: Layout) -> Op:
    """Received rows to all ranks that share their experts (`outward`), or the sum of what each made of them back."""
    axis, h = layout.etp, c.hidden
    rows = layout.tokens * c.top_k

    def traffic(phase: Phase, outward: bool) -> Traffic:
        def pack(x: Tensor, rows: Dispatch) -> Sequence[Tensor]:
            return [x.contiguous()] * axis.size if outward else x.contiguous().split(rows.share)

        def shapes(rows: Dispatch) -> list[tuple[int, int]]:
            counts = rows.share if outward else [rows.share[axis.index]] * axis.size
            return [(count, h) for count in counts]

        return Traffic(
            axis=axis, tag=tag_of(f"{name} {phase}"), pack=pack, shapes=shapes, plan=(1,), typical=(rows, h),
            finish=as_rows if outward else sum_to(layout.dtype), dtype=layout.dtype, sums=not outward,
        )  # fmt: skip

    there, back = traffic(Phase.F, outward), traffic(Phase.B, not outward)
    return _both_ways(name, p, x, y, there, back, rows * h * (axis.size - 1), layout)


def _both_ways(
    name: str, p: str, x: str, y: str, there: Traffic, back: Traffic, elements: float, layout: Layout
) -> Op:
    """A communication of routed rows, the same number of elements in each direction."""
    rows = f"{p}rows"
    return with_backward(
        communication(name, Phase.F, (x, rows), (y,), there, elements, layout),
        communication(name, Phase.B, (grad(y), rows), (grad(x),), back, elements, layout),
    )
