"""Where every named tensor of a rank's list lies in the tensors of the one-rank list.

A strategy leaves three kinds of tensors on a rank, and says by their names which is which:

    a part      some tokens (its slice of every row, whole rows of its node, all tokens of its group in rank order), or
                some routed rows, of all columns or of a share of heads or widths. Its gradient is the same part of the
                gradient, unless ranks hold copies of it: then each has what its own work adds, and their sum is right.
    a sum       a partial result: only the sum over an axis is right. Its gradient is a part, the same on all ranks.
    of its own  row maps, local graphs, statistics: nothing of one rank compares with them.

The table below is written from what the strategies mean, not from how they compute it: tokens are counted on the mesh,
routed rows on the experts that the one-rank list chose, heads and widths by equal shares. Row maps and collectives are
thereby checked, not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes
from megascale_moe.kernels.rows import RowMap, row_map
from megascale_moe.model.router import within_capacity
from megascale_moe.strategies.heads import heads_of_rank
from megascale_moe.strategies.placement import share
from megascale_moe.tools.verify.layouts import Case
from megascale_moe.tools.verify.reference import Reference

OWN = ("rows", "z", "auxiliary", "load", "head_part", "loss")
"""Names (behind the layer) of tensors that only mean something on their rank; the loss is compared as a whole."""


@dataclass(frozen=True)
class Place:
    """What a tensor should be.

    Attributes:
        names: tensors of the one-rank list; several are added up.
        rows: int64, their rows that lie here, in order. columns: those of dimension 1; None: all.
        total: the axis whose ranks' values add up to it, "" if it is a part.
        gradient_total: the axis whose ranks' gradients add up to the gradient.
        copies: whether several ranks of the node may hold the same column.
        routing: whether columns are a token's choices, whose order may differ where scores are equal.
    """

    names: tuple[str, ...]
    rows: Tensor
    columns: Tensor | None = None
    total: str = ""
    gradient_total: str = ""
    copies: bool = False
    routing: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor of the one-rank list."""
        part = whole.index_select(0, self.rows)
        return part if self.columns is None else part.index_select(1, self.columns)


