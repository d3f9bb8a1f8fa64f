"""Plots of `megascale bench convergence`, drawn where matplotlib is installed.

Losses of runs that differ by thousandths lie on each other: drawn is the difference to the FP32 run of the same seed,
inside the band of FP32 runs on the same text from other initial weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMOOTH = 40
"""Parts of a run over which losses are averaged."""
BESIDE: dict[str, Any] = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
"""A legend to the right of its plot."""

Runs = Sequence[dict[str, Any]]


def draw(plt: Any, runs: Runs, folder: Path, baseline: str, controls: Collection[str]) -> list[Path]:
    """Write the plots and return their paths; none if `runs` holds only the baseline.

    Args:
        plt: pyplot. baseline: the variant to which all others are compared (FP32). controls: variants that differ from
            it by the initial weights alone; their differences are drawn as a band.
    """
    variants = [name for name in dict.fromkeys(run["variant"] for run in runs) if name not in {baseline, *controls}]
    colors, paths = plt.get_cmap("tab20").colors, list[Path]()
    styles = {  # a color each; what the paper rejects is dashed
        name: {"label": name, "linewidth": 1.5, "linestyle": "--" if "_" in name else "-",
               "color": colors[(2 * number + number // 10) % 20]}
        for number, name in enumerate(variants)
    }  # fmt: skip
    if not variants:
        return paths
    for name, figure in (
        ("losses", _losses(plt, runs, styles, baseline, controls)),
        ("gradient-errors", _errors(plt, runs, styles)), ("gradient-cosines", _errors(plt, runs, styles, cosine=True)),
    ):  # fmt: skip
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return paths


def _smooth(losses: Sequence[float]) -> tuple[Any, Any]:
    """Return the (steps, means) of as many parts."""
    parts = np.array_split(np.asarray(losses, dtype=float), min(SMOOTH, len(losses)))
    return np.cumsum([len(part) for part in parts]), np.array([part.mean() for part in parts])


def _losses(plt: Any, runs: Runs, styles: dict[str, Any], baseline: str, controls: Collection[str]) -> Any:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(1, 1.6))
    plain = {run["seed"]: _smooth(run["losses"]) for run in runs if run["variant"] == baseline}
    for seed, (steps, means) in plain.items():
        above.plot(steps, means, color="black", linewidth=1, label=f"fp32, seed {seed}")
    above.set_ylabel("training loss (nats)")

    def gaps(names: Collection[str]) -> list[Any]:
        """Return the differences of variants' runs to those of the baseline on the same text."""
        same = [run for run in runs if run["variant"] in names and run["seed"] in plain]
        return [_smooth(run["losses"])[1] - plain[run["seed"]][1] for run in same]

    if luck := gaps(controls):
        band = np.abs(luck).max(0)
        below.fill_between(steps, -band, band, color="0.88", label="fp32, other initial weights")
    for variant, style in styles.items():
        if found := gaps([variant]):
            below.plot(steps, np.mean(found, 0), **style)
    below.axhline(0, color="black", linewidth=0.6)
    below.set_yscale("symlog", linthresh=0.01)
    below.set(ylabel="loss - loss of fp32, same seed (nats)", xlabel="step")
    below.legend(**BESIDE)
    return figure


def _errors(plt: Any, runs: Runs, styles: dict[str, Any], *, cosine: bool = False) -> Any:
    """Draw over steps, median of the layers, and by layer, median over the steps; means over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for variant, style in styles.items():
        same = [run["gradient_errors"] for run in runs if run["variant"] == variant]
        steps, layers = sorted(same[0], key=int), list(next(iter(same[0].values())))
        values = np.array([[[probe[step][layer] for layer in layers] for step in steps] for probe in same]).mean(0)
        shown = 1 - values[..., 1] if cosine else values[..., 0]
        left.plot([int(step) for step in steps], np.median(shown, 1), marker=".", **style)
        right.plot(layers, np.median(shown, 0), marker=".", **style)
    label = "1 - cosine with the exact gradient" if cosine else "relative error of the gradient"
    left.set(yscale="log", xlabel="step", ylabel=label)
    right.legend(**BESIDE)
    right.set_xticks(range(len(layers)), layers, rotation=60, ha="right")
    return figure
