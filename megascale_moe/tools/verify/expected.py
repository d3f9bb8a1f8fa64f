"""Which part of a single rank's tensors each value of a rank should be.

Strategies declare it with the values (`engine.value.Shard`): which tokens or routed rows, which columns, and over
which axis values or gradients still have to be summed. Here these words become indices: tokens are counted on the mesh,
routed rows on the experts that the single rank's list chose. Row maps and collectives are thereby checked, not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.engine.names import in_layer, parse
from megascale_moe.engine.value import Rows, Shard, Value
from megascale_moe.kernels.rows import row_map
from megascale_moe.model.router import within_capacity
from megascale_moe.strategies.placement import share
from megascale_moe.tools.verify.rank import RankOfLayout


@dataclass(frozen=True)
class ExpectedPart:
    """The part of a single rank's tensors that a value should be.

    Attributes:
        names: the single rank's tensors that it is a part of. shard: as declared.
        rows: int64, their rows that lie here, in order. columns: those of dimension 1; None: all.
    """

    names: tuple[str, ...]
    shard: Shard
    rows: Tensor
    columns: Tensor | None

    def whole(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """Return the single rank's tensor, from those that `tensor` knows by name."""
        parts = [tensor(name) for name in self.names]
        if self.shard.side_by_side:
            return torch.cat([part.flatten(1) for part in parts], dim=1)
        return torch.stack(parts).sum(0)

    def of(self, whole: Tensor) -> Tensor:
        """Return the part of it that should be here."""
        part = whole.index_select(0, self.rows)
        return part if self.columns is None else part.index_select(1, self.columns)


class Expected:
    """The parts that one micro-batch of one rank should have."""

    def __init__(self, run: RankOfLayout, micro: int, declared: Mapping[str, Value]) -> None:
        self.run, self.micro, self.declared = run, micro, declared
        self._numbers: dict[int | None, Tensor] = {}  # by layer

    def part(self, name: str) -> ExpectedPart | None:
        """Return what a value, named without its micro-batch, should be; None if nothing compares with it."""
        value = self.declared.get(name)
        if value is None or value.shard is None:
            return None
        shard, parsed = value.shard, parse(name)
        names = tuple(in_layer(parsed.layer, whole) for whole in shard.whole or (parsed.tensor,))
        if not all(whole in self.run.reference.values for whole in names):
            return None
        columns = None
        if shard.columns is not None:
            columns = torch.cat([torch.arange(part.start, part.stop) for part in shard.columns])
        return ExpectedPart(names, shard, self._rows(shard.rows, parsed.layer), columns)

    def _rows(self, rows: Rows, layer: int | None) -> Tensor:
        """Return the rows of a single rank's tensor that are meant."""
        rank, ep, etp = self.run.rank, self.run.axes["ep"], self.run.axes["etp"]
        if rows.kind == "slice":
            return self._tokens([rank])
        ranks = self.run.case.mesh.ranks(rows.axis, rank)
        chosen = [ranks[place] for place in rows.places] or list(ranks)
        if rows.kind == "gathered":
            return self._tokens(chosen)
        if rows.kind == "sequences":
            return self._tokens(chosen).sort().values
        experts = self.run.case.model.experts
        if rows.kind == "own":
            parts = [share(experts, ep.size, place // etp.size) for place in rows.places] or [range(experts)]
            return torch.cat([self._routed(layer, [rank], part) for part in parts])
        local = share(experts, ep.size, ep.index)
        if rows.kind == "arrived":
            return torch.cat([self._routed(layer, [sender], local) for sender in chosen])
        return self._routed(layer, chosen, local)

    def _tokens(self, ranks: Sequence[int]) -> Tensor:
        return torch.cat([self.run.case.tokens_of(rank, self.micro) for rank in ranks])

    def _routed(self, layer: int | None, ranks: Sequence[int], experts: range) -> Tensor:
        """Return the routed rows of some ranks' tokens on some experts, expert by expert."""
        if layer not in self._numbers:
            self._numbers[layer] = self._routed_numbers(layer)
        numbers = self._numbers[layer][self._tokens(ranks)][:, experts.start : experts.stop].t().flatten()
        return numbers[numbers >= 0]

    def _routed_numbers(self, layer: int | None) -> Tensor:
        """Return which routed row of the single rank's list a token is on an expert, int64 [T, E]; -1: none."""
        model, values = self.run.case.model, self.run.reference.values
        choice, gate = values[in_layer(layer, "choice")], values[in_layer(layer, "gate")]
        rows = len(choice) // model.sequence_length
        taken = within_capacity(choice, gate, rows, model) if model.capacity_factor else None
        routed = row_map(choice, 0, model.experts, taken)
        expert = choice.flatten()[routed.slot]
        numbers = torch.full((len(choice), model.experts), -1)
        numbers[routed.source, expert] = torch.arange(len(expert))
        return numbers
