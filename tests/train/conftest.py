"""Fixtures of several files."""

import pytest

from megascale_moe.train.checkpoint import files


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint files have so many blocks that every read crosses some."""
    monkeypatch.setattr(files, "BLOCK", 64)
