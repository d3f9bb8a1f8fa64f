"""Compression as a pass: a communication becomes three operators, which write its matrices in fewer bytes, move these
and write them back (paper, section 4.3).

    encode    right where the communication stood, on the computing stream
    move      the same exchange of other matrices; scales travel in the message of what they scale
    decode    before the first reader of a result: the time in between still hides the communication

What stays on a rank is not rewritten, and sums are taken in float32 of what arrived. A reduce-scatter is an exchange
followed by a sum here, so it needs no form of its own: it is the all-to-all of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending
from megascale_moe.engine.cost import Seconds
from megascale_moe.engine.names import parse, prefixed
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.engine.value import Keep, Value
from megascale_moe.kernels.narrow import BFloat16, Float8, Format

Choose = Callable[[Op], Format | None]

ROWS, CHANNELS = Float8("rows"), Float8("channels")
FORMATS: dict[str, tuple[Format, Format]] = {
    "bf16": (BFloat16(), BFloat16()), "fp8": (ROWS, CHANNELS), "fp8_cast": (Float8("none"), Float8("none")),
    "fp8_tensor": (Float8("tensor"), Float8("tensor")),
}  # fmt: skip
"""By name in `[wire] activations`: how activations are written, and how their gradients."""


def chooser(wire: str, seconds: Seconds) -> Choose:
    """Return the choice of a format that `[wire] activations` makes for the communications of layers.

    Args:
        wire: a name of `FORMATS`; "fp32" for nothing narrower than what is computed; "auto" for FP8 where sending less
            saves more time than writing and reading it takes.
    """

    def choose(op: Op) -> Format | None:
        if wire == "fp32" or op.traffic is None or parse(op.name).layer is None:
            return None
        form = FORMATS["fp8" if wire == "auto" else wire][op.phase == Phase.B]
        if share(op, form) >= 1 or (wire == "auto" and not worthwhile(op, form, seconds)):
            return None
        return form

    return choose


def worthwhile(op: Op, form: Format, seconds: Seconds) -> bool:
    """Return whether the link is the bottleneck and not the cast, for a typical message: all ranks of an axis have to
    decide alike.
    """
    assert op.traffic is not None
    rows, width = op.traffic.typical
    peers = len(op.traffic.distances) or op.traffic.axis.size - 1
    whole = rows * width * peers * op.traffic.dtype.itemsize
    typical = replace(op, cost=op.cost._replace(wire_bytes=whole))
    encode, _, decode = in_format(typical, form)
    return seconds(typical) * (1 - share(op, form)) > seconds(encode) + seconds(decode)


def share(op: Op, form: Format) -> float:
    """Return the bytes of a typical message in a format, over what they are without."""
    assert op.traffic is not None
    rows, width = (max(round(size), 1) for size in op.traffic.typical)
    return form.size(rows, width) / (rows * width * op.traffic.dtype.itemsize)


def compress(ops: Sequence[Op], choose: Choose) -> list[Op]:
    """Return the list with the communications for which `choose` names a format in that format."""
    out: list[Op] = []
    waiting: list[Op] = []  # decoders, until something reads their results
    for op in ops:
        wanted = [decode for decode in waiting if not set(decode.writes).isdisjoint(op.reads)]
        waiting = [decode for decode in waiting if decode not in wanted]
        out += wanted
        form = choose(op) if op.traffic is not None else None
        if form is None:
            out.append(op)
        else:
            encode, move, decode = in_format(op, form)
            out += [encode, move]
            waiting.append(decode)
    return out + waiting


def in_format(op: Op, form: Format) -> tuple[Op, Op, Op]:
    """Return a communication as encode, move and decode."""
    traffic = op.traffic
    assert traffic is not None
    elements, written = op.cost.wire_bytes / traffic.dtype.itemsize, op.writes[0]
    sent = op.cost.wire_bytes * share(op, form)
    message = partial(Value, shape=(sent,), dtype=torch.uint8, keep=Keep.NONE)
    coded, arrived = message(prefixed("coded", written)), message(prefixed("arrived", written))
    plan = tuple(op.reads[place] for place in traffic.plan)

    def run_encode(*reads: Any) -> list[Tensor]:
        """Return messages, and what stays as it is; a matrix for everyone is written once."""
        codes: dict[int, Tensor] = {}
        messages = []
        for place, matrix in enumerate(traffic.pack(*reads)):
            if not traffic.own(place):
                if id(matrix) not in codes:
                    codes[id(matrix)] = form.encode(matrix)
                matrix = codes[id(matrix)]
            messages.append(matrix)
        return messages

    def run_move(messages: list[Tensor], *plan: Any) -> Pending:
        room = [
            messages[place] if traffic.own(place)
            else torch.empty(form.size(*shape), dtype=torch.uint8, device=messages[0].device)
            for place, shape in enumerate(traffic.shapes(*plan))
        ]  # fmt: skip
        return traffic.move(messages, room).then(lambda _: room)

    def run_decode(messages: list[Tensor], *plan: Any) -> Any:
        def fill(place: int, matrix: Tensor) -> None:
            if traffic.own(place):
                matrix.copy_(messages[place])
            else:
                form.decode(messages[place], matrix)

        return traffic.unpack(fill, messages[0].device, plan)

    bare = replace(op, backward=(), traffic=None)
    cast = Cost(3 * elements, op.cost.wire_bytes + sent)
    encode = replace(
        bare, name=prefixed("encode", op.name), writes=(coded,), run=run_encode, stream=Stream.COMPUTE, cost=cast
    )
    move = replace(bare, reads=(coded, *plan), writes=(arrived,), run=run_move, cost=op.cost._replace(wire_bytes=sent))
    decode = replace(
        bare, name=prefixed("decode", op.name), reads=(arrived, *plan), run=run_decode, stream=Stream.COMPUTE, cost=cast
    )
    return encode, move, decode
