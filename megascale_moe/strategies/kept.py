"""What a forward keeps for its backward under each policy of rematerialization.

    none     all that backward reads
    paper    the paper's set (its section 4.1): inputs of attention and its result, the input of the second norm, and
             the experts' projections fc1 and fc3, (2kf + 4 + 2/m) bsh/n elements of a layer; norms, SwiGLU and
             dispatch are done again, no matrix product is
    full     only what enters a layer; everything else is done again
    budget   as little done again as fits a given number of bytes

Routing (choices, weights, row maps) is kept in all but "full": a few numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megascale_moe.config import ConfigError
from megascale_moe.engine.cost import Seconds, stem
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.remat import kept_names, rematerialize

Keeps = Callable[[Op, str], bool]

DROPPED = frozenset({
    "ln1_out", "ln1_out_ag", "qkv", "attn_a2a", "attn_part", "attn_out", "ln2_out", "ln2_out_ag", "dispatch_in",
    "dispatch_out", "dispatch_all", "ffn_in", "fc2_in", "fc2_out", "shared_out.fc2_in", "shared_partial.fc2_in",
    "ffn_out.fc2_in", "ffn_partial.fc2_in", "heads", "heads_a2a", "qkv_part",
})  # fmt: skip
"""Tensors of a layer that the paper's set leaves out, without their piece."""


def base(name: str) -> str:
    """A tensor's name without layer and piece."""
    return stem(name).split("@")[0]


def keeps_all(op: Op, name: str) -> bool:
    """Policy "none"."""
    return True


def keeps_paper(op: Op, name: str) -> bool:
    """Policy "paper"."""
    return not name.startswith("layers.") or base(name) not in DROPPED


def keeps_inputs(op: Op, name: str) -> bool:
    """Policy "full": layers begin with a hidden state, whose name is not of a layer."""
    return not name.startswith("layers.")


def keeps_within(
    budget: int, forward: Sequence[Op], backward: Sequence[Op], given: Sequence[str], sizes: Mapping[str, int],
    seconds: Seconds,
) -> Keeps:
    """Policy "budget": drop the kind of tensor that frees most bytes per second of doing it again, until the rest fits.

    The last kind dropped often frees more than is needed: what of all that was dropped still fits is kept after all,
    layer by layer, the most expensive kinds first.

    Args:
        sizes: bytes of each tensor of the forward list. budget: bytes of what may be kept of layers.

    Raises:
        ConfigError: nothing that can be dropped makes the rest fit.
    """
    dropped: list[str] = []
    spared: set[str] = set()

    def keeps(op: Op, name: str) -> bool:
        return not name.startswith("layers.") or base(name) not in dropped or name in spared

    def held() -> tuple[int, float]:
        """Bytes kept of layers, and seconds of what is made again."""
        made = rematerialize(forward, backward, keeps, given)
        names = {name for name in kept_names(forward, made) if name.startswith("layers.")}
        again = sum(seconds(op) for op in made if op.phase == Phase.R)
        return sum(sizes.get(name, 0) for name in names), again

    wanted = [name for name in kept_names(forward, backward) if name.startswith("layers.")]
    candidates = sorted({base(name) for name in wanted})
    now = held()
    while now[0] > budget:
        best: tuple[float, str, tuple[int, float]] | None = None
        for candidate in (name for name in candidates if name not in dropped):
            dropped.append(candidate)
            then = held()
            dropped.pop()
            if then[0] < now[0]:
                worth = (then[1] - now[1]) / (now[0] - then[0])
                best = min(best or (worth, candidate, then), (worth, candidate, then))
        if best is None:
            raise ConfigError(
                f"overlap.activation_bytes = {budget}: with everything made again a micro-batch still keeps {now[0]:,} "
                "bytes of this rank's layers; give at least that"
            )
        dropped.append(best[1])
        now = best[2]
    for name in sorted((name for name in wanted if base(name) in dropped), key=lambda n: -dropped.index(base(n))):
        spared.add(name)
        then = held()
        if then[0] <= budget and then[1] < now[1]:
            now = then
        else:
            spared.discard(name)
    return keeps
