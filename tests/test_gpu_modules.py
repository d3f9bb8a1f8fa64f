"""Tests that need a GPU run where there is one; elsewhere they are at least read, so that they do not fall behind."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

MODULES = sorted(path.stem for path in (Path(__file__).parent / "gpu").glob("test_*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_of_a_gpu_can_be_imported(module: str) -> None:
    found = vars(importlib.import_module(f"tests.gpu.{module}"))
    assert any(name.startswith("test_") for name in found)
