"""What every weight is, declared by the module that makes it.

A weight's shape does not say what it is: the biases of E experts are a matrix of numbers and no matrix of a product. So
a module says of each of its parameters what kind it is (`kinds`), whether its first dimension counts experts
(`by_expert`), and which parts its outputs consist of where a fused weight has several (`stacked`); modules of torch are
known. Initial values, weight decay, counts of FLOPs, where a weight is cut and what an optimizer does with it follow
from that. A parameter that nobody declares is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn


class Kind(StrEnum):
    """What a weight does."""

    MATRIX = "matrix"  # maps one hidden state to another
    BIAS = "bias"  # is added to something, or to the scores of a softmax
    NORM = "norm"  # scales what was normalised
    EMBEDDING = "embedding"  # is looked up
    HEAD = "head"  # maps the last hidden state to logits

    @property
    def decays(self) -> bool:
        """Return whether weight decay acts on it."""
        return self not in (Kind.BIAS, Kind.NORM)

    @property
    def multiplies(self) -> bool:
        """Return whether every token is multiplied with it, 2 FLOPs for each of its elements."""
        return self in (Kind.MATRIX, Kind.HEAD)


@dataclass(frozen=True)
class Weight:
    """A weight of the whole model.

    Attributes:
        by_expert: whether its first dimension counts the experts of a layer.
        outputs: sizes of the parts that its output dimension (rows of a matrix, elements of a bias) consists of, such
            as those of queries, keys and values.
    """

    shape: tuple[int, ...]
    kind: Kind
    by_expert: bool
    outputs: tuple[int, ...]

    @property
    def matrices(self) -> tuple[int, ...]:
        """Return the heights in rows of the matrices that its last two dimensions stack on top of each other.

        What is no matrix that maps one hidden state to another has none: biases and norms, products with a vector, the
        embedding (a table of vectors) and the head.
        """
        return self.outputs if self.kind is Kind.MATRIX and min(self.shape[-2:]) > 1 else ()


TORCH: Mapping[type[nn.Module], Mapping[str, Kind]] = {
    nn.Linear: {"weight": Kind.MATRIX, "bias": Kind.BIAS}, nn.Embedding: {"weight": Kind.EMBEDDING},
    nn.RMSNorm: {"weight": Kind.NORM},
}  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Return name -> what it is, for every parameter of a module; an outer module's word counts before an inner one's.

    Raises:
        KeyError: no module declares a parameter's kind.
    """
    kinds: dict[str, Kind] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    by_expert: set[str] = set()
    for prefix, module in reversed(list(model.named_modules())):
        path = f"{prefix}." if prefix else ""
        declared = {**TORCH.get(type(module), {}), **getattr(module, "kinds", {})}
        kinds |= {path + name: kind for name, kind in declared.items()}
        outputs |= {path + name: sizes for name, sizes in getattr(module, "stacked", {}).items()}
        if getattr(module, "by_expert", False):
            by_expert |= {path + name for name, _ in module.named_parameters()}
    weights = {}
    for name, parameter in model.named_parameters():
        kind, shape = kinds[name], tuple(parameter.shape)
        whole = shape[-1] if kind in (Kind.BIAS, Kind.NORM) else shape[-2]
        weights[name] = Weight(shape, kind, name in by_expert, outputs.get(name, (whole,)))
    return weights
