"""Idle time of the pipeline schedules: measured on ranks that run and send, against formula and simulation.

    python benchmarks/pipeline/run.py --write          # under 4 minutes on 2 cores; results.json
    python benchmarks/pipeline/run.py --table          # the tables of README.md from results.json

sleep      Forked gloo ranks run the list that trains (`pipeline.step.step_ops`) with one operator per phase that sleeps
           for its time and then passes a real message on. Sleeping ranks do not compete for cores, so four ranks on two
           cores show what the schedule costs, and nothing else. Rounds go over all cases. Idle time is
           1 - sum of work / (ranks x makespan), where work is what the operators took by the trace.
compute    Two ranks of one thread train a model like the quickstart's: what remains of the difference when stages are
           uneven (embedding and head), operators compete for memory and messages for cores. A round trains one step
           by each schedule, so that a busy minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megascale_moe.comm.axis import Axis, connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ParallelConfig, TrainConfig
from megascale_moe.data import Batch
from megascale_moe.engine.executor import Program
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Op, Phase, Stream
from megascale_moe.engine.trace import Event, Trace
from megascale_moe.pipeline.checker import bubble, timeline
from megascale_moe.pipeline.schedule import Action, schedule
from megascale_moe.pipeline.step import Message, Stage, of_micro, step_ops
from megascale_moe.presets import PRESETS
from megascale_moe.testing import run_ranks
from megascale_moe.train.hardware import cpu_model
from megascale_moe.train.trainer import Trainer

RESULTS = Path(__file__).parent / "results.json"
SCHEDULES = ("1f1b", "interleaved", "zero_bubble")
MESSAGE = Message((256, 256), torch.float32, torch.device("cpu"))  # 256 KiB
MICROS = (4, 8, 16)
TIMES = ((20.0, 20.0, 20.0), (20.0, 40.0, 20.0))  # F, B, W of a rank's whole share of one micro-batch, milliseconds


@dataclass(frozen=True)
class Case:
    """One row of the first table."""

    name: str
    pp: int
    micros: int
    times: tuple[float, float, float]

    @property
    def virtual(self) -> int:
        """Stages per rank."""
        return 2 if self.name == "interleaved" else 1

    def seconds(self, phase: str) -> float:
        """Of one stage's action."""
        f, b, w = (time / 1e3 / self.virtual for time in self.times)
        return {"F": f, "B": b, "W": w, "BW": b + w}[phase]


# --- sleeping ranks --------------------------------------------------------------------------------------------------


def stage_of(index: int, case: Case) -> Stage:
    """One operator per phase; F keeps what B reads, B what W reads."""
    last = case.pp * case.virtual - 1
    reads = f"hidden_{index}" if index else ""
    writes = f"hidden_{index + 1}" if index < last else ""
    out = torch.ones(MESSAGE.shape, dtype=MESSAGE.dtype)
    kept, slope = f"kept_{index}", f"slope_{index}"

    def forward(_: object) -> tuple[Any, ...]:
        time.sleep(case.seconds("F"))
        return out, out

    def backward(*_: object) -> tuple[Any, ...]:
        time.sleep(case.seconds("B"))
        return (out, out) if reads else (out,)

    ops = [
        Op(name="B", reads=(kept, grad(writes) if writes else ""), phase=Phase.B, run=backward,
           writes=(grad(reads), slope) if reads else (slope,)),
        Op(name="W", reads=(kept, slope), writes=(), phase=Phase.W, run=lambda *_: time.sleep(case.seconds("W"))),
    ]  # fmt: skip
    first = Op(name="F", reads=(reads or "tokens",), writes=(writes or "loss", kept), run=forward)
    return Stage([first], ops, reads, writes)


def spans(trace: Trace) -> list[tuple[float, float]]:
    """Start and end of the work; the clock is the machine's, the same in all ranks."""
    work = (event for event in trace.events if event.stream == Stream.COMPUTE and event.name != "sent")
    return [(event.start, event.end) for event in work]


def program_of(case: Case, pp: Axis) -> tuple[Program, list[str]]:
    """This rank's list, and what it is given."""
    last = pp.size * case.virtual - 1
    stages = {index: stage_of(index, case) for index in range(pp.index, last + 1, pp.size)}
    ops = step_ops(schedule(case.name, pp.size, case.micros, case.virtual), stages, last, pp, MESSAGE)
    names = [of_micro("tokens", micro) for micro in range(case.micros)]
    return Program(ops, names), names


def sleeping_rank(cases: list[Case], rounds: int) -> list[list[list[tuple[float, float]]]]:
    """Work of one rank, by case and round."""
    pp = connect(Mesh(pp=cases[0].pp))["pp"]
    programs = [program_of(case, pp) for case in cases]
    found: list[list[list[tuple[float, float]]]] = [[] for _ in cases]
    for index in range(rounds):
        for place, (program, names) in enumerate(programs):
            trace = Trace()
            dist.barrier()
            program.run(dict.fromkeys(names), {}, trace=trace)
            found[place].append(spans(trace))
        if pp.index == 0:
            print(f"  {pp.size} ranks, round {index + 1} of {rounds}", file=sys.stderr)
    return found


