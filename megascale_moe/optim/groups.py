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
    known = list(NAMES)
    groups: dict[tuple[int, tuple[str, str], bool, bool, str, int], dict[str, Placement]] = {}
    for name, placement in placements.items():
        layer = int(name.split(".")[1]) if by_layer and name.startswith("layers.") else -1
        replicas, follows = placement.replicas, rule.of(placement.matrices).name
        order = known.index(replicas) if replicas in NAMES else len(known)
        key = order, replicas, not placement.decays, follows != rule.name, follows, layer
        groups.setdefault(key, {})[name] = placement
    parameters: Format | None = None
    if wire.parameters == "fp8":
        parameters = Float8("rows")
    elif wire.parameters in ("bf16", "auto") and dtype.itemsize > 2:
        parameters = BFloat16()
    # Nothing is measured for "auto": BF16 saves 2 bytes an element on the link and takes 8 of memory traffic, and a
    # memory is more than four times as fast as a link between ranks.
    formats = Formats("bf16" if wire.gradients == "auto" else wire.gradients, parameters)
    made = []
    for key in sorted(groups):
        _, replicas, undecayed, other_rule, follows, layer = key
        name = f"layers.{layer}." if layer >= 0 else ""
        name += NAMES.get(replicas) or "-".join(axis for axis in replicas if axis)
        name += ".vectors" * undecayed + f".{follows}" * other_rule
        intra, inter = (axes[axis] if axis else Axis(axis) for axis in replicas)
        made.append(
            FlatWeights(
                groups[key], intra, inter, decay=not undecayed, dtype=dtype, device=device, name=name, formats=formats
            )
        )
    return made
