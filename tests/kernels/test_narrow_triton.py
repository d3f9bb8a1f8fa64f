"""The Triton kernels under Triton's interpreter, byte for byte those of the plain ones; on GPUs see tests/gpu.

The interpreter takes two milliseconds for each row that has a scale of its own: of most inputs every fifth is encoded.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from megascale_moe.kernels import narrow, narrow_triton
from tests.kernels.test_narrow import INPUTS, input_of

def check(whole, every=5):
    for sharing in ("rows", "channels"):
        x = whole[::every] if sharing == "rows" else whole
        rows, width = x.shape
        form = narrow.Float8(sharing)
        wanted = form.encode(x)
        found = torch.full_like(wanted, 7)
        numbers, scales = found[: x.numel()].view(rows, width), found[x.numel() :]
        narrow_triton.encode(x, numbers, scales, per_row=sharing == "rows")
        finite = x.isfinite().all()
        assert torch.equal(scales, wanted[x.numel() :]), sharing
        assert not finite or torch.equal(numbers, wanted[: x.numel()].view(rows, width)), sharing
        out = torch.empty(x.shape)  # the interpreter cuts off what a store to BF16 should round
        narrow_triton.decode(numbers, scales, out, per_row=sharing == "rows")
        plain = form.decode(wanted, torch.empty_like(out))
        assert torch.equal(out.isfinite(), plain.isfinite())
        assert torch.equal(out.nan_to_num(0, 0, 0), plain.nan_to_num(0, 0, 0)), sharing

for name in INPUTS:
    check(input_of(name), 1 if name == "outliers" else 5)
check(input_of("normal").bfloat16())
check(input_of("normal")[:130, :70])  # neither rows nor columns fill a tile, rows are not next to each other
bad = input_of("normal")
bad[5, 4], bad[200, 1], bad[250, 2] = float("nan"), float("inf"), -float("inf")
check(bad)
check(torch.empty(0, 8))
print("all equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "all equal" in run.stdout
