"""Shared test setup: one thread per process (rounding alike everywhere, no hang in forked ranks), a fixed seed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megascale_moe.checkpoint import files
from tests.runs import Place, ended, make_place

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, alone or in the whole suite."""
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint files have so many blocks that every read crosses some."""
    monkeypatch.setattr(files, "BLOCK", 64)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Whatever a test started ends with it."""
    with ended():
        yield


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where a test's runs live."""
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where all runs of a file live, each under its own name: the corpus is prepared once."""
    return make_place(tmp_path_factory.mktemp("runs"))
