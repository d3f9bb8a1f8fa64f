"""Whole training runs as a user starts them: the command line in a process of its own, on a corpus of a few words.

The process is forked from pytest's, which has everything imported: a run starts in 0.1 s instead of 2. It is the
leader of a session, so that Ctrl-C can be sent to all of a run and nothing else, and is ended with all its ranks when
the test is over, whatever happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.fx.experimental.symbolic_shapes  # autograd imports it at its first use, 0.4 s in every rank

from megascale_moe.checkpoint import Checkpoint
from megascale_moe.cli import main

TEXT = "the model sends every token to two experts of its layer and adds what they answer weighted by the router"
TIMEOUT = 120.0  # seconds for anything that takes two on a quiet machine

CONFIG = """
[model]
preset = "debug"
layers = 1
hidden = 32
ffn_hidden = 32
sequence_length = 32
vocab = 300         # a byte-level tokenizer needs 257
init_std = 0.1      # decided routers from the beginning

[train]
steps = 6
global_batch = 4
warmup = 2
eval_rows = 3       # no multiple of any rank count: some ranks get blank rows
sample_tokens = 4
device = "cpu"

[data]
path = "{corpus}"
cache = "{cache}"
validation_fraction = 0.2

[run]
folder = "{folder}"
"""


@dataclass(frozen=True)
class Place:
    """Where the runs of a test live."""

    root: Path

    @property
    def config(self) -> Path:
        """The TOML file."""
        return self.root / "config.toml"

    def folder(self, name: str = "run") -> Path:
        """A run folder."""
        return self.root / name

    def start(self, *arguments: str, run: str = "run", **more: Any) -> Command:
        """Start `megascale train` in the run folder of that name."""
        return start("train", str(self.config), f"--run.folder={self.folder(run)}", *arguments, **more)

    def train(self, *arguments: str, run: str = "run", **more: Any) -> Finished:
        """Train to the end, which must be a good one."""
        finished = self.start(*arguments, run=run, **more).wait()
        assert finished.status == 0, finished.stderr
        return finished

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        """The records of a run."""
        return [json.loads(line) for line in (self.folder(run) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: str = "run") -> list[float]:
        """Training losses of a run, of every step once and in order."""
        records = self.metrics(run)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [record["loss"] for record in records]

    def state(self, step: int, run: str = "run") -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint."""
        checkpoint = Checkpoint(self.folder(run) / "checkpoints" / f"step-{step}")
        return {name: checkpoint.read(name, (0,) * len(shape), shape) for name, shape in checkpoint.tensors.items()}


def make_place(root: Path) -> Place:
    """A corpus of 30 documents and a config of a tiny model."""
    chooser, words = random.Random(0), TEXT.split()
    (root / "corpus").mkdir(parents=True)
    for index in range(30):
        text = " ".join(chooser.choice(words) for _ in range(120))
        (root / "corpus" / f"{index:02d}.txt").write_text(text)
    text = CONFIG.format(corpus=root / "corpus", cache=root / "cache", folder=root / "run")
    place = Place(root)
    place.config.write_text(text)
    return place


@dataclass(frozen=True)
class Finished:
    """A command that came to its end; a killed one has the status -signal."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that --json promises: anything beside it is an error."""
        return json.loads(self.stdout)

    @property
    def messages(self) -> list[str]:
        """The lines that `megascale` says in its own name."""
        return [line for line in self.stderr.splitlines() if line.startswith("megascale: ")]


class Command:
    """A running command: the first process of its session."""

    def __init__(self, pid: int, out: tuple[int, int]) -> None:
        self.pid, self._out = pid, out
        self._status: int | None = None
        LIVE.append(self)

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def ranks(self) -> list[int]:
        """Process ids of its session, except the first: the ranks, also when that one is gone."""
        return [pid for pid in session(self.pid) if pid != self.pid]

    def wait(self) -> Finished:
        """Until it ends."""
        wait_until(lambda: self.poll() is not None, "the command ends")
        return Finished(self._status or 0, *(_read(descriptor) for descriptor in self._out))

    def vanish(self) -> None:
        """Until it and all its ranks have ended, by themselves."""
        wait_until(lambda: self.poll() is not None and not session(self.pid), "no process is left")

    def end(self) -> None:
        """Kill what is left of it."""
        for pid in session(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.vanish()
        for descriptor in self._out:
            os.close(descriptor)


LIVE: list[Command] = []


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Kill every command that was started inside and still runs."""
    try:
        yield
    finally:
        while LIVE:
            LIVE.pop().end()


def start(
    *arguments: str, environment: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> Command:
    """Run `megascale ARGUMENTS` in a forked process; `before` runs there first, for what a test wants to go wrong."""
    out = (os.memfd_create("stdout"), os.memfd_create("stderr"))
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(arguments, environment or {}, before, out)
    return Command(pid, out)


def _become(
    arguments: tuple[str, ...], environment: Mapping[str, str], before: Callable[[], None] | None, out: tuple[int, int]
) -> NoReturn:
    status = 1
    try:
        os.setsid()
        for place, descriptor in enumerate(out, start=1):
            os.dup2(descriptor, place)
        sys.stdout, sys.stderr = (open(place, "w", buffering=1, closefd=False) for place in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Its threads do not survive a fork, and a test before this one may have started them.
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", **environment}
        if before is not None:
            before()
        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def session(leader: int) -> list[int]:
    """Process ids of a session, without those that have ended and wait for their parent to notice."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, _, number = re.sub(r".*\) ", "", path.read_text(), flags=re.DOTALL).split()[:4]
            if int(number) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    """Look again and again, and fail when it takes too long."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.005)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()
