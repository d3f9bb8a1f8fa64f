"""Saving: every rank writes what it has, rank 0 checks that together it is everything and publishes it.

Between ranks there is only a barrier; all else they tell each other through the folder, by names that nobody has
looked up before (a network file system may answer from memory about names it has seen):

    rank 0     clears what a killed save left, makes step-N.partial
               barrier
    all        write rank-R.safetensors, then rank-R.json; if that fails, rank-R.error
               barrier
    rank 0     merges rank-*.json, checks coverage, writes the manifest, renames step-N.partial to step-N;
               if anything failed, to step-N.failed instead, which takes no space on a full disk
               barrier
    all        raise if there is a step-N.failed
               barrier
    rank 0     removes it

Every rank passes the same four barriers whatever happens, so a failure of one never leaves another waiting.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megascale_moe.checkpoint.files import write_pieces
from megascale_moe.checkpoint.manifest import MANIFEST, Manifest, TensorPiece
from megascale_moe.checkpoint.steps import clear, prune, publish, step_folder
from megascale_moe.config import ConfigError


class SaveError(RuntimeError):
    """A checkpoint could not be saved; older ones, also of the same step, are as they were. Raised on all ranks."""


def save(
    folder: Path,
    step: int,
    pieces: Iterable[TensorPiece],
    extra: dict[str, Any],
    *,
    rank: int,
    world: int,
    barrier: Callable[[], None],
    keep: int = 0,
) -> Path:
    """Save a checkpoint as `folder/step-N` and return that path. Called by all ranks with their own pieces.

    Together the pieces must hold every element of every tensor exactly once: of replicas one rank saves one. `extra`
    is anything JSON knows, that of rank 0 counts. `barrier` returns when all ranks have called it. An existing step-N
    is replaced when the new one is complete. `keep` > 0 leaves that many checkpoints: this one and those before it.

    Raises SaveError on every rank if any of them failed (disk full, a missing or doubled element, ...); the folder is
    then as before.
    """
    partial, target, failed = (step_folder(folder, step, suffix) for suffix in (".partial", "", ".failed"))
    data, note = _file(partial, rank, "safetensors"), _file(partial, rank, "json")

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        partial.mkdir()

    def write() -> None:
        part = Manifest(step, world)
        write_pieces(data, pieces, part)
        part.write(note)

    def confirm() -> None:
        if failed.exists():
            raise SaveError(_reason(failed, 0))
        if not target.is_dir():
            raise SaveError("it is not there; do all ranks see the same folder?")

    error = _attempt(begin) if rank == 0 else None
    barrier()
    error = error or _attempt(write)
    if error:
        # Leave word of it in the space that the data took: the disk may be full. The note goes too: it may be complete
        # although forcing it to the disk failed, and rank 0 would believe it.
        _attempt(note.unlink)
        _attempt(data.unlink)
        _leave_word(partial, rank, error)
    barrier()
    if rank == 0:
        error = error or _attempt(lambda: _finish(partial, target, Manifest(step, world, extra)))
        if error:
            _fail(partial, failed, error)
        elif keep:
            _attempt(lambda: prune(folder, step, keep))  # an old one that cannot be removed does not spoil the new one
    barrier()
    error = error or _attempt(confirm)
    barrier()
    if rank == 0:
        shutil.rmtree(failed, ignore_errors=True)
    if error:
        raise SaveError(f"checkpoint {target} is not saved: {_describe(error)}") from error
    return target


def _attempt(action: Callable[[], object]) -> Exception | None:
    """Return the failure of an action, because the barriers still have to be passed."""
    try:
        action()
    except Exception as error:
        return error
    return None


def _finish(partial: Path, target: Path, whole: Manifest) -> None:
    """Merge what the ranks noted into the manifest and publish."""
    notes = [_file(partial, rank, "json") for rank in range(whole.world)]
    for rank, note in enumerate(notes):
        try:
            whole.merge(Manifest.read(note))
        except FileNotFoundError:
            raise SaveError(f"rank {rank}: {_reason(partial, rank)}") from None
    whole.check()
    whole.write(partial / MANIFEST)
    for note in notes:
        note.unlink()
    publish(partial, target)


def _fail(partial: Path, failed: Path, error: Exception) -> None:
    """Tell the others, who look for `failed` and find the reason in rank 0's note."""
    if _attempt(lambda: partial.rename(failed)):
        _attempt(failed.mkdir)
    for data in failed.glob("*.safetensors"):
        _attempt(data.unlink)
    _leave_word(failed, 0, error)


def _file(folder: Path, rank: int, suffix: str) -> Path:
    return folder / f"rank-{rank:05d}.{suffix}"


def _leave_word(folder: Path, rank: int, error: Exception) -> None:
    _attempt(lambda: _file(folder, rank, "error").write_text(_describe(error)))


def _reason(folder: Path, rank: int) -> str:
    """Return why a rank failed."""
    try:
        return _file(folder, rank, "error").read_text()
    except OSError:
        return "left no word; do all ranks see the same folder?"


def _describe(error: Exception) -> str:
    known = isinstance(error, SaveError | ConfigError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"