class Whereabouts:
    """The table for one micro-batch of one rank."""

    def __init__(self, case: Case, axes: Axes, rank: int, micro: int, reference: Reference) -> None:
        self.case, self.axes, self.rank, self.micro, self.reference = case, axes, rank, micro, reference
        self.model = case.model
        self.node = axes["node"].size
        self.tensor_attention = case.parallel.attention == "tp" and self.node > 1
        self._routed: dict[str, Routed] = {}
        self.tensor_ffn = case.parallel.ffn == "tp" and axes["etp"].size > 1

    def place(self, name: str) -> Place | None:
        """Of a tensor, named without its micro-batch; None if nothing compares with it."""
        prefix, suffix = split(name)
        if suffix in OWN or suffix.endswith(".graph"):
            return None
        dense = bool(prefix) and int(prefix.split(".")[1]) < self.model.dense_layers
        tables = [self._ends] if not prefix else [self._attention, self._dense if dense else self._moe]
        for table in tables:
            found = table(prefix, suffix)
            if found is not None:
                return found
        return Place((name,), self.slice) if name in self.reference.values else None

    # --- rows ----------------------------------------------------------------------------------------------------

    def tokens_of(self, rank: int) -> Tensor:
        """Numbers in the global batch of the tokens a rank holds between operators, in its order."""
        case, length = self.case, self.model.sequence_length
        replica, index = divmod(rank % case.mesh.stage, case.mesh.node)
        first = replica * case.share + self.micro * case.rows
        width = length // case.mesh.node
        rows = torch.arange(first, first + case.rows)[:, None] * length
        return (rows + torch.arange(index * width, (index + 1) * width)).flatten()

    @cached_property
    def slice(self) -> Tensor:
        """This rank's slice of every row."""
        return self.tokens_of(self.rank)

    @cached_property
    def whole_rows(self) -> Tensor:
        """Whole rows, as ranks of a node have them together."""
        return self.slice if self.node == 1 else self.gathered("node").sort().values

    def gathered(self, axis: str) -> Tensor:
        """The tokens of all ranks of an axis, in rank order."""
        return torch.cat([self.tokens_of(rank) for rank in self.case.mesh.ranks(axis, self.rank)])

    # --- columns -------------------------------------------------------------------------------------------------

    def _share(self, size: int, axis: str, parts: int = 1) -> Tensor:
        """This rank's equal share of each of `parts` equal parts of a dimension."""
        a, width = self.axes[axis], size // parts
        mine = share(width, a.size, a.index)
        return torch.cat([torch.arange(part * width + mine.start, part * width + mine.stop) for part in range(parts)])

    # --- tables --------------------------------------------------------------------------------------------------

    def _ends(self, _: str, name: str) -> Place | None:
        """Embedding and head."""
        sharded = self.case.parallel.vocabulary == "sharded" and self.node > 1
        if not sharded:
            return None
        everyone = self.gathered("node")
        return {
            "embedding_partial": Place(("hidden_0",), everyone, total="node"),
            "final_ag": Place(("final",), everyone, gradient_total="node"),
            "final_ag.slope": Place(("final.slope",), everyone, total="node"),
            "head_logits": Place(("head_logits",), everyone, self._share(self.model.vocab, "node")),
            "head_normalizer": Place(("head_normalizer",), everyone),
        }.get(name)

    def _attention(self, p: str, name: str) -> Place | None:
        if self.node == 1:
            return None
        return self._tensor_attention(p, name) if self.tensor_attention else self._sequence_attention(p, name)

    def _sequence_attention(self, p: str, name: str) -> Place | None:
        c, rows = self.model, self.whole_rows
        mine, keys = heads_of_rank(self.axes["node"].index, self.node, c)
        queries, copied = torch.tensor(list(mine)), torch.tensor(list(keys))
        return {
            "q_a2a": Place((f"{p}q",), rows, queries),
            "k_a2a": Place((f"{p}k",), rows, copied, copies=True),
            "v_a2a": Place((f"{p}v",), rows, copied, copies=True),
            "attn_a2a": Place((f"{p}attn",), self.slice),
            "attn": Place((f"{p}attn",), rows, self._share(c.heads * c.value_dim, "node")),
        }.get(name)

    def _tensor_attention(self, p: str, name: str) -> Place | None:
        c, rows = self.model, self.whole_rows
        heads, keys = self._share(c.heads, "node"), self._share(c.key_heads, "node")
        sizes = (c.heads * c.query_dim, c.kv_heads * c.query_dim, c.kv_heads * c.value_dim)
        starts = (0, sizes[0], sizes[0] + sizes[1])
        fused = [start + self._share(size, "node") for start, size in zip(starts, sizes, strict=True)]
        expanded = c.heads * (c.qk_nope_head_dim + c.value_dim)
        places = {
            "qkv": Place((f"{p}qkv",), rows, torch.cat(fused)),
            "q_flat": Place((f"{p}q_flat",), rows, self._share(c.heads * c.query_dim, "node")),
            "kv_flat": Place((f"{p}kv_flat",), rows, self._share(expanded, "node")),
            "q": Place((f"{p}q",), rows, heads),
            "k": Place((f"{p}k",), rows, keys),
            "v": Place((f"{p}v",), rows, keys),
            "attn": Place((f"{p}attn",), rows, self._share(c.heads * c.value_dim, "node")),
            "attn_partial": Place((f"{p}attn_out",), rows, total="node"),
        }
        for latent in ("ln1_out", "q_low_norm", "kv_latent", "k_shared"):
            places[f"{latent}_ag"] = Place((f"{p}{latent}",), rows, gradient_total="node")
        places["ln1_out_again"] = places["ln1_out_ag"]  # gathered once more for the weight gradient
        return places.get(name)

    def _dense(self, p: str, name: str) -> Place | None:
        """The FFN of a layer without experts."""
        if not self.tensor_ffn:
            return None
        if name == "ln2_out_ag":
            return Place((f"{p}ln2_out",), self.gathered("etp"), gradient_total="etp")
        return self._width_sharded(p, name, "ffn_partial", "ffn_out", self.model.dense_ffn_hidden)

    def _width_sharded(self, p: str, name: str, here: str, alone: str, width: int) -> Place | None:
        """A SwiGLU for all gathered tokens with a share of its width; `here` and `alone` are names of its result."""
        rows = self.gathered("etp")
        return {
            here: Place((f"{p}{alone}",), rows, total="etp"),
            f"{here}.ungated": Place((f"{p}{alone}.ungated",), rows, total="etp"),
            f"{here}.fc13_out": Place((f"{p}{alone}.fc13_out",), rows, self._share(2 * width, "etp", 2)),
            f"{here}.fc2_in": Place((f"{p}{alone}.fc2_in",), rows, self._share(width, "etp")),
        }.get(name)

    def _moe(self, p: str, name: str) -> Place | None:
        if self.axes["ffn"].size > 1:
            found = self._dispatched(p, name)
            if found is not None:
                return found
        if name in ("gate", "choice"):
            return Place((f"{p}{name}",), self.slice, routing=True)
        return self._expert_rows(p, name)

    def _dispatched(self, p: str, name: str) -> Place | None:
        everyone = self.gathered("ffn")
        shared = self.tensor_ffn and self.model.shared_hidden > 0
        if shared and name.startswith("shared_partial"):
            return self._width_sharded(p, name, "shared_partial", "shared_out", self.model.shared_hidden)
        both = (f"{p}ffn_out", f"{p}shared_out") if shared else (f"{p}ffn_out",)
        return {
            "gate_all": Place((f"{p}gate",), everyone, gradient_total="ffn", routing=True),
            "choice_all": Place((f"{p}choice",), everyone, routing=True),
            "ln2_out_ag": Place((f"{p}ln2_out",), everyone, gradient_total="ffn"),
            "fc2_out_gathered": Place((f"{p}ffn_out",), everyone, total="ffn"),
            "ffn_partial": Place(both, everyone, total="ffn"),
            "ffn_out": Place(both, self.slice),
        }.get(name)

    def _expert_rows(self, p: str, name: str) -> Place | None:
        """Routed rows: own by expert, as they arrive from each rank, and by expert."""
        width, routed = self.model.ffn_hidden, self.routed(p)
        orders = {
            "ffn_in": ("experts", "ffn_in"), "fc13_out": ("experts", "fc13_out"), "fc2_in": ("experts", "fc2_in"),
            "fc2_out": ("experts", "fc2_out"), "dispatch_in": ("own", "ffn_in"), "dispatch_out": ("arrived", "ffn_in"),
            "dispatch_all": ("all", "ffn_in"), "combine_all": ("all", "fc2_out"),
            "combine_in": ("arrived", "fc2_out"), "combine_out": ("own", "fc2_out"),
        }  # fmt: skip
        if name not in orders:
            return None
        order, alone = orders[name]
        place = Place((f"{p}{alone}",), routed.rows(order))
        if self.axes["etp"].size == 1:
            return place
        if name in ("fc13_out", "fc2_in"):
            parts = 2 if name == "fc13_out" else 1
            return replace(place, columns=self._share(parts * width, "etp", parts))
        total = "etp" if name in ("fc2_out", "combine_all") else ""
        gradient_total = "etp" if name in ("ffn_in", "dispatch_all") else ""
        return replace(place, total=total, gradient_total=gradient_total)

    def routed(self, p: str) -> Routed:
        """The routed rows of a layer."""
        if p not in self._routed:
            self._routed[p] = Routed(self, p)
        return self._routed[p]


