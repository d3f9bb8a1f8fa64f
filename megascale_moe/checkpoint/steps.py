"""Folders of a run's checkpoints: `step-N` is always complete, everything unfinished has another name.

    step-N.partial     being written
    step-N.replaced    the former step-N, until the new one has taken its place
    step-N.removed     being deleted
    step-N.failed      a save that went wrong, until all ranks have noticed

A rename is the only way in and out of the name `step-N`, so a process may be killed between any two system calls: what
is left behind is recognised by its name and cleared by the next save.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from megascale_moe.checkpoint.manifest import MANIFEST


def step_folder(folder: Path, step: int, suffix: str = "") -> Path:
    """Return the path of a checkpoint, or with a suffix of the above of an unfinished one."""
    return folder / f"step-{step}{suffix}"


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder of checkpoints; None if there is none, or no folder.

    A process killed while replacing step-N may leave the former one as `step-N.replaced`, which is then the result.
    """
    checkpoints = find(folder, ".replaced") | find(folder)
    return checkpoints[max(checkpoints)] if checkpoints else None


def find(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Return the complete checkpoints by step; with a suffix the unfinished ones."""
    checkpoints = {}
    for path in folder.glob("step-*"):
        name = re.fullmatch(r"step-(\d+)" + re.escape(suffix), path.name)
        if name and (path / MANIFEST).is_file():
            checkpoints[int(name[1])] = path
    return checkpoints


def clear(folder: Path) -> None:
    """Put back what a killed save was about to replace, and remove all else that it left."""
    for step, former in find(folder, ".replaced").items():
        if not step_folder(folder, step).exists():
            former.rename(step_folder(folder, step))
    for suffix in ("partial", "replaced", "removed", "failed"):
        for path in folder.glob(f"step-*.{suffix}"):
            shutil.rmtree(path)


def publish(partial: Path, target: Path) -> None:
    """Give a complete folder its name; a former one steps aside for the moment of the rename, and is then removed."""
    _sync(partial)
    former = target.with_name(f"{target.name}.replaced")
    if target.exists():
        target.rename(former)
    try:
        partial.rename(target)
    except OSError:
        if former.exists():
            former.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints before `step` until `keep` with it are left; later ones, of a run begun anew, are not ours."""
    older = sorted(number for number in find(folder) if number < step)
    for number in older[: max(len(older) - (keep - 1), 0)]:
        removed = step_folder(folder, number, ".removed")
        step_folder(folder, number).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Force a folder's list of names to the disk, where the file system can do that; the files in it already are."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
