"""The doctor: right verdicts, one JSON document, and an end in bounded time whatever hangs."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megascale_moe.tools import doctor
from megascale_moe.tools.doctor import Finding, Status

FINE = [Finding("a", "here"), Finding("b", "none", "would help", Status.OPTIONAL)]
BAD = [*FINE, Finding("c", "none [red]", "install it", Status.PROBLEM)]


def verdict(findings: list[Finding], name: str) -> Status:
    return next(finding.status for finding in findings if finding.name == name)


def test_this_machine_can_run_the_tests(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path)
    assert [finding for finding in findings if finding.status == Status.PROBLEM] == []
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    assert {"python", "torch", "cpu", "cores", "vector units", "memory", "gloo", "two ranks", "used"} <= set(names)
    assert {"c++ compiler", "tensorboard", "triton", "datasets", "pyarrow", "run folder", "loopback"} <= set(names)


def test_every_finding_that_is_not_ok_says_what_would_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    findings = doctor.examine(tmp_path)
    assert verdict(findings, "rich") == Status.PROBLEM
    assert {verdict(findings, name) for name in (*doctor.OPTIONAL, "c++ compiler")} == {Status.OPTIONAL}
    assert [finding for finding in findings if finding.status != Status.OK and not finding.hint] == []


@pytest.mark.parametrize(("findings", "status"), [(FINE, 0), (BAD, 1)])
def test_json_is_one_document(
    findings: list[Finding], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder: findings)
    assert doctor.main(json=True) == status
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] == (status == 0)
    assert document["findings"][1] == {"name": "b", "status": "optional", "value": "none", "hint": "would help"}


def test_the_table_has_a_line_for_every_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder: BAD)
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["a", "ok"], ["b", "optional"], ["c", "problem"]]
    assert "none [red]" in lines[3]  # brackets are text, not colours


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.10.1", "problem"), ("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("3.0.0a0+git1", "ok"), ("1.13.1", "problem")],
)
def test_torch_is_new_enough(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor._torch().status == status


@pytest.mark.parametrize(
    ("flags", "status"),
    [({"avx2", "avx512f"}, "optional"), ({"avx512f", "avx512_bf16"}, "ok"), ({"amx_bf16"}, "ok"), (set(), "optional")],
)
def test_bf16_needs_its_instructions(flags: set[str], status: str) -> None:
    assert doctor._vector_units(frozenset(flags)).status == status


def test_a_torch_without_gloo_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert doctor._gloo().status == Status.PROBLEM
    assert [finding.name for finding in doctor._exchange()] == ["loopback"]


def test_ranks_that_hang_are_given_up_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_swap", lambda rank: time.sleep(60))
    start = time.monotonic()
    exchange = doctor._exchange(seconds=1.0)[-1]
    assert exchange.status == Status.PROBLEM
    assert "no answer within 1 s" in exchange.value
    assert time.monotonic() - start < 10  # 1 s, and the time a busy machine needs to fork and end two processes
    assert multiprocessing.active_children() == []


def test_ranks_that_receive_something_else_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_to_all_single", lambda received, sent: received.zero_())
    assert doctor._exchange()[-1].status == Status.PROBLEM


def test_a_run_folder_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert doctor._disk(tmp_path / "runs" / "new").status == Status.OK
    file = tmp_path / "file"
    file.touch()
    assert doctor._disk(file / "new").status == Status.PROBLEM


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert doctor._disk(tmp_path).status == Status.PROBLEM


def test_a_folder_without_permission_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor._disk(tmp_path).status == Status.PROBLEM
