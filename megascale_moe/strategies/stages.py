"""Which layers a pipeline stage has.

Stages are numbered along the model; with several per rank (interleaved) stage s lives on pipeline rank s mod pp. The
first has the embedding too, the last the final norm, head and loss, so where layers do not divide evenly those in the
middle get one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from megascale_moe.config import ModelConfig, ParallelConfig, require


@dataclass(frozen=True)
class Part:
    """Some of a model: layers, with the embedding if `first`, with norm, head and loss if `last`."""

    layers: tuple[int, ...]
    first: bool = True
    last: bool = True

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        """Return all of a model."""
        return cls(tuple(range(config.layers)))


def stage_parts(parallel: ParallelConfig, model: ModelConfig) -> list[Part]:
    """Return the part of each stage, pp x virtual_stages of them.

    Raises:
        ConfigError: fewer layers than stages, or parallel.stage_layers that do not add up.
    """
    count = parallel.pp * parallel.virtual_stages
    require(
        model.layers >= count,
        f"model.layers = {model.layers} are fewer than the {count} stages of parallel.pp x parallel.virtual_stages = "
        f"{parallel.pp} x {parallel.virtual_stages}; use at most {model.layers} stages",
    )
    sizes = parallel.stage_layers or _even(model.layers, count)
    given = f"parallel.stage_layers = {list(parallel.stage_layers)}"
    require(len(sizes) == count, f"{given}: must have {count} numbers, one for each of pp x virtual_stages stages")
    require(min(sizes) > 0, f"{given}: every stage needs a layer")
    require(sum(sizes) == model.layers, f"{given}: add up to {sum(sizes)}, model.layers = {model.layers}")
    ends = accumulate(sizes)
    return [
        Part(tuple(range(end - size, end)), first=stage == 0, last=stage == count - 1)
        for stage, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def _even(layers: int, stages: int) -> tuple[int, ...]:
    """Divide layers as evenly as possible; the middle stages get more first, then the first stage, then the last."""
    least, more = divmod(layers, stages)
    order = [*range(1, stages - 1), 0, stages - 1]
    longer = set(order[:more])
    return tuple(least + (stage in longer) for stage in range(stages))


def parts_of_rank(parts: list[Part], pp: int, place: int) -> dict[int, Part]:
    """Return stage -> part of one pipeline rank."""
    return {stage: part for stage, part in enumerate(parts) if stage % pp == place}


def together(parts: dict[int, Part]) -> Part:
    """Return all that one rank holds."""
    layers = tuple(layer for part in parts.values() for layer in part.layers)
    return Part(layers, any(part.first for part in parts.values()), any(part.last for part in parts.values()))
