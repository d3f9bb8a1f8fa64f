"""FFNs that every token passes (dense layers, shared experts), and the frame of all that work on gathered tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megascale_moe.comm.axis import Axis
from megascale_moe.engine.names import grad, suffixed
from megascale_moe.engine.op import Op, hang_backward
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.strategies.collective import fan_out, gather_tokens, gathered, scatter_sums, sum_pieces
from megascale_moe.strategies.dense import activation, gate, linear
from megascale_moe.strategies.layer import Layer, Piece, columns, pieces_of

Work = Callable[[Piece, Value, Value], list[Op]]
"""Operators from the tokens of a piece's ranks to (partial) results for them."""


def swiglu_ffn(
    layer: Layer, kind: str, x: Value, y: Value, width: int, axis: Axis, piece: Piece | None = None
) -> list[Op]:
    """A SwiGLU of `width`, shared out over `axis`: x [T, hidden] -> y [T, hidden], a partial sum if there are several.

    Args:
        kind: "shared" for the shared experts, "" for the FFN of a dense layer.
    """
    prefix, whole, gated = (f"{kind}.", "shared_out", layer.model.shared_gate) if kind else ("", "ffn_out", False)
    T, local = x.shape[0], width // axis.size
    rows = x.shard.rows if x.shard else Rows()
    weights = layer.name(f"ffn.{prefix}")

    def value(tensor: str, size: int, shard: Shard | None, keep: Keep = Keep.PAPER) -> Value:
        return Value(suffixed(y, tensor), (T, size), y.dtype, shard=shard, keep=keep)

    up = value("fc13_out", 2 * local, Shard((f"{whole}.fc13_out",), rows, columns=columns(2 * width, axis, 2)))
    act = value("fc2_in", local, Shard((f"{whole}.fc2_in",), rows, columns=columns(width, axis)), Keep.NONE)
    lies = y.lying(whole=(f"{whole}.ungated",)).shard if y.shard else None
    out = value("ungated", layer.model.hidden, lies) if gated else y
    ops = [
        linear(layer.name(f"{prefix}fc13", piece), x, up, f"{weights}w13.weight"),
        activation(layer.name(f"{prefix}swiglu", piece), up, act, layer.spec),
        linear(layer.name(f"{prefix}fc2", piece), act, out, f"{weights}w2.weight"),
    ]
    if gated:
        ops.append(gate(layer.name(f"{prefix}gate", piece), out, x, y, f"{weights}gate.weight"))
    return ops


def dense_ffn(layer: Layer, x: Value) -> tuple[list[Op], list[Value]]:
    """The FFN of a dense layer, its width shared out where the experts' is: from x [tokens, hidden] to the result."""
    c, layout = layer.model, layer.layout
    if not layer.shares_width:
        y = layer.tokens("ffn_out", c.hidden, keep=Keep.NONE)
        return swiglu_ffn(layer, "", x, y, c.dense_ffn_hidden, Axis("")), [y]

    def work(piece: Piece, x: Value, partial: Value) -> list[Op]:
        return swiglu_ffn(layer, "", x, partial, c.dense_ffn_hidden, layout.etp, piece)

    pieces = pieces_of(layout.etp, layout.pieces)
    ops, y = on_gathered_tokens(layer, x, pieces, ("gather_ffn", "scatter_ffn"), work)
    return ops, [y]


def on_gathered_tokens(
    layer: Layer, x: Value, pieces: Sequence[Piece], names: tuple[str, str], work: Work, whole: tuple[str, ...] = ()
) -> tuple[list[Op], Value]:
    """Tokens of all ranks come, each rank does its part of the work on all of them, partial sums go home.

    Cut by peer, what comes from one rank is worked on while what comes from the next travels, and goes back while the
    next is worked on. The own tokens, which need no message, come first.

    Args:
        names: of the all-gather and the reduce-scatter.
        whole: the single rank's tensors that the result is the sum of, if it is not "ffn_out".
    """
    layout, width = layer.layout, layer.model.hidden
    axis, whole = pieces[0].axis, whole or ("ffn_out",)
    y = layer.value("ffn_out", (layout.tokens, width), shard=Shard(whole), keep=Keep.NONE)
    if axis.size == 1:
        return work(pieces[0], x, y), y
    partials = [
        layer.value(
            "ffn_partial", (len(piece.sources) * layout.tokens, width), piece=piece, keep=Keep.NONE,
            shard=Shard(whole, Rows("gathered", axis.name, piece.sources), partial=axis.name) if piece.uncut else None,
        )
        for piece in pieces
    ]  # fmt: skip
    there, home = (layer.name(name) for name in names)
    if pieces[0].uncut:
        (piece,), (partial,), everyone = pieces, partials, gathered(layer, x, pieces[0])
        return [
            gather_tokens(layer.layout, there, x, everyone, piece),
            *work(piece, everyone, partial),
            scatter_sums(layer.layout, home, partial, y, piece),
        ], y
    fan, named = fan_out(layer, x, pieces)
    sends, sums = [], [partials[0]]
    inputs = [named[0][0]]
    for piece, (mine, slope) in zip(pieces[1:], named[1:], strict=True):
        inputs.append(gathered(layer, mine, piece))
        sends.append(gather_tokens(layer.layout, layer.name(names[0], piece), mine, inputs[-1], piece, slope))
        shape = (len(piece.peers) * layout.tokens, width)
        sums.append(layer.value("ffn_sums", shape, piece=piece, keep=Keep.NONE))
    works = [work(*each) for each in zip(pieces, inputs, partials, strict=True)]
    returns = [
        scatter_sums(layer.layout, layer.name(names[1], piece), partial, total, piece, grad(y))
        for piece, partial, total in zip(pieces[1:], partials[1:], sums[1:], strict=True)
    ]
    last = sum_pieces(layer, layer.name("sum_pieces"), sums, y, pieces)
    ops, back = [*fan, *sends, *works[0]], [last, *returns, *reversed(works[0])]
    for chain, send, result in zip(works[1:], sends, returns, strict=True):
        ops += [*chain, result]
        back += [*reversed(chain), send]
    return hang_backward([*ops, last], [*back, *fan]), y
