"""The grammar of names: the only place that writes them or takes them apart.

A value or an operator of a list is called

    5/d:layers.3.ffn_in@2#1~
    │ │ │        │      │ │ └ made a second time, for backward (recomputation)
    │ │ │        │      │ └── one of several terms that are summed
    │ │ │        │      └──── the piece, where a communication and its neighbours are cut by peer
    │ │ │        └─────────── the tensor, or what the operator does
    │ │ └──────────────────── the layer; embedding, head and optimizer belong to none
    │ └────────────────────── the gradient of that tensor
    └──────────────────────── the micro-batch, in the list of a whole step

and every part but the tensor may be missing. Lists hold names as strings, since they are keys everywhere; whoever needs
a part asks `parse`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_GRAMMAR = re.compile(r"(?:(\d+)/)?(d:)?(?:layers\.(\d+)\.)?([^@#~]*)(?:@(\d+))?(?:#(\d+))?(~)?")


class Name(NamedTuple):
    """A name, taken apart; `str(name)` puts it together again."""

    tensor: str
    layer: int | None = None
    piece: int | None = None
    micro: int | None = None
    gradient: bool = False
    term: int = 0
    recomputed: bool = False

    def __str__(self) -> str:
        micro = "" if self.micro is None else f"{self.micro}/"
        layer = "" if self.layer is None else f"layers.{self.layer}."
        piece = "" if self.piece is None else f"@{self.piece}"
        term = f"#{self.term}" if self.term else ""
        return f"{micro}{'d:' * self.gradient}{layer}{self.tensor}{piece}{term}{'~' * self.recomputed}"


@lru_cache(maxsize=1 << 16)
def parse(text: str) -> Name:
    """Take a name apart.

    Raises:
        ValueError: `text` is not a name.
    """
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a name of a value or an operator")
    micro, gradient, layer, tensor, piece, term, recomputed = found.groups()
    index, number, batch = (None if digits is None else int(digits) for digits in (layer, piece, micro))
    return Name(tensor, index, number, batch, gradient is not None, int(term or 0), recomputed is not None)


def in_layer(layer: int | None, tensor: str, piece: int | None = None) -> str:
    """Return the name of a tensor, a weight or an operator of a layer (None: of a layer on its own), and of a piece."""
    whole = tensor if layer is None else f"layers.{layer}.{tensor}"
    return whole if piece is None else f"{whole}@{piece}"


def grad(name: str) -> str:
    """Return the name of a tensor's gradient."""
    return f"d:{name}"


def is_grad(name: str) -> bool:
    """Return whether a name without its micro-batch is that of a gradient."""
    return name.startswith("d:")


def recomputed(name: str) -> str:
    """Return the name of a tensor that is made a second time."""
    return f"{name}~"


def term(name: str, index: int) -> str:
    """Return the name of the `index`-th (from 1) of several tensors whose sum is called `name`."""
    return f"{name}#{index}"


def in_micro(name: str, micro: int) -> str:
    """Return the name that a tensor of a micro-batch has in the list of a whole step."""
    return f"{micro}/{name}"


def without_micro(name: str) -> str:
    """Return a name as the lists of a single micro-batch have it."""
    return name.partition("/")[2] or name


def prefixed(word: str, name: str) -> str:
    """Return the name of what is made of a tensor or an operator, such as "encode dispatch" of "dispatch"."""
    found = parse(name)
    return str(found._replace(tensor=f"{word} {'d:' * found.gradient}{found.tensor}", gradient=False))


def suffixed(name: str, word: str) -> str:
    """Return the name of what belongs to a tensor, such as "ln1_out.scale" to "ln1_out"."""
    found = parse(name)
    return str(found._replace(tensor=f"{found.tensor}.{word}"))