class Routed:
    """Routed rows of one layer as numbers of rows of the one-rank list, in the orders in which ranks have them."""

    def __init__(self, where: Whereabouts, p: str) -> None:
        c, values = where.model, where.reference.values
        self.where, self.axes, self.experts = where, where.axes, c.experts
        choice, gate = values[f"{p}choice"], values[f"{p}gate"]
        rows = len(choice) // c.sequence_length
        kept = within_capacity(choice, gate, rows, c) if c.capacity_factor else None
        of_all: RowMap = row_map(choice, 0, c.experts, kept)
        expert = choice.flatten()[of_all.slot]
        self.number = torch.full((len(choice), c.experts), -1)
        self.number[of_all.source, expert] = torch.arange(len(expert))

    def rows(self, order: str) -> Tensor:
        """`order`: "own", "arrived" (from the same place of the expert-parallel ranks), "all" or "experts"."""
        where, mesh = self.where, self.where.case.mesh
        if order == "own":
            return self._by_expert([where.rank], range(self.experts))
        local = share(self.experts, self.axes["ep"].size, self.axes["ep"].index)
        group = mesh.ranks("ffn", where.rank)
        if order == "experts":
            return self._by_expert(group, local)
        if order == "arrived":
            return torch.cat([self._by_expert([rank], local) for rank in mesh.ranks("ep", where.rank)])
        etp = self.axes["etp"].size
        return torch.cat([self._by_expert([rank], local) for place in range(etp) for rank in group[place::etp]])

    def _by_expert(self, ranks: Iterable[int], experts: range) -> Tensor:
        tokens = torch.cat([self.where.tokens_of(rank) for rank in ranks])
        numbers = self.number[tokens][:, experts.start : experts.stop].t().flatten()
        return numbers[numbers >= 0]


def split(name: str) -> tuple[str, str]:
    """"layers.3.ln1_out" -> ("layers.3.", "ln1_out"); ("", name) outside of the layers."""
    if not name.startswith("layers."):
        return "", name
    layers, index, suffix = name.split(".", 2)
    return f"{layers}.{index}.", suffix
