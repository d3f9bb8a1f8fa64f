"""Which weights share a flat buffer: those with the same replicas, the same rule and the same decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megascale_moe.comm.axis import Axes, Axis
from megascale_moe.config import WireConfig
from megascale_moe.kernels.narrow import BFloat16, Float8, Format
from megascale_moe.optim.adamw import ADAMW
from megascale_moe.optim.flat import FlatWeights, Formats
from megascale_moe.optim.rule import Rule
from megascale_moe.strategies.placement import Placement

NAMES = {
    ("node", "tensor_data"): "replicated",
    ("", "tensor_data"): "tensor",
    ("", "expert_data"): "experts",
    ("node", "tied"): "tied",
    ("", "tied"): "tied",
}
"""What a group is called, by the axes of its replicas (`Placement.replicas`)."""

Key = tuple[str, tuple[str, str], bool, str]  # layer, replicas, decay, name of the rule


def flat_groups(
    placements: Mapping[str, Placement], axes: Axes, dtype: torch.dtype, device: torch.device, *,
    by_layer: bool = False, wire: WireConfig | None = None, rule: Rule = ADAMW,
) -> list[FlatWeights]:  # fmt: skip
    """Make the buffers of weights, grouped by (replicas, with or without decay, rule); norms and biases do not decay.

    Args:
        by_layer: also by layer, so that a layer's gradients can leave while the backward of others goes on.
        wire: how gradients and weights travel.
        rule: that of the optimizer; it says which weights follow another one (`Rule.of`).

    The order of the groups is that of NAMES, not that of the weights: a rank of the first pipeline stage and one of
    the last, which share tied weights but no others, issue their communication in the same order.
    """
    wire = wire or WireConfig()
    groups: dict[Key, dict[str, Placement]] = {}
    for name, placement in placements.items():
        layer = ".".join(name.split(".")[:2]) + "." if by_layer and name.startswith("layers.") else ""
        key = layer, placement.replicas, placement.decays, rule.of(placement.matrices).name
        groups.setdefault(key, {})[name] = placement
    formats, found = Formats(_gradients(wire), _parameters(wire, dtype)), []
    for key in sorted(groups, key=lambda key: _order(key, rule)):
        layer, replicas, decay, ruled = key
        intra, inter = (axes[axis] if axis else Axis(axis) for axis in replicas)
        marks = ("" if decay else ".vectors") + ("" if ruled == rule.name else f".{ruled}")
        name, members = layer + _name(replicas) + marks, groups[key]
        found.append(
            FlatWeights(members, intra, inter, decay=decay, dtype=dtype, device=device, name=name, formats=formats)
        )
    return found


def _order(key: Key, rule: Rule) -> tuple[int, tuple[str, str], bool, bool, str, int]:
    layer, replicas, decay, ruled = key
    known = list(NAMES)
    number = int(layer.split(".")[1]) if layer else -1
    place = known.index(replicas) if replicas in NAMES else len(known)
    return place, replicas, not decay, ruled != rule.name, ruled, number


def _name(replicas: tuple[str, str]) -> str:
    return NAMES.get(replicas) or "-".join(axis for axis in replicas if axis)


def _gradients(wire: WireConfig) -> str:
    """Return the form of the reduce-scatter.

    Nothing is measured for "auto": BF16 saves 2 bytes an element on the link and takes 8 of memory traffic, and a
    memory is more than four times as fast as a link between ranks.
    """
    return "bf16" if wire.gradients == "auto" else wire.gradients


def _parameters(wire: WireConfig, dtype: torch.dtype) -> Format | None:
    """Return how weights are written, None for the compute dtype."""
    if wire.parameters == "fp8":
        return Float8("rows")
    return BFloat16() if wire.parameters in ("bf16", "auto") and dtype.itemsize > 2 else None
