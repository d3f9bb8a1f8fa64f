"""FFNs that every token passes (dense layers, shared experts), and the frame of all that work on gathered tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megascale_moe.comm.axis import Axis
from megascale_moe.engine.names import grad, parse, suffixed
from megascale_moe.engine.op import Op
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.strategies.collective import fan_out, gather_tokens, scatter_sums, sum_pieces
from megascale_moe.strategies.dense import activation, gate, linear
from megascale_moe.strategies.exchange import cut_by_peer
from megascale_moe.strategies.layer import Layer, Piece, columns, pieces_of

Work = Callable[[Piece, Value, Value], list[Op]]
"""Operators from the tokens of a piece's ranks to (partial) results for them."""


def swiglu_ffn(
    layer: Layer, kind: str, x: Value, y: Value, width: int, axis: Axis, piece: Piece | None = None
) -> list[Op]:
    """Return a SwiGLU of `width` divided over `axis`: x [T, hidden] -> y [T, hidden], a partial sum of several ranks'.

    Args:
        kind: "shared" for the shared experts, "" for the FFN of a dense layer.
    """
    prefix, whole, gated = (f"{kind}.", "shared_out", layer.model.shared_gate) if kind else ("", "ffn_out", False)
    rows, weights = x.rows, layer.name(f"ffn.{prefix}")

    def value(tensor: str, size: int, shard: Shard | None, keep: Keep = Keep.PAPER) -> Value:
        return Value(suffixed(y, tensor), (x.shape[0], size), y.dtype, shard=shard, keep=keep)

    local = width // axis.size
    up = value("fc13_out", 2 * local, Shard((f"{whole}.fc13_out",), rows, columns=columns(2 * width, axis, 2)))
    act = value("fc2_in", local, Shard((f"{whole}.fc2_in",), rows, columns=columns(width, axis)), Keep.NONE)
    shard = y.lying(whole=(f"{whole}.ungated",)).shard if y.shard else None
    out = value("ungated", layer.model.hidden, shard) if gated else y
    ops = [
        linear(layer.name(f"{prefix}fc13", piece), x, up, f"{weights}w13.weight"),
        activation(layer.name(f"{prefix}swiglu", piece), up, act, layer.spec),
        linear(layer.name(f"{prefix}fc2", piece), act, out, f"{weights}w2.weight"),
    ]
    if gated:
        ops.append(gate(layer.name(f"{prefix}gate", piece), out, x, y, f"{weights}gate.weight"))
    return ops


def dense_ffn(layer: Layer, x: Value) -> tuple[list[Op], list[Value]]:
    """Return the FFN of a dense layer, its width divided where the experts' is, from x [tokens, hidden]."""
    layout = layer.layout
    axis = layout.etp if layer.shares_width else Axis("")

    def work(piece: Piece, x: Value, y: Value) -> list[Op]:
        return swiglu_ffn(layer, "", x, y, layer.model.dense_ffn_hidden, axis, piece)

    ops, y = on_gathered_tokens(layer, x, pieces_of(axis, layout.pieces), ("gather_ffn", "scatter_ffn"), work)
    return ops, [y]


def on_gathered_tokens(
    layer: Layer, x: Value, pieces: Sequence[Piece], names: tuple[str, str], work: Work, whole: tuple[str, ...] = ()
) -> tuple[list[Op], Value]:
    """Gather the tokens of all ranks, do this rank's part of the work on all of them, and send partial sums home.

    Args:
        names: of the all-gather and the reduce-scatter.
        whole: the single rank's tensors that the result is the sum of, if it is not "ffn_out".
    """
    layout, width, axis = layer.layout, layer.model.hidden, pieces[0].axis
    whole = whole or ("ffn_out",)
    y = layer.value("ffn_out", (layout.tokens, width), Shard(whole), Keep.NONE)
    if axis.size == 1:
        return work(pieces[0], x, y), y
    fan, copies = fan_out(layer, x, pieces)
    own: list[Op] = []
    chains, sums = [], []
    for piece, (copy, slope) in zip(pieces, copies, strict=True):
        shape = (len(piece.sources) * layout.tokens, width)
        shard = Shard(whole, Rows("gathered", axis.name, piece.sources), partial=axis.name) if piece.uncut else None
        partial = layer.value("ffn_partial", shape, shard, Keep.NONE, piece=piece)
        if piece.own:
            own, total = work(piece, copy, partial), partial
        else:
            tensor, rows = parse(x).tensor, Rows("gathered", axis.name, piece.sources)
            # Cut, no other rank has the same tokens in the same piece: gradients cannot be compared.
            shard = Shard((tensor,), rows, partial_gradient=axis.name, forward_only=not piece.uncut)
            everyone = layer.value(f"{tensor}_ag", shape, shard, x.keep, piece=piece)
            total = y if piece.uncut else layer.value("ffn_sums", shape, keep=Keep.NONE, piece=piece)
            come, go = (layer.name(name, piece) for name in names)
            chains.append((
                gather_tokens(layout, come, copy, everyone, piece, slope),
                work(piece, everyone, partial),
                scatter_sums(layout, go, partial, total, piece, "" if piece.uncut else grad(y)),
            ))  # fmt: skip
        sums.append(total)
    last = [] if pieces[0].uncut else [sum_pieces(layer, layer.name("sum_pieces"), sums, y, pieces)]
    return cut_by_peer(fan, own, chains, last), y
