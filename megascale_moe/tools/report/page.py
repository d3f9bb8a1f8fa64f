"""The page: one HTML file with its styles, its script and its data inside.

Text is written here, pictures are drawn by page.js where they are read, because only there the width is known. The
data lies in the page as JSON: whoever has the page can check it. Nothing is fetched, and nothing of a run's names is
ever HTML: Python escapes them, the script sets them as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, to_toml
from megascale_moe.model.counts import counts
from megascale_moe.tools.report import words
from megascale_moe.tools.report.words import count, duration
from megascale_moe.train.timeline import bundles

POINTS = 1000
"""Most steps of a curve; more are drawn as means of neighbours."""

COLUMNS = 240
"""Most columns of the map of expert loads."""

CURVES = ("loss", "tokens_per_s", "grad_norm")
Records = list[dict[str, Any]]
Tile = tuple[str, str, str]
"""Name, value, note."""


def page(data: dict[str, Any]) -> str:
    """Return the HTML of a report's data."""
    folder = Path(__file__).parent
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js", "charts.js")}
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # so that no HTML parser sees anything in it
        embedded = embedded.replace(character, f"\\u{ord(character):04x}")
    tile = '<div class="tile"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'
    return Template(parts["html"]).substitute(
        _escaped(data["text"]), css=parts["css"], script=parts["js"] + parts["charts.js"], data=embedded,
        tiles="".join(tile.format(**_escaped(each)) for each in data["tiles"]),
        hidden=" ".join(f"no-{name}" for name in ("kinds", "memory", "metrics", "load") if not data[name]),
    )  # fmt: skip


def _escaped(texts: dict[str, str]) -> dict[str, str]:
    return {name: html.escape(text) for name, text in texts.items()}


def assemble(config: Config, mesh: Mesh, timeline: dict[str, Any], records: Records, where: str) -> dict[str, Any]:
    """Return the data of a page; no `records`: of a plan."""
    size, train, memory = counts(config.model), config.train, timeline.get("memory", {})
    text = {
        "title": config.model.preset or "custom model", "where": where, "layout": words.layout(config, mesh),
        "what": "training run" if records else "plan, nothing was run",
        "model": f"{count(size.parameters_total)} parameters, {count(size.parameters_active)} active per token",
        "batch": f"{train.global_batch:,} sequences of {config.model.sequence_length:,} tokens per step, "
                 f"{train.dtype.upper()}",
        "overlap": words.overlap(config, timeline["pieces"]), "source": timeline["source"],
        "rank": str(timeline["rank"]), "see_timeline": words.of_timeline(timeline), "see_part": words.of_part(timeline),
        "see_measured": words.of_measured(timeline), "see_kinds": words.of_kinds(timeline), "config": to_toml(config),
        "see_memory": words.of_memory(memory, config.overlap.remat) if memory else "",
        "see_loss": words.of_loss(records), "see_speed": words.of_speed(records),
        "see_norm": words.of_norm(records, train.clip_norm), "see_load": words.of_load(records),
        "bundled": f"Every point is the mean of {len(bundles(records, POINTS)[0])} steps." if len(records) > POINTS
                   else "",
    }  # fmt: skip
    last = words.outcome(records) if records else {}
    tiles = _run_tiles(last) if records else _plan_tiles(config, mesh, timeline)
    names = ("name", "value", "note")
    return {
        "kind": "run" if records else "plan", "text": text, "timeline": timeline, "memory": memory, "last": last,
        "kinds": timeline["overlapped"]["kinds"], "remat": config.overlap.remat, "clip": train.clip_norm,
        "tiles": [dict(zip(names, tile, strict=True)) for tile in [*tiles, _simulated(timeline)]],
        "metrics": curves(records), "load": _loads(records),
    }  # fmt: skip


def _run_tiles(last: dict[str, Any]) -> list[Tile]:
    speed, step, exposed = last["tokens_per_s"], last["step_s"], last["exposed_comm_share"]
    loss, evaluation = ("–" if last[name] is None else f"{last[name]:.3f}" for name in ("loss", "eval_loss"))
    return [
        ("Steps", f"{last['step']:,}", "optimizer steps"),
        ("Loss", loss, "of the last step"),
        ("Evaluation loss", evaluation, "on text it has not seen"),
        ("Tokens/s", "–" if speed is None else count(speed), f"{duration(step)} per step" if step else ""),
        ("Exposed communication", "–" if exposed is None else f"{exposed:.1%}", "of a step, measured"),
    ]


def _plan_tiles(config: Config, mesh: Mesh, timeline: dict[str, Any]) -> list[Tile]:
    totals = timeline["overlapped"]["totals"]
    tokens = config.train.global_batch * config.model.sequence_length
    return [
        ("Ranks", f"{mesh.world:,}", "of the job"),
        ("Step", duration(totals["seconds"]), "estimate, without pipeline bubbles"),
        ("Tokens/s", count(tokens / totals["seconds"]), "estimate, without pipeline bubbles"),
        ("Exposed communication", words.share(totals["exposed"], totals["seconds"]), "of a step, estimate"),
    ]


def _simulated(timeline: dict[str, Any]) -> Tile:
    before, after = (duration(timeline[name]["totals"]["seconds"]) for name in ("plain", "overlapped"))
    if before.split()[1] == after.split()[1]:
        before = before.split()[0]
    return "Without → with overlap", f"{before} → {after}", "of a step, simulated"


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(records: Records) -> dict[str, Any]:
    """Return columns of the metrics, at most `POINTS` points; evaluations as pairs."""
    if not records:
        return {}
    points = bundles(records, POINTS)
    columns: dict[str, Any] = {name: [_mean(r[name] for r in bundle) for bundle in points] for name in CURVES}
    evaluations = [[r["step"], r["eval_loss"]] for r in records if r.get("eval_loss") is not None]
    return columns | {"step": [bundle[-1]["step"] for bundle in points], "eval_loss": evaluations}


def _loads(records: Records) -> dict[str, Any]:
    """Return step x layer of the busiest expert's load over the mean."""
    records = [record for record in records if record.get("expert_load")]
    if not records:
        return {}
    columns = bundles(records, COLUMNS)
    layers = [
        [_mean(r["expert_load"][layer] for r in bundle) for bundle in columns]
        for layer in range(len(records[0]["expert_load"]))
    ]
    return {"step": [[bundle[0]["step"], bundle[-1]["step"]] for bundle in columns], "layers": layers}


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values; a lone value stays as it is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
