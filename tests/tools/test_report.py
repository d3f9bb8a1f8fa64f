"""The report says what the run's files say, needs nothing but itself, and refuses what it cannot read.

One small run of two ranks is made for the whole file; tests that damage something work on copies of its folder.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ConfigError, OverlapConfig, load
from megascale_moe.engine.cost import Rates
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.engine.order import makespan, simulate
from megascale_moe.engine.trace import Event
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.storageless import META
from megascale_moe.presets import PRESETS
from megascale_moe.tools.report.command import report
from megascale_moe.tools.report.page import curves, page
from megascale_moe.tools.report.run import read_run
from megascale_moe.tools.report.words import count, duration, size
from megascale_moe.train.timeline import PART, WHOLE, highest, kinds, observed, totals, with_optimizer
from tests.runs import Place, make_place, start

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of two ranks that measures, reorders, and traces its last step."""
    place = make_place(tmp_path_factory.mktemp("report"))
    place.train(
        "--parallel.node=2", "--parallel.dp=1", "--overlap.order=scheduled", "--overlap.split=auto",
        "--overlap.remat=paper", "--train.eval_every=3", "--run.trace_steps=1",
    )  # fmt: skip
    return place


@pytest.fixture
def copy(trained: Place, tmp_path: Path) -> Path:
    """Its folder, to be damaged."""
    return Path(shutil.copytree(trained.folder(), tmp_path / "copy"))


class Reader(HTMLParser):
    """Collects text of scripts, attributes that could fetch something, and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def data_of(path: Path) -> dict[str, Any]:
    """What is embedded in a page."""
    found: dict[str, Any] = json.loads(Reader(path.read_text()).scripts[0])
    return found


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Operators of a list as dictionaries."""
    return [dict(zip(found["table"]["columns"], row, strict=True)) for row in found["table"]["rows"]]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_training_writes_the_page(trained: Place) -> None:
    data = data_of(trained.folder() / "report.html")
    assert data["kind"] == "run"
    assert [tile["name"] for tile in data["tiles"]][:3] == ["Steps", "Loss", "Evaluation loss"]