def idle(ranks: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """(fraction of all ranks' time without work, makespan in seconds) of one step."""
    makespan = max(end for row in ranks for _, end in row) - min(start for row in ranks for start, _ in row)
    work = sum(end - start for row in ranks for start, end in row)
    return 1 - work / (len(ranks) * makespan), makespan


def sleep_rows(pp: int, rounds: int) -> list[dict[str, Any]]:
    """The first table for one number of ranks."""
    cases = [Case(name, pp, micros, times) for times in TIMES for micros in MICROS for name in SCHEDULES]
    results = run_ranks(pp, sleeping_rank, cases, rounds, timeout=300)
    rows = []
    for index, case in enumerate(cases):
        measured = [idle([rank[index][step] for rank in results]) for step in range(rounds)]
        actions = schedule(case.name, pp, case.micros, case.virtual)

        def cost(action: Action, case: Case = case) -> float:
            return case.seconds(action.phase)

        simulated = timeline(actions, pp, cost)
        fractions = [fraction for fraction, _ in measured]
        rows.append({
            "pp": pp, "schedule": case.name, "micros": case.micros, "times_ms": case.times,
            "formula": round(bubble(case.name, pp, case.micros, case.virtual, *case.times), 4),
            "simulated": round(simulated.bubble, 4), "simulated_ms": round(simulated.makespan * 1e3, 1),
            "measured": round(median(fractions), 4), "min": round(min(fractions), 4), "max": round(max(fractions), 4),
            "measured_ms": round(median(makespan for _, makespan in measured) * 1e3, 1),
        })  # fmt: skip
    return rows


# --- computing ranks -------------------------------------------------------------------------------------------------


def compute_config(name: str, micros: int) -> Config:
    """The quickstart's model, one sequence per micro-batch."""
    virtual = 2 if name == "interleaved" else 1
    parallel = ParallelConfig(pp=2, dp=1, node=1, ep=1, schedule=name, virtual_stages=virtual)  # type: ignore[arg-type]
    train = TrainConfig(global_batch=micros, micro_batch=1, device="cpu", compile="off")
    return Config(model=PRESETS["quickstart"], parallel=parallel, train=train)


def computing_rank(micros: int, rounds: int) -> dict[str, list[tuple[list[tuple[float, float]], float]]]:
    """(work, seconds of the whole step) of every step, by schedule; the first round warms up."""
    found: dict[str, list[tuple[list[tuple[float, float]], float]]] = {name: [] for name in SCHEDULES}
    mesh = Mesh(pp=2)
    axes = connect(mesh)
    trainers = {name: Trainer(compute_config(name, micros), mesh, axes, torch.device("cpu")) for name in SCHEDULES}
    for trainer in trainers.values():
        trainer.initialise()
    model = PRESETS["quickstart"]
    generator = torch.Generator().manual_seed(0)
    for index in range(rounds + 1):
        order = SCHEDULES[index % 3 :] + SCHEDULES[: index % 3]
        for name in order:
            tokens = torch.randint(0, model.vocab, (micros, 1, model.sequence_length), generator=generator)
            batches = [Batch(row, row.roll(-1), (0, model.sequence_length)) for row in tokens]
            dist.barrier()
            start = time.perf_counter()
            result = trainers[name].step(batches, micros * model.sequence_length)
            seconds = time.perf_counter() - start
            if index:
                found[name].append((spans(in_pipeline(result.trace)), seconds))
        if mesh.stage_of(dist.get_rank()) == 0 and index % 4 == 0:
            print(f"  round {index} of {rounds}", file=sys.stderr)
    return found


def in_pipeline(trace: Trace) -> Trace:
    """Without the optimizer's part, which begins with the gradients' squares or their reduction."""
    events: list[Event] = []
    for event in trace.events:
        if event.name.startswith("gradients."):
            break
        events.append(event)
    return Trace(events)


def compute_rows(micros: int, rounds: int) -> list[dict[str, Any]]:
    """The second table."""
    results = run_ranks(2, computing_rank, micros, rounds, timeout=300)
    rows = []
    for name in SCHEDULES:
        steps = range(rounds)
        idles = [idle([rank[name][step][0] for rank in results]) for step in steps]
        seconds = [max(rank[name][step][1] for rank in results) for step in steps]
        spreads = {"step_ms": [s * 1e3 for s in seconds], "pipeline_ms": [m * 1e3 for _, m in idles],
                   "idle": [fraction for fraction, _ in idles]}  # fmt: skip
        first = [result[name] for result in results]
        work = [round(median(sum(e - s for s, e in step[0]) for step in rank) * 1e3, 1) for rank in first]
        against = [a / b for a, b in zip(spreads["step_ms"], reference_of(results, rounds), strict=True)]
        rows.append({
            "schedule": name, "micros": micros, "rounds": rounds, "work_ms_by_rank": work,
            "formula": round(bubble(name, 2, micros, 2 if name == "interleaved" else 1, 1, 1, 1), 4),
            # What would be idle if nobody ever waited but for the rank with more work.
            "uneven": round(1 - sum(work) / (len(work) * max(work)), 4), "against_1f1b": spread(against, 3),
            **{key: spread(values, 4 if key == "idle" else 1) for key, values in spreads.items()},
        })  # fmt: skip
    return rows


def reference_of(results: list[Any], rounds: int) -> list[float]:
    """Milliseconds of 1F1B's step in each round."""
    return [max(rank["1f1b"][step][1] for rank in results) * 1e3 for step in range(rounds)]


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median and the quarters around it."""
    ordered = sorted(values)
    return {
        "median": round(median(ordered), digits),
        "low": round(ordered[len(ordered) // 4], digits),
        "high": round(ordered[-1 - len(ordered) // 4], digits),
    }


# --- the machine and the document ------------------------------------------------------------------------------------


class Others:
    """Cores that other processes used while this one and its ranks worked: from the kernel's counters."""

    def __init__(self) -> None:
        self.begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        if not Path("/proc/stat").exists():
            return time.monotonic(), 0.0, 0.0
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:8]]
        total = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), total, sum(u.ru_utime + u.ru_stime for u in usage)

    def cores(self) -> float:
        """Since the beginning."""
        wall, total, own = (b - a for a, b in zip(self.begin, self._now(), strict=True))
        return round(max(total - own, 0.0) / wall, 2)


