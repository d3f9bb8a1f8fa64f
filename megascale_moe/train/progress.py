"""The line that a person watches while a run trains: step, losses, tokens per second, time left.

It goes to standard error, standard output belongs to results. On a terminal the line is redrawn in place, at most
ten times a second and without a thread of its own, which would take time from rank 0. In a log file or a pipe there
is a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import rich.progress
from rich.console import Console

SMOOTHING = 0.9  # weight of the past in the seconds per step that the time left is worked out from
REDRAW_SECONDS = 0.1
PLAIN_LINE_SECONDS = 10.0  # between plain lines

Update = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, of how much."""


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


class Progress:
    """Shows a run that goes from `start` steps done to `steps`."""

    def __init__(self, *, steps: int, start: int = 0, log_every: int = 10, stream: TextIO | None = None) -> None:
        self._steps = steps
        self._log_every = log_every
        self._stream = stream or sys.stderr
        self._eval_loss: float | None = None
        self._step_seconds = 0.0
        self._last = time.monotonic()
        self._drawn = 0.0
        self._bar = _started_bar(self._stream, "starting", steps, start)

    def update(self, step: int, loss: float, eval_loss: float | None, tokens_per_s: float, step_s: float) -> None:
        """Show a step that just ended."""
        now = time.monotonic()
        # Evaluations and checkpoints between two steps are included; the way to the first one was set-up.
        passed = now - self._last if self._step_seconds else step_s
        past = self._step_seconds or passed
        self._step_seconds, self._last = SMOOTHING * past + (1 - SMOOTHING) * passed, now
        if eval_loss is not None:
            self._eval_loss = eval_loss
        evaluation = "" if self._eval_loss is None else f"  eval {self._eval_loss:.4f}"
        left = clock((self._steps - step) * self._step_seconds)
        text = f"step {step}/{self._steps}  loss {loss:.4f}{evaluation}  {short(tokens_per_s)} tokens/s  ETA {left}"
        at_once = eval_loss is not None or step >= self._steps
        if self._bar is not None:
            refresh = at_once or now - self._drawn >= REDRAW_SECONDS
            self._bar.update(self._bar.task_ids[0], completed=step, description=text, refresh=refresh)
            self._drawn = now if refresh else self._drawn
        elif at_once or (self._log_every > 0 and step % self._log_every == 0):
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last line where it is and give the terminal back; more than once does no harm."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def counted_progress(stream: TextIO | None = None, *, shown: bool = True) -> Iterator[Update]:
    """Give a function that shows progress; before its first call nothing appears, and nothing at all unless `shown`."""
    if not shown:
        yield silent
        return
    out = stream or sys.stderr
    bar: rich.progress.Progress | None = None
    drawn = redraw_after = 0.0
    latest: tuple[str, int] | None = None

    def update(what: str, done: int, total: int) -> None:
        nonlocal bar, drawn, latest, redraw_after
        now = time.monotonic()
        if (what, done) == latest or (now - drawn < redraw_after and done < total):
            return
        if latest is None:
            bar = _started_bar(out, "", total)
            redraw_after = PLAIN_LINE_SECONDS if bar is None else REDRAW_SECONDS
        drawn, latest = now, (what, done)
        if bar is not None:
            bar.update(bar.task_ids[0], description=what, completed=done, total=total, refresh=True)
        else:
            print(f"{what}: {100 * done / max(total, 1):.0f} %", file=out, flush=True)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _started_bar(stream: TextIO, description: str, total: int, completed: int = 0) -> rich.progress.Progress | None:
    """Show a bar that is redrawn only when told; None where nothing can be redrawn in place."""
    console = Console(file=stream, force_terminal=True, force_jupyter=False)
    if not stream.isatty() or console.is_dumb_terminal:
        return None
    columns = (rich.progress.TextColumn("{task.description}", markup=False), rich.progress.BarColumn(bar_width=None))
    # Warnings appear above the line (redirect_stderr); standard output is not ours to touch.
    bar = rich.progress.Progress(
        *columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=True, expand=True
    )
    bar.add_task(description, total=total, completed=completed)
    bar.start()
    bar.console.show_cursor(True)  # rich hides it, and a rank that is killed could not bring it back
    return bar


def short(number: float) -> str:
    """Return three digits that can be read at a glance: 950, 12.3k, 1.41M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Return seconds as m:ss, h:mm:ss or days."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
