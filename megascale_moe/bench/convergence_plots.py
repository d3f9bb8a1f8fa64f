"""Plots of `megascale bench convergence`, drawn where matplotlib is installed.

Losses of runs that differ by thousandths lie on each other: drawn is the difference to the FP32 run of the same seed,
inside the band of FP32 runs on the same text from other initial weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMOOTH = 40
"""Parts of a run over which losses are averaged."""


def can_draw() -> bool:
    """Whether matplotlib, an optional package, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _pyplot() -> Any:
    """Return pyplot with a backend that needs no screen. Imported late: matplotlib is optional and slow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(runs: Sequence[dict[str, Any]], folder: Path, baseline: str, controls: Collection[str]) -> list[Path]:
    """Write the plots and return their paths; none if `runs` holds only the baseline.

    Args:
        baseline: the variant to which all others are compared (FP32). controls: variants that differ from it by the
            initial weights alone; their differences are drawn as a band.
    """
    variants = [name for name in dict.fromkeys(run["variant"] for run in runs) if name not in {baseline, *controls}]
    paths: list[Path] = []
    if not variants:
        return paths
    for name, figure in (
        ("losses", _losses(runs, variants, baseline, controls)), ("gradient-errors", _errors(runs, variants)),
        ("gradient-cosines", _errors(runs, variants, cosine=True)),
    ):  # fmt: skip
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight")
        _pyplot().close(figure)
        paths.append(path)
    return paths


def _smooth(losses: Sequence[float]) -> tuple[Any, Any]:
    """(steps, means) of as many parts."""
    parts = np.array_split(np.asarray(losses, dtype=float), min(SMOOTH, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return ends, np.array([part.mean() for part in parts])


def _style(variant: str, variants: Sequence[str]) -> dict[str, Any]:
    """A color each; what the paper rejects is dashed."""
    colors = _pyplot().get_cmap("tab20").colors
    place = variants.index(variant)
    return {
        "linestyle": "--" if "_" in variant else "-", "linewidth": 1.5, "color": colors[(2 * place + place // 10) % 20],
    }  # fmt: skip


def _losses(
    runs: Sequence[dict[str, Any]], variants: Sequence[str], baseline: str, controls: Collection[str]
) -> Any:
    figure, (above, below) = _pyplot().subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(1, 1.6))
    plain = {run["seed"]: _smooth(run["losses"]) for run in runs if run["variant"] == baseline}
    for seed, (steps, means) in plain.items():
        above.plot(steps, means, color="black", linewidth=1, label=f"fp32, seed {seed}")
    above.set_ylabel("training loss (nats)")
    luck = [gap for variant in controls for gap in _gaps(runs, variant, plain)]
    if luck:
        band = np.abs(luck).max(0)
        below.fill_between(steps, -band, band, color="0.88", label="fp32, other initial weights")
    for variant in variants:
        gaps = _gaps(runs, variant, plain)
        if gaps:
            below.plot(steps, np.mean(gaps, 0), label=variant, **_style(variant, variants))
    below.axhline(0, color="black", linewidth=0.6)
    below.set_yscale("symlog", linthresh=0.01)
    below.set_ylabel("loss - loss of fp32, same seed (nats)")
    below.set_xlabel("step")
    below.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def _gaps(runs: Sequence[dict[str, Any]], variant: str, plain: Mapping[int, tuple[Any, Any]]) -> list[Any]:
    """Return the smoothed differences of a variant's runs to those of the baseline on the same text."""
    same = [run for run in runs if run["variant"] == variant and run["seed"] in plain]
    return [_smooth(run["losses"])[1] - plain[run["seed"]][1] for run in same]


def _errors(runs: Sequence[dict[str, Any]], variants: Sequence[str], *, cosine: bool = False) -> Any:
    """Left over steps, median of the layers; right by layer, median over the steps. Means over seeds."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for variant in variants:
        same = [run["gradient_errors"] for run in runs if run["variant"] == variant]
        steps, layers = sorted(same[0], key=int), list(next(iter(same[0].values())))
        values = np.array([[[probe[step][layer] for layer in layers] for step in steps] for probe in same]).mean(0)
        shown = 1 - values[..., 1] if cosine else values[..., 0]
        left.plot([int(step) for step in steps], np.median(shown, 1), marker=".", label=variant,
                  **_style(variant, variants))  # fmt: skip
        right.plot(layers, np.median(shown, 0), marker=".", **_style(variant, variants))
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("1 - cosine with the exact gradient" if cosine else "relative error of the gradient")
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    right.legend(*left.get_legend_handles_labels(), fontsize=8, **beside)
    right.set_xticks(range(len(layers)), layers, rotation=60, ha="right")
    return figure
