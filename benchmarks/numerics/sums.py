"""How wrong a sum of gradients over many ranks is: narrow messages summed in float32, against a ring that adds in BF16.

    python benchmarks/numerics/sums.py --write     # a minute; simulated ranks, no process group

The arithmetic is that of megascale_moe/optim/narrow_sums.py, which tests/optim/test_formats.py compares with real rings
and exchanges bit by bit; so many ranks as in a large job do not fit a machine, their arithmetic does.

Theory, for n terms of one size, roundings that know nothing of each other, and d the relative error (root mean square)
of one. Each term rounded once: errors add up to sqrt(n) d. The sum is sqrt(n) terms large where they are independent,
so its relative error is d; it is n where they are alike, and the error is d / sqrt(n). A ring rounds the partial sum of
k terms at hop k as well, sqrt(k) or k terms large: together d sqrt((n + 1) / 2 - 1 / n + 1), or
d sqrt(((n + 1)(2n + 1) / 6 - 1 / n) / n + 1 / n). Where a term comes near the last bit of the partial sum (64 alike
ones), its roundings are alike, too, and the error is larger than that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megascale_moe.kernels.narrow import BLOCK, Float8  # noqa: E402

RANKS = (2, 4, 8, 16, 32, 64)
ELEMENTS = 1 << 17
ROWS = Float8("rows")


def exchanged_bf16(terms: list[Tensor]) -> Tensor:
    """Each rounded once, sums in float32."""
    return sum_of([term.bfloat16().float() for term in terms])


def exchanged_fp8(terms: list[Tensor]) -> Tensor:
    """The same with E4M3 and a scale for 128 elements."""
    rows = [term.view(-1, BLOCK) for term in terms]
    return sum_of([ROWS.decode(ROWS.encode(row), torch.empty_like(row)).flatten() for row in rows])


def ring_bf16(terms: list[Tensor]) -> Tensor:
    """A partial sum passes all ranks, rounded at each."""
    total = terms[0].bfloat16()
    for term in terms[1:]:
        total = total + term.bfloat16()
    return total.float()


def sum_of(terms: list[Tensor]) -> Tensor:
    """In order, float32."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


FORMS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "bf16, float32 sums": exchanged_bf16, "fp8, float32 sums": exchanged_fp8, "bf16 ring": ring_bf16,
}  # fmt: skip


def gradients(kind: str, ranks: int) -> list[Tensor]:
    """"independent": noise alone, a late batch; "alike": what all ranks agree on, with noise of a tenth."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(ELEMENTS, generator=generator)
    noise = [torch.randn(ELEMENTS, generator=generator) for _ in range(ranks)]
    return noise if kind == "independent" else [common + 0.1 * part for part in noise]


def theory(form: str, kind: str, n: int, one: dict[str, float]) -> float:
    """Relative error, from that of one rounding in the format."""
    alike = kind == "alike"
    if form != "bf16 ring":
        return one[form] / (math.sqrt(n) if alike else 1)
    d = one["bf16, float32 sums"]
    independent = (n + 1) / 2 - 1 / n + 1
    return d * math.sqrt(((n + 1) * (2 * n + 1) / 6 - 1 / n) / n + 1 / n if alike else independent)


def measure() -> list[dict[str, Any]]:
    """A row per kind of gradients, number of ranks and form."""
    rows = []
    single = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1))
    one = {form: error(run([single]), single.double()) for form, run in FORMS.items()}
    for kind in ("independent", "alike"):
        for n in RANKS:
            terms = gradients(kind, n)
            exact = torch.stack(terms).double().sum(0)
            for form, run in FORMS.items():
                rows.append({
                    "gradients": kind, "ranks": n, "form": form, "error": error(run(terms), exact),
                    "theory": theory(form, kind, n, one),
                })  # fmt: skip
    return rows


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, root mean square."""
    return float((found.double() - exact).norm() / exact.norm())


def table(rows: list[dict[str, Any]]) -> str:
    """For people: measured (theory)."""
    lines = [f"| gradients | ranks | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 2) + "|"]
    for kind in ("independent", "alike"):
        for n in RANKS:
            same = {row["form"]: row for row in rows if (row["gradients"], row["ranks"]) == (kind, n)}
            cells = [f"{same[form]['error']:.2e} ({same[form]['theory']:.2e})" for form in FORMS]
            lines.append(f"| {kind} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured as dots, theory as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for pane, kind in zip(panes, ("independent", "alike"), strict=True):
        for color, form in enumerate(FORMS):
            same = [row for row in rows if row["gradients"] == kind and row["form"] == form]
            ranks = [row["ranks"] for row in same]
            pane.plot(ranks, [row["theory"] for row in same], color=f"C{color}", linewidth=1)
            pane.plot(ranks, [row["error"] for row in same], "o", color=f"C{color}", label=form)
        pane.set(xscale="log", yscale="log", xlabel="ranks", title=f"{kind} gradients", xticks=RANKS)
        pane.set_xticklabels(map(str, RANKS))
        pane.minorticks_off()
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("relative error of the sum")
    panes[0].legend(title="dots: measured, lines: theory")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write sums.json and docs/images/gradient-sums.png")
    options = parser.parse_args()
    rows = measure()
    print(table(rows))
    if options.write:
        (HERE / "sums.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
        plot(rows, HERE.parents[1] / "docs" / "images" / "gradient-sums.png")


if __name__ == "__main__":
    main()
