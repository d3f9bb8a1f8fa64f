"""Runs that are killed and resumed end as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.checkpoint import writer
from megascale_moe.train.loop import Loop
from tests.runs import Finished, Place, wait_until

STEPS = 8
EVERY = 2
OPTIONS = (
    f"--train.steps={STEPS}", f"--train.checkpoint_every={EVERY}", "--train.keep_checkpoints=2", "--train.eval_every=4",
    "--model.correction_bias=true", "--model.score=sigmoid",
)  # fmt: skip
LAYOUTS = {
    1: ("--nproc=1",),
    4: ("--nproc=4", "--parallel.dp=2", "--parallel.node=2", "--parallel.ep=2"),
}
LOSS = 1e-4  # between layouts, as in test_training.py


@pytest.fixture(scope="module")
def undisturbed(shared: Place) -> dict[int, Finished]:
    """Runs that nobody killed, by rank count."""
    return {world: shared.train("--json", *OPTIONS, *layout, run=f"whole-{world}") for world, layout in LAYOUTS.items()}


def stand_still(word: Path) -> None:
    """Wait to be killed, after telling the test."""
    word.touch()
    time.sleep(600)


def hold_before_step(step: int, rank: int, word: Path) -> Callable[[], None]:
    """One rank stops before a step, the others wait for it in the middle of theirs."""

    def install() -> None:
        def held(self: Loop, *observe: Any) -> Any:
            if self.trainer.steps == step - 1 and self.job.rank == rank:
                stand_still(word)
            return original(self, *observe)

        original, Loop._step = Loop._step, held  # type: ignore[method-assign]

    return install


def hold_in_save(name: str, step: int, word: Path) -> Callable[[], None]:
    """Stop inside the save of a step: rank 3 in `_write`, rank 0 in `publish` or, afterwards, in `prune`."""

    def install() -> None:
        def held(*arguments: Any) -> Any:
            if meant(*arguments):
                stand_still(word)
            return original(*arguments)

        conditions: dict[str, Callable[..., bool]] = {
            "_write": lambda partial, _, rank, __: partial.name == f"step-{step}.partial" and rank == 3,
            "publish": lambda _, target: target.name == f"step-{step}",
            "prune": lambda _, newest, __: newest == step,
        }
        meant = conditions[name]
        original = getattr(writer, name)
        setattr(writer, name, held)

    return install


def killed(place: Place, world: int, run: str, hold: Callable[[Path], Callable[[], None]]) -> None:
    """A run whose first process is killed where it was told to stand still; its ranks go with it."""
    word = place.root / f"{run}.word"
    command = place.start(*OPTIONS, *LAYOUTS[world], run=run, before=hold(word))
    wait_until(word.exists, f"{run} stands still")
    assert len(command.ranks()) == (world if world > 1 else 0)
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait().status == -signal.SIGKILL
    command.vanish()


def assert_same_end(place: Place, run: str, wanted: str) -> None:
    """Bit for bit: every tensor of the last checkpoint, and every loss, once per step."""
    state, expected = place.state(STEPS, run), place.state(STEPS, wanted)
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    assert place.losses(run) == place.losses(wanted)
    assert evaluations(place, run) == evaluations(place, wanted)


def evaluations(place: Place, run: str) -> list[float | None]:
    return [record.get("eval_loss") for record in place.metrics(run)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("world", LAYOUTS)
def test_killed_at_any_step(shared: Place, undisturbed: dict[int, Finished], world: int, seed: int) -> None:
    chooser = random.Random(10 * world + seed)
    step, rank = chooser.randint(2, STEPS), chooser.randrange(world)
    run = f"killed-{world}-{seed}"
    killed(shared, world, run, lambda word: hold_before_step(step, rank, word))
    finished = shared.train("--json", "--resume", *OPTIONS, *LAYOUTS[world], run=run)
    assert_same_end(shared, run, f"whole-{world}")
    for name in ("step", "loss", "eval_loss", "sample"):
        assert finished.document[name] == undisturbed[world].document[name]


@pytest.mark.parametrize("name", ["_write", "publish", "prune"])
def test_killed_while_saving(shared: Place, undisturbed: dict[int, Finished], name: str) -> None:
    assert len(undisturbed) == 2
    run = f"saving-{name}"
    killed(shared, 4, run, lambda word: hold_in_save(name, 2 * EVERY, word))
    shared.train("--resume", *OPTIONS, *LAYOUTS[4], run=run)
    assert_same_end(shared, run, "whole-4")
    kept = {path.name for path in (shared.folder(run) / "checkpoints").iterdir()}
    assert kept == {f"step-{STEPS}", f"step-{STEPS - EVERY}"}  # what the killed save left is cleared


def test_killed_twice(shared: Place, undisturbed: dict[int, Finished]) -> None:
    assert len(undisturbed) == 2
    killed(shared, 1, "twice", lambda word: hold_before_step(4, 0, word))
    command = shared.start(
        "--resume", *OPTIONS, *LAYOUTS[1], run="twice", before=hold_before_step(6, 0, shared.root / "second.word")
    )
    wait_until((shared.root / "second.word").exists, "the second run stands still")
    os.kill(command.pid, signal.SIGKILL)
    command.vanish()
    shared.train("--resume", *OPTIONS, *LAYOUTS[1], run="twice")
    assert_same_end(shared, "twice", "whole-1")


@pytest.fixture(scope="module")
def interrupted(shared: Place) -> Path:
    """The folder of a run of 4 ranks (dp 2, node 2, ep 2) that was killed in its second half."""
    killed(shared, 4, "interrupted", lambda word: hold_before_step(6, 1, word))
    return shared.folder("interrupted")


@pytest.mark.parametrize(
    ("name", "layout"),
    {
        "one-rank": ("--nproc=1",),
        "dp-4": ("--nproc=4", "--parallel.dp=4", "--parallel.node=1"),
        "ep-4": ("--nproc=4", "--parallel.dp=2", "--parallel.node=2", "--parallel.ep=4"),
        "ep-1": ("--nproc=2", "--parallel.dp=2", "--parallel.node=1", "--parallel.ep=1", "--train.micro_batch=1"),
    }.items(),
)
def test_resumed_on_another_layout(
    shared: Place, undisturbed: dict[int, Finished], interrupted: Path, name: str, layout: tuple[str, ...]
) -> None:
    assert len(undisturbed) == 2
    shutil.copytree(interrupted, shared.folder(name))
    shared.train("--resume", *OPTIONS, *layout, run=name)
    errors = [abs(a - b) for a, b in zip(shared.losses(name), shared.losses("whole-4"), strict=True)]
    assert errors[: 2 * EVERY] == [0.0] * 2 * EVERY
    assert max(errors) < LOSS


def test_resuming_a_finished_run_changes_nothing(shared: Place, undisturbed: dict[int, Finished]) -> None:
    def contents() -> dict[Path, tuple[bytes, int]]:
        files = (path for path in shared.folder("whole-4").rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = contents()
    again = shared.train("--json", "--resume", *OPTIONS, *LAYOUTS[4], run="whole-4")
    assert again.document == undisturbed[4].document
    assert contents() == before


def test_resume_without_a_checkpoint_starts_anew(place: Place) -> None:
    place.train("--resume", "--train.steps=2")
    assert len(place.losses()) == 2


def test_resume_goes_on_when_steps_are_added(place: Place) -> None:
    place.train("--train.steps=2")
    place.train("--train.steps=4", "--resume")
    assert len(place.losses()) == 4


def test_resume_from_a_named_checkpoint_into_a_new_folder(place: Place) -> None:
    constant = ("--train.lr_schedule=constant",)
    place.train("--train.steps=4", *constant, run="first")
    place.train("--train.steps=6", *constant, f"--run.resume={place.folder('first')}/checkpoints/step-4", run="second")
    place.train("--train.steps=6", *constant, run="at-once")
    assert [record["loss"] for record in place.metrics("second")] == place.losses("at-once")[4:]
