"""The results of `verify`: a table and a line for people, one JSON document for programs."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megascale_moe.config import Config, WireConfig
from megascale_moe.tools.verify.explain import Difference
from megascale_moe.tools.verify.layouts import Case
from megascale_moe.tools.verify.rank import TOLERANCE, Errors, parameter_group
from megascale_moe.tools.verify.reference import Reference

SIZES = (
    "hidden", "heads", "kv_heads", "experts", "top_k", "ffn_hidden", "vocab", "sequence_length", "attention", "qk_norm",
    "shared_experts", "dense_layers", "capacity_factor", "sliding_window",
    "full_attention_every",
)  # fmt: skip


@dataclass(frozen=True)
class LayoutResult:
    """The result of one layout; `own` if it is that of the config."""

    case: Case
    errors: Errors
    own: bool
    seconds: float
    difference: Difference | None = None

    @property
    def worst(self) -> str:
        """The parameter with the largest gradient error."""
        return max(self.errors.gradients, key=self.errors.gradients.__getitem__)

    @property
    def groups(self) -> dict[str, float]:
        """The largest gradient error of each group of parameters."""
        found: dict[str, float] = {}
        for name, error in self.errors.gradients.items():
            group = parameter_group(name)
            found[group] = max(found.get(group, 0.0), error)
        return found

    def document(self) -> dict[str, Any]:
        """For JSON."""
        e = self.errors
        return {
            "layout": self.case.words, "own": self.own, "passed": e.passed, "output_error": _finite(e.output),
            "loss_error": _finite(e.loss), "max_grad_error": _finite(e.gradients[self.worst]),
            "worst_parameter": self.worst, "worst_group": parameter_group(self.worst),
            "gradient_errors": {group: _finite(error) for group, error in self.groups.items()},
            "reduced_gradient_errors": {group: _finite(error) for group, error in e.shards.items()},
            "grad_norm_error": _finite(e.norm),
            "update_errors": {group: _finite(error) for group, error in e.update.items()},
            "layers": self.case.model.layers, "micro_batches": self.case.micros, "micro_batch": self.case.rows,
            "first_difference": self.difference.document() if self.difference else None, "seconds": self.seconds,
        }  # fmt: skip


@dataclass
class VerifyOutcome:
    """The results of all layouts.

    Attributes:
        count: layouts that were to be verified. note: why the config's own layout is not among them.
        error: what ended a rank before the end, "" if nothing did.
    """

    config: Config
    ranks: int
    count: int
    note: str
    references: list[Reference]
    results: list[LayoutResult] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def list_error(self) -> float:
        """The error of the one-rank list against the plain model."""
        return max(reference.list_error for reference in self.references)

    @property
    def failed(self) -> list[LayoutResult]:
        """Layouts that differ."""
        return [result for result in self.results if not result.errors.passed]

    @property
    def passed(self) -> bool:
        """Whether every layout was verified and none differs."""
        complete = len(self.results) == self.count and not self.error
        return complete and not self.failed and self.list_error <= TOLERANCE

    @property
    def first_difference(self) -> Difference | None:
        """The first difference of the first layout that fails."""
        return next((result.difference for result in self.failed if result.difference), None)

    @property
    def worst(self) -> float:
        """The largest error of all."""
        return max((max(result.errors.step, result.errors.sync) for result in self.results), default=0.0)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        first, model = self.first_difference, self.references[0].model
        return {
            "passed": self.passed, "ranks": self.ranks, "tolerance": TOLERANCE, "worst_error": _finite(self.worst),
            "one_rank_error": _finite(self.list_error), "own_layout": self.note or "verified first",
            "model": {name: getattr(model, name) for name in SIZES},
            "layouts": [result.document() for result in self.results],
            "first_difference": first.document() if first else None, "error": self.error or None,
            "seconds": self.seconds,
        }  # fmt: skip


def show(outcome: VerifyOutcome, as_json: bool) -> int:
    """Print everything; the exit status. With JSON the table goes to standard error."""
    stream = sys.stderr if as_json else sys.stdout
    # Through a pipe nothing tells the width: do not cut lines for a terminal that is not there.
    console = Console(file=stream, width=None if stream.isatty() else 200, highlight=False, soft_wrap=True)
    console.print(_table(outcome.results))
    for line in _summary(outcome):
        console.print(Text(line))
    if as_json:
        print(json.dumps(outcome.document(), allow_nan=False), flush=True)
    return 0 if outcome.passed else 1


def _table(results: list[LayoutResult]) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("pp", "dp", "node", "attention", "ffn", "ep", "etp", "dispatch", "vocabulary", "schedule")
    for column in (*names, "output", "loss", "gradient", "worst parameter", "optimizer", "verdict"):
        table.add_column(column, overflow="fold")
    for result in results:
        e, words = result.errors, result.case.words
        verdict = Text("ok", style="green") if e.passed else Text("differs", style="bold red")
        if result.own:
            verdict.append(" (yours)", style="")
        numbers = (e.output, e.loss, e.gradients[result.worst])
        table.add_row(
            *(str(words[name]) for name in names), *(f"{number:.1e}" for number in numbers), result.worst,
            f"{e.sync:.1e}", verdict,
        )  # fmt: skip
    return table


def _summary(outcome: VerifyOutcome) -> list[str]:
    model, good = outcome.references[0].model, len(outcome.results) - len(outcome.failed)
    lines = [
        f"verified with {outcome.ranks} ranks and the model scaled down to hidden {model.hidden}, {model.heads} heads, "
        f"{model.kv_heads} key heads, {model.experts} experts, top {model.top_k}, {model.sequence_length} tokens, FP32"
    ]
    o = outcome.config.overlap
    if (o.order, o.split, o.remat) != ("serial", "none", "none"):
        pairs = ", two micro-batches at once" if o.in_pairs else ""
        lines.append(f"every layout with order {o.order!r}, split {o.split!r} and remat {o.remat!r}{pairs}")
    if outcome.config.wire != WireConfig():
        lines.append("wire formats are left out: what they round, docs/numerics.md measures")
    if outcome.note:
        lines.append(f"the config's own layout is not among them: {outcome.note}")
    if not all(reference.decided for reference in outcome.references):
        lines.append("some routing lies within rounding, so a difference may mean nothing: try another train.seed")
    if outcome.list_error > TOLERANCE:
        lines.append(f"the list of one rank differs from the plain model by {outcome.list_error:.1e}")
    lines += [f"differs: {_words(result)}: {_why(result)}" for result in outcome.failed]
    if outcome.error:
        lines.append(f"stopped: {outcome.error}")
    verdict = "all right" if outcome.passed else "NOT right"
    lines.append(
        f"{verdict}: {good} of {outcome.count} layouts within {TOLERANCE:.0e}, largest error {outcome.worst:.1e}, "
        f"{outcome.seconds:.0f} s"
    )
    return lines


def _words(result: LayoutResult) -> str:
    return " ".join(f"{name}={value}" for name, value in result.case.words.items())


def _why(result: LayoutResult) -> str:
    if result.difference:
        return result.difference.text
    e = result.errors
    sizes = {
        "output": e.output, "loss": e.loss, f"gradient of {result.worst}": e.gradients[result.worst],
        "gradient norm": e.norm, **{f"reduced gradients of group {name}": error for name, error in e.shards.items()},
        **{f"updated weights of group {name}": error for name, error in e.update.items()},
    }  # fmt: skip
    worst = max(sizes, key=sizes.__getitem__)
    return f"{worst} by {sizes[worst]:.1e}, but run again, every operator's result is right"


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if math.isfinite(error) else None
