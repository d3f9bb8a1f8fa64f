"""Shared test setup: one thread per process (timings and rounding alike everywhere), and `tests/` importable."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
