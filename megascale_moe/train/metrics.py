"""What a run measured, step by step: metrics.jsonl, TensorBoard events, and one live line for the person watching.

Rank 0 writes them (`metrics_writer`). The file is the record that reports and other programs read, so it survives what
training survives: every line is flushed when its step ends, a line torn by a kill is dropped on resume, and so are
the steps after the checkpoint that the run resumes from, which are about to be computed again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

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

    def scalars(self) -> dict[str, float]:
        """Return the single numbers, in the order of the record."""
        values = asdict(self)
        loads, evaluation = values.pop("expert_load"), values.pop("eval_loss")
        values["expert_load_max"] = max(loads, default=math.nan)
        return values if evaluation is None else values | {"eval_loss": evaluation}

    def record(self) -> dict[str, Any]:
        """Return the JSON object of this step; what is not finite becomes null, which JSON can hold."""
        record: dict[str, Any] = {name: _json_number(value) for name, value in self.scalars().items()}
        return record | {"expert_load": [_json_number(load) for load in self.expert_load]}


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def metrics_writer(
    folder: Path, *, steps: int, start: int = 0, log_every: int = 10, stream: TextIO | None = None
) -> Iterator[Callable[[StepMetrics], None]]:
    """Give a function that records a step of a run everywhere: in its folder, for TensorBoard, and on the live line.

    Args:
        folder: the run folder; created if missing.
        steps: the step at which the run ends.
        start: steps already done, 0 for a fresh run. Records of later steps are dropped.
        log_every: steps between lines where standard error is no terminal; 0: evaluations and the last step only.
        stream: where progress goes, standard error by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truncate_after(folder / FILE, start)
    with (
        (folder / FILE).open("a", encoding="utf-8") as file,
        # purge_step hides the events of steps that are computed again; 10 s is what a killed run may lose.
        closing(SummaryWriter(str(folder / EVENTS), purge_step=start + 1, flush_secs=10)) as events,
        closing(Progress(steps=steps, start=start, log_every=log_every, stream=stream)) as progress,
    ):

        def write(metrics: StepMetrics) -> None:
            file.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
            file.flush()
            layers = {f"expert_load/moe_layer_{layer:02d}": load for layer, load in enumerate(metrics.expert_load)}
            for name, value in (metrics.scalars() | layers).items():
                if name != "step":
                    events.add_scalar(name, value, metrics.step)
            progress.update(metrics.step, metrics.loss, metrics.eval_loss, metrics.tokens_per_s, metrics.step_s)

        yield write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, also of a run that still writes or was killed while writing."""
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
    """Yield whole lines that hold a record, as they are in the file and parsed."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # torn, or not even text
                continue
            if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record
