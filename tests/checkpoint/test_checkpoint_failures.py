"""No failure of a save, killed, refused or out of disk, harms a checkpoint that is already there."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.checkpoint import Checkpoint, SaveError, TensorPiece, latest, save
from megascale_moe.checkpoint import files as files_module
from tests.checkpoint.checkpoints import (
    assert_holds,
    make_state,
    names,
    save_alone,
    save_on,
    save_state,
)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        save_alone(tmp_path, step, {"a": torch.tensor(step)}, keep=2)
    assert names(tmp_path) == ["step-10", "step-11"]
    assert latest(tmp_path) == tmp_path / "step-11"


def test_prune_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    for step in (8, 9):
        save_alone(tmp_path, step, {"a": torch.tensor(step)})
    save_alone(tmp_path, 5, {"a": torch.tensor(5)}, keep=1)  # resumed from an earlier step
    assert names(tmp_path) == ["step-5", "step-8", "step-9"]


def test_overwriting_a_step(tmp_path: Path) -> None:
    save_state(tmp_path, 3, make_state(0), ep=4)
    save_state(tmp_path, 3, make_state(1), ep=2)
    assert_holds(tmp_path / "step-3", make_state(1))
    assert names(tmp_path) == ["step-3"]
    assert len(names(tmp_path / "step-3")) == 3


def test_latest_ignores_what_is_unfinished(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    save_alone(tmp_path, 2, make_state())
    for name in ("step-10", "step-9.partial", "step-8.removed", "step-7.failed", "step-x", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "step-2" / "manifest.json", tmp_path / "step-8.removed")
    (tmp_path / "step-11").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-2"


def run_and_kill(action: Callable[[], object], after: int) -> bool:
    """Run it in a child that kills itself at its n-th call that changes the disk; False if there were fewer."""

    def child() -> None:
        calls = 0

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            setattr(os, name, deadly(getattr(os, name)))
        files_module.Checksums.add = deadly(files_module.Checksums.add)  # type: ignore[method-assign]
        action()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("step", [2, 3], ids=["same step", "next step"])
def test_killed_save_never_harms_the_older_checkpoint(tmp_path: Path, step: int) -> None:
    old, new = {"a": torch.tensor([1, 2]), "b": torch.ones(3)}, {"a": torch.tensor([3, 4]), "b": torch.zeros(3)}
    after = 0
    seen = set()
    while True:
        folder = tmp_path / str(after)
        save_alone(folder, 2, old)
        killed = run_and_kill(lambda folder=folder: save_alone(folder, step, new, keep=1), after)  # type: ignore[misc]
        found = latest(folder)
        assert found is not None
        a = Checkpoint(found).read("a", (0,), (2,))
        assert_holds(found, old if a[0] == 1 else new)
        seen.add(("step-3" in found.name, int(a[0])))
        save_alone(folder, 4, new, keep=1)
        assert names(folder) == ["step-4"]
        assert_holds(folder / "step-4", new)
        if not killed:
            break
        after += 1
    assert after > 10
    assert {value for _, value in seen} == {1, 3}


def test_killed_save_of_several_ranks(tmp_path: Path) -> None:
    save_state(tmp_path, 1, make_state(1), ep=2, dp=2)
    after = 0
    while run_and_kill(lambda: save_state(tmp_path, 2, make_state(2), ep=2, dp=2), after):
        found = latest(tmp_path)
        assert found is not None
        assert_holds(found, make_state(int(found.name[-1])))
        assert_holds(tmp_path / "step-1", make_state(1))
        after += 3
    assert_holds(tmp_path / "step-2", make_state(2))
    assert names(tmp_path) == ["step-1", "step-2"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_full_disk_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, step: int) -> None:
    save_state(tmp_path, 1, make_state(1), ep=2, dp=2)
    write = files_module._write

    def fails_on_one(path: Path, *rest: Any) -> Any:
        result = write(path, *rest)
        return no_space() if f"{bad:05d}" in path.name else result

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_write", fails_on_one)
        results = save_state(tmp_path, step, make_state(2), ep=2, dp=2)
    for error in results:
        assert isinstance(error, SaveError)
        assert re.fullmatch(rf"checkpoint .*step-{step} is not saved: .*No space left on device", str(error))
    assert names(tmp_path) == ["step-1"]
    assert_holds(tmp_path / "step-1", make_state(1))
    save_state(tmp_path, step, make_state(2), ep=2, dp=2)
    assert_holds(tmp_path / f"step-{step}", make_state(2))


@pytest.mark.parametrize(
    ("name", "call", "fatal"),
    [
        ("mkdir", 1, False),  # the folder is there already
        ("mkdir", 2, True),  # .partial
        *[("fsync", call, True) for call in range(1, 6)],  # two data files, two notes, the manifest
        ("fsync", 6, False),  # folders: some file systems cannot
        ("fsync", 7, False),
        ("rename", 1, True),  # the old one away
        ("rename", 2, True),  # the new one into place
    ],
)
def test_failing_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, fatal: bool
) -> None:
    """Either all ranks say that it failed and the old checkpoint is there, or none and it is the new one."""
    save_state(tmp_path, 1, make_state(1), ep=2)
    real = getattr(os, name)
    calls = 0

    def fails_once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return no_space() if calls == call else real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails_once)
        results = save_state(tmp_path, 1, make_state(2), ep=2)
    assert calls >= call
    assert [isinstance(result, SaveError) for result in results] == [fatal] * 2
    assert_holds(tmp_path / "step-1", make_state(1 if fatal else 2))
    assert names(tmp_path) == ["step-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_disk_that_is_really_full(small_disk: Path) -> None:
    def action(rank: int, barrier: Callable[[], None], step: int, size: int) -> Path:
        value = torch.full((size,), float(step))
        pieces = [TensorPiece("w", (2 * size,), (rank * size,), (size,), 0, value)]
        return save(small_disk, step, pieces, {}, rank=rank, world=2, barrier=barrier)

    save_on(2, lambda rank, barrier: action(rank, barrier, 1, 30_000))
    for step in (1, 2):
        for error in save_on(2, lambda rank, barrier, step=step: action(rank, barrier, step, 60_000)):  # type: ignore[misc]
            assert re.search("not saved: .*No space left on device", str(error))
        assert names(small_disk) == ["step-1"]
        assert_holds(small_disk / "step-1", {"w": torch.full((60_000,), 1.0)})


def test_pieces_that_cannot_be_made(tmp_path: Path) -> None:
    """The iterable of one rank raises (out of memory): the others must not wait for it."""

    def pieces(rank: int) -> Iterator[TensorPiece]:
        yield TensorPiece("w", (2,), (rank,), (1,), 0, torch.zeros(1))
        if rank == 1:
            raise RuntimeError("out of memory")

    def action(rank: int, barrier: Callable[[], None]) -> Path:
        return save(tmp_path, 1, pieces(rank), {}, rank=rank, world=2, barrier=barrier)

    assert all("out of memory" in str(error) for error in save_on(2, action))
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = save_state(tmp_path / "file", 1, make_state(), ep=2)
    assert [type(result) for result in results] == [SaveError] * 2


def test_ranks_that_see_different_folders(tmp_path: Path) -> None:
    def action(rank: int, barrier: Callable[[], None]) -> Path:
        folder = tmp_path / f"node{rank}"
        (folder / "step-1.partial").mkdir(parents=True, exist_ok=True)
        pieces = [TensorPiece("w", (2,), (rank,), (1,), 0, torch.zeros(1))]
        return save(folder, 1, pieces, {}, rank=rank, world=2, barrier=barrier)

    results = save_on(2, action)
    assert all("do all ranks see the same folder?" in str(error) for error in results)
