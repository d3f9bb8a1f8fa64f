"""Metrics: records that any JSON reader takes, a file that survives kills and resumes, and lines for people."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megascale_moe.testing import run_ranks
from megascale_moe.train.hardware import available_cores, gpu_peak, peak_flops, peak_memory
from megascale_moe.train.metrics import StepMetrics, metrics_writer, read_metrics, truncate_after
from megascale_moe.train.progress import Progress, clock, counted_progress, short
from tests.memory import give_back

# Of interface.md, in its order.
KEYS = [
    "step", "loss", "aux_loss", "grad_norm", "lr", "tokens_per_s", "tflops", "mfu", "step_s", "comm_s",
    "exposed_comm_s", "wire_bytes", "peak_memory_bytes", "expert_load_max",
]  # fmt: skip
CPU = torch.device("cpu")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def metrics(step: int, **changes: Any) -> StepMetrics:
    values = StepMetrics(
        step=step, loss=3.0 / step, aux_loss=0.01, grad_norm=1.5, lr=1e-3, tokens_per_s=12_345.0, tflops=0.1, mfu=0.5,
        step_s=0.25, comm_s=0.1, exposed_comm_s=0.05, wire_bytes=2**40, peak_memory_bytes=2**31,
        expert_load=(1.25, 2.0),
    )  # fmt: skip
    return dataclasses.replace(values, **changes)


def write(folder: Path, first: int, last: int, **changes: Any) -> str:
    """Write steps first..last as a run resumed before `first` would; returns what went to its stream."""
    stream = io.StringIO()
    with metrics_writer(folder, steps=last, start=first - 1, stream=stream) as record:
        for step in range(first, last + 1):
            record(metrics(step, **changes))
    return stream.getvalue()


def strict(text: str) -> Any:
    """Parse JSON and refuse NaN and Infinity, which Python's reader would take."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_a_record_has_exactly_the_promised_keys() -> None:
    assert list(metrics(1).record()) == [*KEYS, "expert_load"]
    assert list(metrics(1, eval_loss=2.5).record()) == [*KEYS, "eval_loss", "expert_load"]
    assert metrics(1).record()["expert_load_max"] == 2.0


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, loss=math.nan, grad_norm=math.inf, eval_loss=-math.inf, expert_load=(1.0, math.nan))
    record = strict((tmp_path / "metrics.jsonl").read_text())
    assert (record["loss"], record["grad_norm"], record["eval_loss"]) == (None, None, None)
    assert record["expert_load"] == [1.0, None]
    assert record["wire_bytes"] == 2**40  # an integer stays one


def test_a_model_without_experts_has_no_expert_load() -> None:
    record = metrics(1, expert_load=()).record()
    assert (record["expert_load"], record["expert_load_max"]) == ([], None)


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    write(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, loss=1.0)
    write(tmp_path, 4, 6, loss=2.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4}', b"\xff\xfe\n", b"[]\n", b"{}\n", b"\n"])
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert steps(tmp_path) == [1, 2, 3]
    write(tmp_path, 4, 5)
    assert [strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_failed_truncation_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        truncate_after(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_every_step_is_in_the_file_before_the_next_begins(tmp_path: Path) -> None:
    with metrics_writer(tmp_path, steps=3, stream=io.StringIO()) as record:
        for step in (1, 2, 3):
            record(metrics(step))
            assert steps(tmp_path) == list(range(1, step + 1))


def test_tensorboard_has_every_scalar_and_the_load_of_every_layer(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, eval_loss=2.5)
    found = events(tmp_path)
    layers = ["expert_load/moe_layer_00", "expert_load/moe_layer_01"]
    assert set(found.Tags()["scalars"]) == {*KEYS[1:], "eval_loss", *layers}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_tensorboard_hides_steps_computed_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, loss=1.0)
    write(tmp_path, 4, 6, loss=2.0)
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_a_log_file_gets_a_plain_line_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write(tmp_path, 1, 25).splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert lines[-1] == "step 25/25  loss 0.1200  12.3k tokens/s  ETA 0:00"
    assert capsys.readouterr().out == ""


def test_an_evaluation_is_shown_at_once_and_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(steps=100, log_every=0)  # standard error, which is no terminal under pytest
    progress.update(1, 3.0, None, 1e6, 0.1)
    progress.update(2, 3.0, 2.5, 1e6, 0.1)
    progress.update(100, 2.0, None, 1e6, 0.1)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert ["eval 2.5000" in line for line in err.splitlines()] == [True, True]
    assert err.count("step 2/100") == 1


def test_a_terminal_gets_one_live_line_and_keeps_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    progress = Progress(steps=3, stream=stream)
    before_a_kill = stream.getvalue()
    for step in (1, 2, 3):
        progress.update(step, 3.0 / step, None, 950.0, 0.5)
    progress.close()
    assert before_a_kill.rfind("\x1b[?25h") > before_a_kill.rfind("\x1b[?25l")
    assert "step 3/3  loss 1.0000  950 tokens/s  ETA 0:00" in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = Progress(steps=2, log_every=1, stream=stream)
    progress.update(1, 1.0, None, 10.0, 2.0)
    assert stream.getvalue() == "step 1/2  loss 1.0000  10 tokens/s  ETA 0:02\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_preparation_shows_nothing_for_a_prepared_corpus(stream: io.StringIO) -> None:
    with counted_progress(stream):
        pass
    assert stream.getvalue() == ""


def test_preparation_shows_its_beginning_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, live = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    for stream in (plain, live):
        with counted_progress(stream) as progress:
            for done in (1, 50, 99, 100, 100):
                progress("preparing the corpus", done, 100)
    assert plain.getvalue() == "preparing the corpus: 1 %\npreparing the corpus: 100 %\n"
    assert "preparing the corpus" in live.getvalue()


def test_numbers_for_people() -> None:
    assert [short(number) for number in (9.5, 950, 12_345, 1_407_700)] == ["9.5", "950", "12.3k", "1.41M"]
    assert [clock(s) for s in (0, 59.6, 3_599, 3_600, 710_208)] == ["0:00", "1:00", "59:59", "1:00:00", "8d 05:16:48"]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_peak_of_known_gpus(name: str, teraflops: float | None) -> None:
    peak = gpu_peak(name)
    assert (peak and peak / 1e12) == teraflops


def test_a_cpu_is_measured_once_and_shared_by_ranks_beyond_its_cores() -> None:
    alone = peak_flops(CPU, torch.float32)
    crowd = peak_flops(CPU, torch.float32, local_ranks=4 * available_cores())
    assert alone == peak_flops(CPU, torch.float32)
    assert alone > 1e8  # a single core of any machine this century
    assert crowd == alone / 4


def test_measuring_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    peak_flops(CPU, torch.float64)
    assert torch.equal(torch.get_rng_state(), before)


def peak_around_a_block() -> tuple[int, int]:
    """Peak before, and after 64 MiB came and went."""
    before = peak_memory(CPU)
    block = b"x" * 2**26
    del block
    return before, peak_memory(CPU)


def test_peak_memory_counts_what_was_freed_since() -> None:
    # In a fresh child, whose peak is its present size, and which has nothing left of what tests before this one freed.
    # Linux counts pages in batches: 1 MiB of slack.
    give_back()
    before, after = run_ranks(1, peak_around_a_block)[0]
    assert 2**26 - 2**20 <= after - before <= 2**26 + 2**23
