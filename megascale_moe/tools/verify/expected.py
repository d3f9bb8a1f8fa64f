"""Which part of a single rank's tensors each value of a rank should be.

Strategies declare it with the values (`engine.value.Shard`): which tokens or routed rows, which columns, and over
which axis values or gradients still have to be summed. Here these words become indices: tokens are counted on the mesh,
routed rows on the experts that the single rank's list chose. Row maps and collectives are thereby checked, not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes
from megascale_moe.engine.names import in_layer, parse
from megascale_moe.engine.value import Rows, Shard, Value
from megascale_moe.kernels.rows import RowMap, row_map
from megascale_moe.model.router import within_capacity
from megascale_moe.strategies.placement import share
from megascale_moe.tools.verify.layouts import Case
from megascale_moe.tools.verify.reference import Reference


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
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def of(self, whole: Tensor) -> Tensor:
        """Return the part of it that should be here."""
        part = whole.index_select(0, self.rows)
        return part if self.columns is None else part.index_select(1, self.columns)


class Expected:
    """The parts that one micro-batch of one rank should have."""

    def __init__(
        self, case: Case, axes: Axes, rank: int, micro: int, reference: Reference, declared: Mapping[str, Value]
    ) -> None:
        self.case, self.axes, self.rank, self.micro, self.reference = case, axes, rank, micro, reference
        self.declared = declared
        self._routed: dict[int | None, _RoutedRows] = {}

    def part(self, name: str) -> ExpectedPart | None:
        """Return what a value, named without its micro-batch, should be; None if nothing compares with it."""
        value = self.declared.get(name)
        if value is None or value.shard is None:
            return None
        shard, found = value.shard, parse(name)
        names = tuple(in_layer(found.layer, whole) for whole in shard.whole or (found.tensor,))
        if not all(whole in self.reference.values for whole in names):
            return None
        columns = None
        if shard.columns is not None:
            columns = torch.cat([torch.arange(part.start, part.stop) for part in shard.columns])
        return ExpectedPart(names, shard, self._rows(shard.rows, found.layer), columns)

    def _rows(self, rows: Rows, layer: int | None) -> Tensor:
        """The rows of a single rank's tensor that are meant."""
        if rows.kind == "slice":
            return self.tokens_of(self.rank)
        ranks = self.case.mesh.ranks(rows.axis, self.rank)
        chosen = [ranks[place] for place in rows.places] or list(ranks)
        if rows.kind in ("gathered", "sequences"):
            tokens = torch.cat([self.tokens_of(rank) for rank in chosen])
            return tokens.sort().values if rows.kind == "sequences" else tokens
        if layer not in self._routed:
            self._routed[layer] = _RoutedRows(self, layer)
        routed, ep = self._routed[layer], self.axes["ep"]
        experts = self.case.model.experts
        if rows.kind == "own":
            parts = [share(experts, ep.size, place // self.axes["etp"].size) for place in rows.places]
            return torch.cat([routed.by_expert([self.rank], part) for part in parts or [range(experts)]])
        local = share(experts, ep.size, ep.index)
        if rows.kind == "arrived":
            return torch.cat([routed.by_expert([rank], local) for rank in chosen])
        return routed.by_expert(chosen, local)

    def tokens_of(self, rank: int) -> Tensor:
        """Return the numbers in the global batch of the tokens that a rank holds between modules, in its order."""
        case, length = self.case, self.case.model.sequence_length
        replica, index = divmod(rank % case.mesh.stage, case.mesh.node)
        first = replica * case.share + self.micro * case.rows
        return case.slices.take(torch.arange(case.rows * length), index) + first * length


class _RoutedRows:
    """The routed rows of one layer as numbers of rows of the single rank's list."""

    def __init__(self, expected: Expected, layer: int | None) -> None:
        c, values = expected.case.model, expected.reference.values
        self.expected = expected
        choice, gate = values[in_layer(layer, "choice")], values[in_layer(layer, "gate")]
        rows = len(choice) // c.sequence_length
        kept = within_capacity(choice, gate, rows, c) if c.capacity_factor else None
        of_all: RowMap = row_map(choice, 0, c.experts, kept)
        expert = choice.flatten()[of_all.slot]
        self.number = torch.full((len(choice), c.experts), -1)
        self.number[of_all.source, expert] = torch.arange(len(expert))

    def by_expert(self, ranks: Iterable[int], experts: range) -> Tensor:
        """Return the rows of some ranks' tokens on some experts, expert by expert."""
        tokens = torch.cat([self.expected.tokens_of(rank) for rank in ranks])
        numbers = self.number[tokens][:, experts.start : experts.stop].t().flatten()
        return numbers[numbers >= 0]
