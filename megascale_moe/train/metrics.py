"""What a run measured, step by step: metrics.jsonl, TensorBoard events, and one live line for the person watching.

Rank 0 owns one `MetricsWriter`. The file is the record that reports and other programs read, so it survives what
training survives: every line is flushed when its step ends, a line torn by a kill is dropped on resume, and so are
the steps after the checkpoint that the run resumes from, which are about to be computed again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from torch.utils.tensorboard import SummaryWriter

from megascale_moe.train.progress import Progress

FILE = "metrics.jsonl"
EVENTS = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step of the whole run. Rates and bytes count what `interface.md` names; times are seconds."""

    step: int  # steps done, this one included: the first is 1
    loss: float  # mean cross-entropy per token
    aux_loss: float
    grad_norm: float  # before clipping
    lr: float
    tokens_per_s: float  # of all ranks
    tflops: float  # model FLOPs per second and rank, 1e12
    mfu: float  # share of the rank's peak, 0 to 1
    step_s: float
    comm_s: float
    exposed_comm_s: float
    wire_bytes: int
    peak_memory_bytes: int
    expert_load: tuple[float, ...] = ()  # busiest expert over the mean one, per MoE layer
    eval_loss: float | None = None  # on evaluation steps only

    @property
    def expert_load_max(self) -> float:
        """Worst imbalance of any layer; NaN for a model without experts."""
        return max(self.expert_load, default=math.nan)

    def scalars(self) -> dict[str, float]:
        """The single numbers, in the order of the record."""
        names = (
            "loss", "aux_loss", "grad_norm", "lr", "tokens_per_s", "tflops", "mfu", "step_s", "comm_s",
            "exposed_comm_s", "wire_bytes", "peak_memory_bytes", "expert_load_max",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return values if self.eval_loss is None else values | {"eval_loss": self.eval_loss}

    def record(self) -> dict[str, Any]:
        """The JSON object of this step; what is not finite becomes null, which JSON can hold."""
        record: dict[str, Any] = {"step": self.step}
        record |= {name: _json_number(value) for name, value in self.scalars().items()}
        return record | {"expert_load": [_json_number(load) for load in self.expert_load]}


def _json_number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


class MetricsWriter:
    """Writes the metrics of one run into its folder.

    Args:
        folder: the run folder; created if missing.
        steps: the step at which the run ends.
        start: steps already done, 0 for a fresh run. Records of later steps are dropped.
        log_every: steps between lines where standard error is no terminal; 0: evaluations and the last step only.
        stream: where progress goes, standard error by default.
    """

    def __init__(
        self, folder: Path, *, steps: int, start: int = 0, log_every: int = 10, stream: TextIO | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        truncate_after(folder / FILE, start)
        self._file = (folder / FILE).open("a", encoding="utf-8")
        # purge_step hides the events of steps that are computed again; 10 s is what a killed run may lose.
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=start + 1, flush_secs=10)
        self._progress = Progress(steps=steps, start=start, log_every=log_every, stream=stream)

    def write(self, metrics: StepMetrics) -> None:
        """Record one step everywhere."""
        self._file.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
        self._file.flush()
        for name, value in metrics.scalars().items():
            self._events.add_scalar(name, value, metrics.step)
        for layer, load in enumerate(metrics.expert_load):
            self._events.add_scalar(f"expert_load/moe_layer_{layer:02d}", load, metrics.step)
        self._progress.update(metrics.step, metrics.loss, metrics.eval_loss, metrics.tokens_per_s, metrics.step_s)

    def close(self) -> None:
        """Flush and end everything; more than once does no harm."""
        self._progress.close()
        self._events.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, also of a run that still writes or was killed while writing."""
    return [record for _, record in _lines(path)]


def truncate_after(path: Path, step: int) -> None:
    """Drop the records after `step` and torn lines: the old file or the new one is there, whatever happens."""
    if not path.exists():
        return
    kept = [line for line, record in _lines(path) if record["step"] <= step]
    if b"".join(kept) == path.read_bytes():
        return
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines that hold a record, as they are in the file and parsed."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # torn, or not even text
                continue
            if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record
