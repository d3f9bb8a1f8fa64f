"""Shared test setup: one thread per process (rounding alike everywhere, no hang in forked ranks), a fixed seed."""

from __future__ import annotations

import gc

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, alone or in the whole suite."""
    torch.manual_seed(0)