def test_curves_are_those_of_the_metrics(trained: Place) -> None:
    metrics, data = trained.metrics(), data_of(trained.folder() / "report.html")
    for name in ("step", "loss", "tokens_per_s", "grad_norm"):
        assert data["metrics"][name] == [entry[name] for entry in metrics]
    held = [[entry["step"], entry["eval_loss"]] for entry in metrics if "eval_loss" in entry]
    assert data["metrics"]["eval_loss"] == held
    assert [step for step, _ in held] == [3, STEPS]
    layers = [list(layer) for layer in zip(*(entry["expert_load"] for entry in metrics), strict=True)]
    assert data["load"]["layers"] == layers
    values = {tile["name"]: tile["value"] for tile in data["tiles"]}
    assert values["Loss"] == f"{metrics[-1]['loss']:.3f}"
    later = metrics[STEPS // 2 :]
    exposed = sum(entry["exposed_comm_s"] for entry in later) / sum(entry["step_s"] for entry in later)
    assert values["Exposed communication"] == f"{exposed:.1%}"


def test_lists_are_the_plans_own_and_their_spans_those_of_simulate(trained: Place) -> None:
    """Seconds of an operator are the length of its bar; simulating the plan's list with them gives the bars again."""
    config = load(trained.folder() / "config.toml", [], PRESETS)
    data = data_of(trained.folder() / "report.html")["timeline"]
    mesh = Mesh(**data["mesh"])
    assert mesh == Mesh(node=2, ep=2)
    axes = axes_of(mesh, 0, "gloo")
    plan = StepPlan(config.model, config.parallel, axes, torch.float32, 4, device=META)
    ops = with_optimizer(replace(plan, overlap=OverlapConfig(remat="paper")), config.train)
    rows = rows_of(data["plain"])
    assert [row["name"] for row in rows] == [op.name for op in ops]
    assert [row["bytes"] for row in rows] == [int(op.cost.wire_bytes) for op in ops]
    length = {id(op): row["end"] - row["start"] for op, row in zip(ops, rows, strict=True)}
    spans = simulate(ops, lambda op: length[id(op)])
    # Times are rounded to nanoseconds and added up over a few hundred operators.
    assert [row["start"] for row in rows] == pytest.approx([span.start for span in spans], abs=1e-6)
    assert [row["exposed"] for row in rows] == pytest.approx([span.exposed for span in spans], abs=1e-6)
    assert data["plain"]["totals"]["seconds"] == pytest.approx(makespan(spans), abs=1e-6)
    sent = {(kind["name"], kind["phase"]): kind["bytes"] for kind in data["plain"]["kinds"]}  # page.js compares them
    assert sum(sent.values()) == sum(row["bytes"] for row in rows if row["stream"] != "compute")
    assert sent.keys() <= {(kind["name"], kind["phase"]) for kind in data["overlapped"]["kinds"]}
    assert sorted({row["phase"] for row in rows_of(data["overlapped"])}) == ["B", "F", "O", "R", "W"]


def test_the_measured_step_is_that_of_the_trace(trained: Place) -> None:
    data = data_of(trained.folder() / "report.html")["timeline"]
    assert sorted(data["traced"]) == ["0", "1"]
    trace = json.loads((trained.folder() / "trace-rank-1.json").read_text())["traceEvents"]
    events = [entry for entry in trace if entry["ph"] == "X"]
    rows = rows_of(data["traced"]["1"])
    assert [row["name"] for row in rows] == [event["name"][2:] for event in events]
    assert sum(row["exposed"] for row in rows) == pytest.approx(
        sum(event["args"]["exposed_us"] for event in events) / 1e6, abs=1e-6
    )


def test_memory_says_what_policies_keep(trained: Place) -> None:
    memory = data_of(trained.folder() / "report.html")["memory"]
    kept = memory["kept"]
    assert kept["none"] > kept["paper"] > kept["full"] > 0
    assert memory["peak"] == max(memory["alive"]) >= kept["paper"]
    assert len(memory["phases"]) == len(memory["alive"]) == memory["operators"]


@pytest.mark.bulky  # a meter imports torch's compiler
def test_memory_of_a_real_step_is_that_of_a_rehearsal(trained: Place) -> None:
    """One rank, where routing does not change how many rows there are."""
    trained.train("--train.steps=3", "--overlap.remat=paper", run="alone")
    folder = trained.folder("alone")
    timeline = json.loads((folder / "timeline.json").read_text())
    seen = timeline.pop("memory")
    (folder / "timeline.json").write_text(json.dumps(timeline))
    report(folder, [], None)
    rehearsed = json.loads((folder / "timeline.json").read_text())["memory"]
    assert rehearsed["kept"] == seen["kept"]
    assert rehearsed["phases"] == seen["phases"]
    # Documents of a real step have their own spans; tables of whole rows are a few hundred bytes smaller.
    assert rehearsed["peak"] == pytest.approx(seen["peak"], rel=0.02)


def test_made_again_from_the_folder_alone(trained: Place, copy: Path) -> None:
    before = data_of(copy / "report.html")
    (copy / "report.html").unlink()
    found = report(copy, [], None)
    assert found["path"] == str(copy / "report.html")
    after = data_of(copy / "report.html")
    assert after["timeline"] == before["timeline"]
    last = trained.metrics()[-1]
    assert (found["step"], found["loss"], found["eval_loss"]) == (STEPS, last["loss"], last["eval_loss"])


def test_a_run_without_timeline_gets_estimates(copy: Path) -> None:
    (copy / "timeline.json").unlink()
    report(copy, [], None)
    data = data_of(copy / "report.html")
    assert data["text"]["source"].startswith("Seconds of operators are estimates")
    assert data["metrics"]["step"][-1] == STEPS


def test_the_torn_line_of_a_killed_run_is_dropped(copy: Path) -> None:
    path = copy / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert report(copy, [], None)["step"] == STEPS - 1


# --- the page ---------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched(trained: Place) -> None:
    text = (trained.folder() / "report.html").read_text()
    found = Reader(text)
    assert found.links == []
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_hostile_names_stay_text(copy: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    path = copy / "timeline.json"
    timeline = json.loads(path.read_text())
    timeline["overlapped"]["table"]["rows"][0][0] = evil
    timeline["overlapped"]["kinds"][0]["name"] = evil
    timeline["overlapped"]["kinds"][0]["exposed"] = 1e3  # the sentence below the picture names it
    path.write_text(json.dumps(timeline))
    folder = copy.rename(copy.parent / "<img src=x onerror=alert(1)>&amp;")
    report(folder, [], None)
    found = Reader((folder / "report.html").read_text())
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    data = json.loads(found.scripts[0])
    assert rows_of(data["timeline"]["overlapped"])[0]["name"] == evil
    assert data["text"]["where"] == str(folder)


def test_numbers_that_are_not_finite_leave_gaps() -> None:
    losses = [1.0, None, 1.0]
    records = [{"step": i, "loss": losses[i], "tokens_per_s": 1.0, "grad_norm": None} for i in range(3)]
    found = curves(records)
    assert found["loss"] == losses
    assert found["grad_norm"] == [None] * 3


def test_long_runs_are_bundled() -> None:
    records = [{"step": i, "loss": float(i), "tokens_per_s": 1.0, "grad_norm": 1.0} for i in range(1, 2501)]
    found = curves(records)
    assert len(found["step"]) == 834  # of three steps each
    assert (found["step"][0], found["loss"][0]) == (3, 2.0)
    assert found["step"][-1] == 2500


# --- a plan -----------------------------------------------------------------------------------------------------------


def plan(tmp_path: Path, *overrides: str, gpus: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    path = tmp_path / "plan.toml"
    path.write_text('[model]\npreset = "debug"\n[train]\nglobal_batch = 8\n')
    return report(path, list(overrides), None, gpus), data_of(tmp_path / "report.html")


def test_a_plan_without_a_run(tmp_path: Path) -> None:
    large = ["model.hidden=1024", "model.sequence_length=1024", "model.ffn_hidden=1024"]
    found, data = plan(tmp_path, *large, "parallel.node=4", "overlap.order=scheduled")
    assert data["kind"] == found["kind"] == "plan"
    assert found["overlapped_step_s"] < found["plain_step_s"]
    assert data["metrics"] == {}
    assert data["text"]["layout"].startswith("4 ranks, 4 ranks per node")


@pytest.mark.parametrize("layout", ["parallel.node=4", "parallel.dp=2"])  # of the latter only the optimizer sends
def test_what_overlaps_nothing_is_shown_what_it_could_be(tmp_path: Path, layout: str) -> None:
    _, data = plan(tmp_path, layout)
    assert data["timeline"]["supposed"]
    assert data["text"]["see_timeline"].startswith("Nothing is overlapped here")


def test_one_rank_has_no_links(tmp_path: Path) -> None:
    found, data = plan(tmp_path)
    assert found["plain_step_s"] == found["overlapped_step_s"]
    assert data["kinds"] == []
    assert "talks to nobody" in data["text"]["see_timeline"]


def test_a_long_step_is_drawn_in_part(tmp_path: Path) -> None:
    _, data = plan(
        tmp_path, "parallel.pp=2", "parallel.node=2", "model.layers=12", "train.global_batch=16", "overlap.order=paper",
        "overlap.remat=full",
    )  # fmt: skip
    found = data["timeline"]["overlapped"]
    rows = rows_of(found)
    assert found["totals"]["operators"] > WHOLE > PART >= len(rows)
    assert data["timeline"]["drawn_layers"] == list(range(len(data["timeline"]["drawn_layers"])))
    assert {row["phase"] for row in rows} == {"F", "B", "W", "R"}
    assert "drawn are forward and backward of one micro-batch" in data["text"]["see_part"]
    assert not data["memory"]["whole"]


def test_budget_is_planned_with_sizes(tmp_path: Path) -> None:
    _, data = plan(tmp_path, "parallel.node=2", "overlap.remat=budget", "overlap.activation_bytes=1200000")
    kept = data["memory"]["kept"]
    assert kept["full"] < kept["budget"] < kept["none"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def damaged(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    path.write_text(change(path.read_text()))


def second_line(new: str) -> Any:
    def change(text: str) -> str:
        lines = text.splitlines()
        return "\n".join([lines[0], new, *lines[2:], ""])

    return change


DAMAGE = {
    "no config": ("config.toml", None, "no run, it has no config.toml"),
    "config": ("config.toml", lambda text: text + "[nonsense]\n", "section [nonsense] is unknown"),
    "no metrics": ("metrics.jsonl", None, "no step of it has ended"),
    "empty metrics": ("metrics.jsonl", lambda text: "", "no step has ended yet"),
    "no JSON": ("metrics.jsonl", second_line('{"step": 2, "los'), "line 2 is damaged: no JSON"),
    "no record": ("metrics.jsonl", second_line("[1, 2]"), "line 2 is damaged: no record of a step"),
    "missing": ("metrics.jsonl", second_line('{"step": 2}'), "line 2 is damaged: loss is missing"),
    "text": ("metrics.jsonl", lambda text: re.sub(r'"loss": [^,]+', '"loss": "x"', text, count=1), "is no number"),
    "order": ("metrics.jsonl", lambda text: text + text.splitlines()[0] + "\n", "step 1 after 6"),
    "timeline": ("timeline.json", lambda text: text[:100], "remove it"),
    "trace": ("trace-rank-1.json", lambda text: text[:100], "remove it"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(copy: Path, case: str) -> None:
    name, change, message = DAMAGE[case]
    if change is None:
        (copy / name).unlink()
    else:
        damaged(copy, name, change)
    with pytest.raises(ConfigError) as error:
        report(copy, [], None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command(trained: Place, copy: Path, tmp_path: Path) -> None:
    good = start("report", str(copy), "--out", str(tmp_path / "page.html"), "--json").wait()
    assert (good.status, good.document["path"]) == (0, str(tmp_path / "page.html")), good.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    for arguments, message in [
        ((str(tmp_path / "nothing"),), "is not there"),
        ((str(tmp_path),), "no run"),
        ((str(copy), "--train.steps=3"), "a run is reported as it was configured"),
        ((str(copy), "--gpus=2"), "a run is reported as it was run"),
        ((str(trained.config), "--model.top_k=9"), "exceeds model.experts"),
        ((str(trained.config), "--out", str(tmp_path / "no" / "page.html")), "cannot be written"),
    ]:
        bad = start("report", *arguments).wait()
        assert (bad.status, len(bad.messages), bad.stdout) == (2, 1, ""), bad.stderr
        assert message in bad.messages[0]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_message_is_hidden_only_while_something_is_computed() -> None:
    """Two travel at a time from 1 to 3; computation waits for one of them from 2 to 3."""
    events = [
        Event("a", Phase.F, Stream.COMPUTE, 0.0, 2.0),
        Event("layers.0.x@1", Phase.F, Stream.INTRA, 1.0, 3.0, 7, waited=2.0),
        Event("layers.1.x@2", Phase.F, Stream.INTRA, 3.0, 3.5, 7),
        Event("y", Phase.B, Stream.INTER, 1.0, 3.0, 5),
    ]
    x, y = kinds(events)
    assert (x["name"], x["count"], x["bytes"], x["seconds"], x["exposed"]) == ("x", 2, 14, 2.5, 1.0)
    assert (y["name"], y["phase"], y["seconds"], y["exposed"]) == ("y", "B", 2.0, 1.0)
    assert totals(events)["exposed"] == 1.0
    assert totals(events)["seconds"] == 3.5


def op(name: str, stream: Stream = Stream.COMPUTE, **cost: float) -> Op:
    return Op(name=name, reads=(), writes=(), run=lambda: None, stream=stream, phase=Phase.F, cost=Cost(**cost))


def event(name: str, stream: Stream, took: float, exposed: float = 0.0) -> Event:
    return Event(name, Phase.F, stream, 0.0, took, 0, took - exposed if exposed else None)


def test_a_message_that_nobody_waited_for_took_no_longer_than_its_rate() -> None:
    ops = [op("c", flops=10.0), op("m", Stream.INTRA, wire_bytes=100.0), op("h", Stream.INTRA, wire_bytes=100.0)]
    events = [
        event("c", Stream.COMPUTE, 0.5), event("m", Stream.INTRA, 2.0, exposed=1.0), event("h", Stream.INTRA, 9.0),
    ]  # fmt: skip
    found = observed(ops, [events])
    assert found.seconds(op("c", flops=20.0)) == pytest.approx(1.0, abs=1e-4)  # twice the work
    assert found.seconds(ops[1]) == pytest.approx(2.0, abs=1e-4)
    assert found.seconds(ops[2]) == pytest.approx(Rates().seconds(ops[2]), abs=1e-4)


def test_the_highest_of_a_bundle_is_kept() -> None:
    curve = [("F", i % 700) for i in range(1400)]
    found = highest(curve)
    assert len(found) == 467
    assert max(found) == ("F", 699)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (5e-5, "50 µs"), (0.9999, "1 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_sizes() -> None:
    assert [count(x) for x in (7, 1234, 8.01e6, 3.52e11)] == ["7", "1.23 k", "8.01 M", "352 B"]
    assert [size(x) for x in (7, 1234, 112.41e6)] == ["7 B", "1.23 kB", "112 MB"]


def test_every_placeholder_is_filled(trained: Place) -> None:
    run = read_run(trained.folder())
    assert run.mesh == Mesh(node=2, ep=2)
    assert "$" not in page(data_of(trained.folder() / "report.html")).split("<noscript>")[0].split("</style>")[1]
