"""Shared test setup: one thread per process (rounding alike everywhere, no hang in forked ranks), a fixed seed.

Ranks are forked from this process some hundred times, and each fork copies the page tables of all that the process
holds: 23 ms with everything that tests import at once, 10 with torch and the package alone. So what is large is
imported where it is used, freed memory goes back to the system after every file, and tests marked `bulky`, which leave
much behind (transformers' models, a compiler, caches of a search), come last.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megascale_moe.checkpoint import files
from tests.memory import give_back
from tests.runs import Place, ended, make_place

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bulky tests come last, all others in the order of their files."""
    items.sort(key=lambda item: item.get_closest_marker("bulky") is not None)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not look at it again and again."""
    give_back()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, alone or in the whole suite."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def no_memory_kept() -> Iterator[None]:
    """What a file's tests have freed goes back to the system."""
    yield
    give_back()


@pytest.fixture
def torch_compiler() -> None:
    """Imported before ranks are forked that need it, for a meter or FSDP: it takes each of them a second or more."""
    importlib.import_module("torch._dynamo")


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
