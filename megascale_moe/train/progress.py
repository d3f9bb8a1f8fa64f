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
        self._seconds = 0.0
        self._last = time.monotonic()
        self._drawn = 0.0
        self._bar = _bar(self._stream)
        if self._bar is not None:
            self._task = self._bar.add_task("starting", total=steps, completed=start)
            _start(self._bar)

    def update(self, step: int, loss: float, eval_loss: float | None, tokens_per_s: float, step_s: float) -> None:
        """Show a step that just ended."""
        self._time(step_s)
        evaluated, last = eval_loss is not None, step >= self._steps
        self._eval_loss = eval_loss if evaluated else self._eval_loss
        text = self._text(step, loss, tokens_per_s)
        if self._bar is not None:
            self._draw(step, text, now=evaluated or last)
        elif evaluated or last or (self._log_every > 0 and step % self._log_every == 0):
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last line where it is and give the terminal back."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
            self._bar = None

    def _time(self, step_s: float) -> None:
        """Seconds from step to step, evaluations and checkpoints between them included."""
        now = time.monotonic()
        passed = now - self._last if self._seconds else step_s  # the way to the first step was set-up
        self._last = now
        self._seconds = SMOOTHING * self._seconds + (1 - SMOOTHING) * passed if self._seconds else passed

    def _text(self, step: int, loss: float, tokens_per_s: float) -> str:
        evaluation = "" if self._eval_loss is None else f"  eval {self._eval_loss:.4f}"
        left = clock((self._steps - step) * self._seconds)
        return f"step {step}/{self._steps}  loss {loss:.4f}{evaluation}  {short(tokens_per_s)} tokens/s  ETA {left}"

    def _draw(self, step: int, text: str, now: bool) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=step, description=text)
        if now or self._last - self._drawn >= REDRAW_SECONDS:
            self._bar.refresh()
            self._drawn = self._last


@contextmanager
def preparation_progress(shown: bool, stream: TextIO | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with (bytes done, bytes in all) while the corpus is prepared; None where nobody watches.

    Nothing appears before its first call: a prepared corpus opens at once.
    """
    if not shown:
        yield None
        return
    with counted_progress(stream) as update:
        yield lambda done, total: update("preparing the corpus", done, total)


@contextmanager
def counted_progress(stream: TextIO | None = None, *, shown: bool = True) -> Iterator[Update]:
    """A function that shows progress; before its first call nothing appears, and nothing at all unless `shown`."""
    if not shown:
        yield silent
        return
    line = _Counted(stream or sys.stderr)
    try:
        yield line.update
    finally:
        line.close()


class _Counted:
    """The line of `counted_progress`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: rich.progress.Progress | None = None
        self._drawn = 0.0
        self._redraw = 0.0  # 0: nothing shown yet
        self._done = ("", -1)

    def update(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if (what, done) == self._done or (now - self._drawn < self._redraw and done < total):
            return
        if not self._redraw:
            self._start()
        self._drawn, self._done = now, (what, done)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total, refresh=True)
        else:
            print(f"{what}: {100 * done / max(total, 1):.0f} %", file=self._stream, flush=True)

    def _start(self) -> None:
        self._bar = _bar(self._stream)
        self._redraw = PLAIN_LINE_SECONDS if self._bar is None else REDRAW_SECONDS
        if self._bar is not None:
            self._bar.add_task("")
            _start(self._bar)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _start(bar: rich.progress.Progress) -> None:
    bar.start()
    bar.console.show_cursor(True)  # rich hides it, and a rank that is killed could not bring it back


def _bar(stream: TextIO) -> rich.progress.Progress | None:
    """A bar that is drawn only when told, or None where nothing can be redrawn in place."""
    if not stream.isatty():
        return None
    console = Console(file=stream, force_terminal=True, force_jupyter=False)
    if console.is_dumb_terminal:
        return None
    columns = (rich.progress.TextColumn("{task.description}", markup=False), rich.progress.BarColumn(bar_width=None))
    # Warnings appear above the line (redirect_stderr); standard output is not ours to touch.
    return rich.progress.Progress(
        *columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=True, expand=True
    )


def short(number: float) -> str:
    """Three digits that can be read at a glance: 950, 12.3k, 1.41M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or days."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