def header(*columns: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def tables(document: dict[str, Any]) -> str:
    """Both as Markdown."""
    lines = header("ranks", "F, B, W ms", "micro-batches", "schedule", "formula", "simulated", "measured", "min - max",
                   "step ms, simulated", "measured")  # fmt: skip
    for row in document["sleep"]["rows"]:
        times = ", ".join(f"{value:g}" for value in row["times_ms"])
        percents = [f"{row[key]:.1%}" for key in ("formula", "simulated", "measured")]
        extent = f"{row['min']:.1%} - {row['max']:.1%}"
        lines.append(
            f"| {row['pp']} | {times} | {row['micros']} | {row['schedule']} | {' | '.join(percents)} | {extent} | "
            f"{row['simulated_ms']:.0f} | {row['measured_ms']:.0f} |"
        )
    lines += ["", *header("schedule", "step ms", "to 1F1B, same round", "pipeline ms", "idle", "of it uneven stages",
                          "formula, even stages", "work ms by rank")]  # fmt: skip
    for row in document["compute"]["rows"]:
        step, pipeline, part, ratio = (row[key] for key in ("step_ms", "pipeline_ms", "idle", "against_1f1b"))
        lines.append(
            f"| {row['schedule']} | {step['median']:.0f} ({step['low']:.0f} - {step['high']:.0f}) | "
            f"{ratio['median']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f}) | "
            f"{pipeline['median']:.0f} ({pipeline['low']:.0f} - {pipeline['high']:.0f}) | "
            f"{part['median']:.1%} ({part['low']:.1%} - {part['high']:.1%}) | {row['uneven']:.1%} | "
            f"{row['formula']:.1%} | "
            f"{', '.join(f'{value:.0f}' for value in row['work_ms_by_rank'])} |"
        )
    others = {part: document[part]["cores_used_by_others"] for part in ("sleep", "compute")}
    lines += ["", f"Cores used by other processes meanwhile: {others['sleep']} (sleep), {others['compute']} (compute)."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and with --write keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep-rounds", type=int, default=5)
    parser.add_argument("--compute-rounds", type=int, default=24)
    parser.add_argument("--micros", type=int, default=8, help="micro-batches of computing ranks")
    parser.add_argument("--part", choices=("sleep", "compute"), help="only this; --write keeps the other's rows")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the tables from results.json, measure nothing")
    o = parser.parse_args()
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() and (o.table or o.part) else {}
    if o.table:
        print(tables(document))
        return
    torch.set_num_threads(1)
    document |= {
        "machine": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__, "link": "loopback",
    }  # fmt: skip
    about = {"command": "python benchmarks/pipeline/run.py " + " ".join(sys.argv[1:]),
             "date": datetime.date.today().isoformat()}  # fmt: skip
    if o.part != "compute":
        print("sleeping ranks", file=sys.stderr)
        others = Others()
        rows = [row for pp in (2, 4) for row in sleep_rows(pp, o.sleep_rounds)]
        document["sleep"] = {**about, "rounds": o.sleep_rounds, "cores_used_by_others": others.cores(), "rows": rows}
    if o.part != "sleep":
        print("computing ranks", file=sys.stderr)
        others = Others()
        rows = compute_rows(o.micros, o.compute_rounds)
        document["compute"] = {**about, "cores_used_by_others": others.cores(), "rows": rows}
    if o.write:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(tables(document) if {"sleep", "compute"} <= document.keys() else json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
