"""Fixtures of several files."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megascale_moe.train.checkpoint import files
from tests.train.runs import Place, ended, make_place

# Network namespaces need root and iproute2; where they are missing there is nothing to collect.
collect_ignore = [] if os.geteuid() == 0 and shutil.which("ip") else ["test_two_nodes.py"]


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
