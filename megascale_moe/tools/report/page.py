"""The page: one HTML file with its styles, its script and its data inside.

Text is written here, pictures are drawn by page.js where they are read, because only there the width is known. The
data lies in the page as JSON: whoever has the page can check it. Nothing is fetched, and nothing of a run's names is
ever HTML: Python escapes them, the script sets them as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, to_toml
from megascale_moe.model.counts import counts
from megascale_moe.tools.report import words
from megascale_moe.tools.report.words import count, duration

POINTS = 1000
"""Most steps of a curve; more are drawn as means of neighbours."""

COLUMNS = 240
"""Most columns of the map of expert loads."""

CURVES = ("loss", "tokens_per_s", "grad_norm")


def page(data: dict[str, Any]) -> str:
    """HTML of a report's data."""
    folder = Path(__file__).parent
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js", "charts.js")}
    escaped = {name: html.escape(text) for name, text in data["text"].items()}
    return Template(parts["html"]).substitute(
        escaped, css=parts["css"], script=parts["js"] + parts["charts.js"], data=_embedded(data),
        tiles="".join(map(_tile, data["tiles"])),
        hidden=" ".join(f"no-{name}" for name in ("kinds", "memory", "metrics", "load") if not data[name]),
    )  # fmt: skip


def _embedded(data: dict[str, Any]) -> str:
    """JSON that no HTML parser sees anything in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _tile(tile: dict[str, str]) -> str:
    name, value, note = (html.escape(tile[key]) for key in ("name", "value", "note"))
    return f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'


def assemble(
    config: Config, mesh: Mesh, timeline: dict[str, Any], memory: dict[str, Any], records: list[dict[str, Any]],
    where: str,
) -> dict[str, Any]:
    """Data of a page; no `records`: of a plan."""
    size = counts(config.model)
    loads = _loads(records)
    kinds = timeline["overlapped"]["kinds"]
    t = config.train
    text = {
        "title": config.model.preset or "custom model", "where": where, "layout": words.layout(config, mesh),
        "what": "training run" if records else "plan, nothing was run",
        "model": f"{count(size.parameters_total)} parameters, {count(size.parameters_active)} active per token",
        "batch": f"{t.global_batch:,} sequences of {config.model.sequence_length:,} tokens per step, {t.dtype.upper()}",
        "overlap": words.overlap(config, timeline["pieces"]), "source": timeline["source"],
        "rank": str(timeline["rank"]), "see_timeline": words.of_timeline(timeline), "see_part": words.of_part(timeline),
        "see_measured": words.of_measured(timeline), "see_kinds": words.of_kinds(timeline),
        "see_memory": words.of_memory(memory, config.overlap.remat) if memory else "",
        "see_loss": words.of_loss(records) if records else "", "see_speed": words.of_speed(records) if records else "",
        "see_norm": words.of_norm(records, t.clip_norm) if records else "",
        "see_load": words.of_load(records) if records else "", "config": to_toml(config),
        "bundled": f"Every point is the mean of {_width(len(records), POINTS)} steps." if len(records) > POINTS else "",
    }  # fmt: skip
    return {
        "kind": "run" if records else "plan", "text": text, "timeline": timeline, "kinds": kinds, "memory": memory,
        "tiles": _run_tiles(records, timeline) if records else _plan_tiles(config, mesh, timeline),
        "remat": config.overlap.remat, "clip": t.clip_norm, "metrics": curves(records), "load": loads,
        "last": _last(records) if records else {},
    }  # fmt: skip


def _last(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the final figures of a run."""
    held = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    return {
        "step": records[-1]["step"], "loss": records[-1]["loss"], "eval_loss": held[-1] if held else None,
        "tokens_per_s": words.steady(records, "tokens_per_s"), "exposed_comm_share": words.exposed_share(records),
        "step_s": words.steady(records, "step_s"),
    }  # fmt: skip


def _run_tiles(records: list[dict[str, Any]], timeline: dict[str, Any]) -> list[dict[str, str]]:
    last = _last(records)
    speed, step, exposed = last["tokens_per_s"], last["step_s"], last["exposed_comm_share"]
    return [
        _named("Steps", f"{last['step']:,}", "updates of the weights"),
        _named("Loss", _loss(last["loss"]), "of the last step"),
        _named("Evaluation loss", _loss(last["eval_loss"]), "on text it has not seen"),
        _named("Tokens/s", "–" if speed is None else count(speed), f"{duration(step)} per step" if step else ""),
        _named("Exposed communication", "–" if exposed is None else f"{exposed:.1%}", "of a step, measured"),
        _simulated(timeline),
    ]


def _plan_tiles(config: Config, mesh: Mesh, timeline: dict[str, Any]) -> list[dict[str, str]]:
    totals = timeline["overlapped"]["totals"]
    tokens = config.train.global_batch * config.model.sequence_length
    return [
        _named("Ranks", f"{mesh.world:,}", "of the job"),
        _named("Step", duration(totals["seconds"]), "estimate, without pipeline bubbles"),
        _named("Tokens/s", count(tokens / totals["seconds"]), "estimate, without pipeline bubbles"),
        _named("Exposed communication", words.share(totals["exposed"], totals["seconds"]), "of a step, estimate"),
        _simulated(timeline),
    ]


def _simulated(timeline: dict[str, Any]) -> dict[str, str]:
    before, after = (duration(timeline[name]["totals"]["seconds"]) for name in ("plain", "overlapped"))
    if before.split()[1] == after.split()[1]:
        before = before.split()[0]
    return _named("Without → with overlap", f"{before} → {after}", "of a step, simulated")


def _named(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns of the metrics, at most `POINTS` points; evaluations as pairs."""
    if not records:
        return {}
    width = _width(len(records), POINTS)
    bundles = [records[start : start + width] for start in range(0, len(records), width)]
    found: dict[str, Any] = {name: [mean(r[name] for r in bundle) for bundle in bundles] for name in CURVES}
    evaluations = [[r["step"], r["eval_loss"]] for r in records if r.get("eval_loss") is not None]
    return found | {"step": [bundle[-1]["step"] for bundle in bundles], "eval_loss": evaluations}


def _loads(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Step x layer of the busiest expert's load over the mean."""
    records = [record for record in records if record.get("expert_load")]
    if not records:
        return {}
    width = _width(len(records), COLUMNS)
    bundles = [records[start : start + width] for start in range(0, len(records), width)]
    layers = len(records[0]["expert_load"])
    values = [[mean(r["expert_load"][layer] for r in bundle) for bundle in bundles] for layer in range(layers)]
    return {"step": [[bundle[0]["step"], bundle[-1]["step"]] for bundle in bundles], "layers": values}


def _width(length: int, most: int) -> int:
    return -(-length // most) or 1


def mean(values: Iterable[float | None]) -> float | None:
    """Return the median of the finite values; a lone value stays as it is."""
    known: Sequence[float] = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
