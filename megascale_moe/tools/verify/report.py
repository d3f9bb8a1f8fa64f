"""The results of `verify`: a table and a line for people, one JSON document for programs."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megascale_moe.config import Config, ModelConfig, WireConfig
from megascale_moe.tools.verify.explain import Difference
from megascale_moe.tools.verify.layouts import KEYS, Case
from megascale_moe.tools.verify.rank import TOLERANCE, Errors, largest, parameter_group
from megascale_moe.tools.verify.reference import Reference
from megascale_moe.train.output import print_json

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
    difference: Difference | None

    @property
    def worst(self) -> str:
        """The parameter with the largest gradient error."""
        return max(self.errors.gradients, key=self.errors.gradients.__getitem__)

    def document(self) -> dict[str, Any]:
        """Return the result for JSON."""
        errors = self.errors
        return {
            "layout": self.case.words, "own": self.own, "passed": errors.passed, "output_error": errors.output,
            "loss_error": errors.loss, "max_grad_error": errors.gradients[self.worst],
            "worst_parameter": self.worst, "worst_group": parameter_group(self.worst),
            "gradient_errors": largest((parameter_group(name), error) for name, error in errors.gradients.items()),
            "reduced_gradient_errors": errors.shards, "grad_norm_error": errors.norm, "update_errors": errors.update,
            "layers": self.case.model.layers, "micro_batches": self.case.micros, "micro_batch": self.case.rows,
            "first_difference": _difference(self.difference), "seconds": self.seconds,
        }  # fmt: skip

    def why(self) -> str:
        """Return what is wrong, in a line."""
        if self.difference:
            return self.difference.text
        errors = self.errors
        sizes = {
            "output": errors.output, "loss": errors.loss, f"gradient of {self.worst}": errors.gradients[self.worst],
            "gradient norm": errors.norm,
            **{f"reduced gradients of group {name}": error for name, error in errors.shards.items()},
            **{f"updated weights of group {name}": error for name, error in errors.update.items()},
        }  # fmt: skip
        worst = max(sizes, key=sizes.__getitem__)
        return f"{worst} by {sizes[worst]:.1e}, but run again, every operator's result is right"


@dataclass
class Verification:
    """Every case against the reference of its model: the ranks' work, and its results.

    Attributes:
        note: why the config's own layout is not the first case, "" if it is.
        error: what ended a rank before the end, "" if nothing did.
    """

    config: Config
    ranks: int
    cases: list[Case]
    references: dict[ModelConfig, Reference]
    note: str
    results: list[LayoutResult] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def list_error(self) -> float:
        """The error of the one-rank list against the plain model."""
        return max(reference.list_error for reference in self.references.values())

    @property
    def failed(self) -> list[LayoutResult]:
        """Layouts that differ."""
        return [result for result in self.results if not result.errors.passed]

    @property
    def passed(self) -> bool:
        """Whether every layout was verified and none differs."""
        complete = len(self.results) == len(self.cases) and not self.error
        return complete and not self.failed and self.list_error <= TOLERANCE

    @property
    def worst(self) -> float:
        """The largest error of all."""
        return max((result.errors.worst for result in self.results), default=0.0)

    def document(self) -> dict[str, Any]:
        """Return the results for JSON."""
        first = next((result.difference for result in self.failed if result.difference), None)
        return {
            "passed": self.passed, "ranks": self.ranks, "tolerance": TOLERANCE, "worst_error": self.worst,
            "one_rank_error": self.list_error, "own_layout": self.note or "verified first",
            "model": {name: getattr(self.cases[0].model, name) for name in SIZES},
            "layouts": [result.document() for result in self.results],
            "first_difference": _difference(first), "error": self.error or None, "seconds": self.seconds,
        }  # fmt: skip


def show(verification: Verification, as_json: bool) -> int:
    """Print everything and return the exit status; with JSON the table goes to standard error."""
    stream = sys.stderr if as_json else sys.stdout
    # Through a pipe nothing tells the width: do not cut lines for a terminal that is not there.
    console = Console(file=stream, width=None if stream.isatty() else 200, highlight=False, soft_wrap=True)
    console.print(_table(verification.results))
    for line in _summary(verification):
        console.print(Text(line))
    if as_json:
        print_json(_finite(verification.document()))
    return 0 if verification.passed else 1


def _table(results: list[LayoutResult]) -> Table:
    table = Table(box=None, pad_edge=False)
    keys = KEYS[:-1]  # virtual stages follow from the schedule
    for column in (*keys, "output", "loss", "gradient", "worst parameter", "optimizer", "verdict"):
        table.add_column(column, overflow="fold")
    for result in results:
        errors, words = result.errors, result.case.words
        verdict = Text("ok", style="green") if errors.passed else Text("differs", style="bold red")
        if result.own:
            verdict.append(" (yours)", style="")
        output, loss, gradient, sync = (
            f"{x:.1e}" for x in (errors.output, errors.loss, errors.gradients[result.worst], errors.sync)
        )
        table.add_row(*(str(words[key]) for key in keys), output, loss, gradient, result.worst, sync, verdict)
    return table


def _summary(work: Verification) -> list[str]:
    model, overlap = work.cases[0].model, work.config.overlap
    lines = [
        f"verified with {work.ranks} ranks and the model scaled down to hidden {model.hidden}, {model.heads} heads, "
        f"{model.kv_heads} key heads, {model.experts} experts, top {model.top_k}, {model.sequence_length} tokens, FP32"
    ]
    if (overlap.order, overlap.split, overlap.remat) != ("serial", "none", "none"):
        pairs = ", two micro-batches at once" if overlap.in_pairs else ""
        lines.append(
            f"every layout with order {overlap.order!r}, split {overlap.split!r} and remat {overlap.remat!r}{pairs}"
        )
    if work.config.wire != WireConfig():
        lines.append("wire formats are left out: what they round, docs/numerics.md measures")
    if work.note:
        lines.append(f"the config's own layout is not among them: {work.note}")
    if not all(reference.decided for reference in work.references.values()):
        lines.append("some routing lies within rounding, so a difference may mean nothing: try another train.seed")
    if work.list_error > TOLERANCE:
        lines.append(f"the list of one rank differs from the plain model by {work.list_error:.1e}")
    lines += [f"differs: {result.case.text}: {result.why()}" for result in work.failed]
    if work.error:
        lines.append(f"stopped: {work.error}")
    verdict, good = "all right" if work.passed else "NOT right", len(work.results) - len(work.failed)
    lines.append(
        f"{verdict}: {good} of {len(work.cases)} layouts within {TOLERANCE:.0e}, largest error {work.worst:.1e}, "
        f"{work.seconds:.0f} s"
    )
    return lines


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    return {**asdict(difference), "layer": difference.layer, "text": difference.text} if difference else None


def _finite(value: Any) -> Any:
    """Return a document without infinities, which JSON does not have: they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
