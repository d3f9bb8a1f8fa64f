"""Interleaved benchmark of full training steps: our library against its peers, on this machine's CPU.

Every side is a persistent process group in its own environment (sides.py, protocol.py). A round lets
each side run the same number of steps while all others sleep, so that a busy minute of the machine
hits all of them; the figures are medians over rounds. See README.md.

    python run.py --dtype fp32,bf16 --ranks 1,2 --rounds 8 --steps 3
    python run.py --device cuda --dtype bf16 --ranks 1 --sides megascale,transformers-grouped_mm,transformers-compile
    python run.py --table results/*.json
"""

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sides import OURS, SIDES, choose
from table import markdown, plain_table, summarize

HERE = Path(__file__).parent
STEPS_WRITTEN = 200
MEMORY_NEEDED = 4.0  # GiB that must be free to start one more side: it takes 1.5-3, the rest is for others
Answer = dict[str, Any]


class SideFailed(Exception):
    """A side ended or kept silent; the message ends with the last lines of its log."""


class SideProcess:
    """One side's rank 0; it starts and ends its other ranks itself."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path, patience: float) -> None:
        self.name, self.log, self.patience = name, log, patience
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=HERE,
                start_new_session=True,
                bufsize=0,
            )
        self.input, self.output = self.process.stdin, self.process.stdout

    def answer(self) -> Answer:
        """The next line this side writes."""
        assert self.output is not None
        ready, _, _ = select.select([self.output], [], [], self.patience)
        line = self.output.readline() if ready else b""
        if not line:
            raise SideFailed(f"{self.name} {'ended' if ready else 'was silent'}:\n{self.last_words()}")
        answer: Answer = json.loads(line)
        return answer

    def run(self, steps: int) -> Answer:
        """Let it train for some steps while everybody else sleeps."""
        assert self.input is not None
        busy = busy_seconds()
        try:
            self.input.write(f"go {steps}\n".encode())
        except BrokenPipeError:
            raise SideFailed(f"{self.name} ended:\n{self.last_words()}") from None
        answer = self.answer()
        others = busy_seconds() - busy - answer["cpu"]
        return answer | {"steps": steps, "others": max(0.0, others)}

    def last_words(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self, patience: float = 30.0) -> None:
        """End of input ends a side; what is left of its process group then is killed."""
        assert self.input is not None
        self.input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine together have used so far."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32,bf16", help="fp32, bf16 or both")
    parser.add_argument("--ranks", default="1,2", help="1 (two threads), 2 (one thread each) or both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with cuda a larger case, on one GPU")
    parser.add_argument("--sides", help="names, comma-separated; all that are not optional by default")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="training steps per side and round")
    parser.add_argument("--warmup", type=int, default=5, help="unmeasured steps of each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds a side may stay silent")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for DTYPE-RANKS.json")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print results files and do nothing else")
    return parser.parse_args()


def environments() -> Path:
    """The folder that setup.sh filled."""
    return Path(os.environ.get("PEERS_VENVS", HERE / ".venvs")).absolute()


def python_of(environment: str) -> Path:
    """The interpreter of a peer's environment, or our own."""
    return environments() / environment / "bin" / "python" if environment else Path(sys.executable)


def own_folders(environment: str) -> dict[str, str]:
    """Where a peer finds its build tools (ninja) and keeps what it compiles."""
    if not environment:
        return {}
    home = environments() / environment
    caches = {"TORCH_EXTENSIONS_DIR": str(home / "extensions"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
    return caches | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def start(
    name: str, dtype: str, ranks: int, work: Path, patience: float, hosts: Sequence[str] = (), interface: str = "lo",
    device: str = "cpu",
) -> SideProcess:
    """Start one side on the checkpoint and tokens in `work`, on this host or each rank in a network namespace."""
    side, threads = SIDES[name], 2 if ranks == 1 else 1
    command = ["ip", "netns", "exec", hosts[0]] if hosts else []
    command += [str(python_of(side.environment)), str(HERE / side.script), "--folder", str(work), "--dtype", dtype]
    command += ["--ranks", str(ranks), "--threads", str(threads), "--device", device]
    command += ["--together", str(side.together), *side.options]
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": interface}
    settings |= {"HOSTS": ",".join(hosts)}
    settings |= own_folders(side.environment)
    settings |= {"PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return SideProcess(name, command, os.environ | settings, work / f"{name}.log", patience)


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A temporary folder for weights, tokens and logs."""
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Field:
    """All sides of one case, and what they answered. A side that fails leaves; the others go on.

    Args:
        sent: bytes that all ranks have sent so far, where something counts them.
    """

    def __init__(self, sent: Callable[[], int] = lambda: 0) -> None:
        self.sent = sent
        self.running: dict[str, SideProcess] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.failures: dict[str, str] = {}

    def enter(self, side: SideProcess, warmup: int) -> None:
        """Wait until it is ready and has warmed up: its memory is taken and its kernels are compiled."""
        self.running[side.name] = side
        try:
            self.versions[side.name] = side.answer()["versions"]
            self.answers[side.name] = [self.run(side, warmup)]
        except SideFailed as failure:
            self.drop(side.name, failure)

    def run(self, side: SideProcess, steps: int) -> Answer:
        before = self.sent()
        answer = side.run(steps)
        return answer | {"wire": self.sent() - before}

    def refuse(self, name: str, reason: str) -> None:
        print(f"!! {name} not started: {reason}", file=sys.stderr)
        self.failures[name] = reason

    def drop(self, name: str, failure: SideFailed) -> None:
        print(f"!! {failure}", file=sys.stderr)
        self.failures[name] = str(failure).splitlines()[-1]
        self.answers.pop(name, None)
        self.running.pop(name).close(patience=5)

    def round(self, number: int, steps: int) -> None:
        """Every side once, the order rotating from round to round."""
        names = list(self.running)
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            try:
                self.answers[name].append(self.run(self.running[name], steps))
            except SideFailed as failure:
                self.drop(name, failure)

    def close(self) -> None:
        for side in self.running.values():
            side.close()


def measure(options: argparse.Namespace, dtype: str, ranks: int) -> Answer:
    """Run one case and return everything that goes into its results file."""
    names = choose(options.sides, dtype, ranks)
    field = Field()
    with working_folder() as work:
        write_case(names, work, options)
        try:
            for name in names:
                say(f"{dtype} x {ranks}: starting {name}")
                if (free := memory("MemAvailable")) < MEMORY_NEEDED:
                    field.refuse(name, f"only {free:.1f} GiB of memory free")
                else:
                    side = start(name, dtype, ranks, work, options.patience, device=options.device)
                    field.enter(side, options.warmup)
            for number in range(options.rounds):
                say(f"{dtype} x {ranks}: round {number + 1} of {options.rounds}")
                field.round(number, options.steps)
        finally:
            field.close()
        case = json.loads((work / "case.json").read_text())
    return describe(options, dtype, ranks, case, field, options.device)


def write_case(names: list[str], work: Path, options: argparse.Namespace) -> None:
    """Weights and tokens, written by the environment of the first side there is: the driver needs no torch."""
    pythons = [python for name in names if (python := python_of(SIDES[name].environment)).exists()]
    command = [str(pythons[-1]), str(HERE / "case.py"), str(work), "--seed", str(options.seed)]
    command += ["--steps", str(STEPS_WRITTEN), "--case", "gpu" if options.device == "cuda" else "cpu"]
    subprocess.run(command, check=True)


def describe(options: argparse.Namespace, dtype: str, ranks: int, case: Answer, field: Field, device: str) -> Answer:
    """The raw results: what ran, where, with what, and every answer."""
    return {
        "command": " ".join(["python", "run.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "dtype": dtype,
        "ranks": ranks,
        "threads": 2 if ranks == 1 else 1,
        "device": device,
        "case": case,
        "tokens_per_step": case["sequence"] * case["sequences"],
        "rounds": options.rounds,
        "steps": options.steps,
        "versions": field.versions,
        "failures": field.failures,
        "half": [name for name in field.answers if SIDES[name].half],
        "baseline": OURS,
        "answers": field.answers,
    }


def machine() -> Answer:
    """What the figures depend on."""
    model = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory("MemTotal"), 1),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def memory(field: str) -> float:
    """GiB by a field of /proc/meminfo."""
    kib = next(int(line.split()[1]) for line in read_lines("/proc/meminfo") if line.startswith(f"{field}:"))
    return kib / 2**20


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_cases(options: argparse.Namespace) -> int:
    """Every case asked for, one results file each; 1 if a side failed or its losses differ."""
    sound = True
    for dtype in options.dtype.split(","):
        for ranks in map(int, options.ranks.split(",")):
            results = measure(options, dtype, ranks)
            options.results.mkdir(parents=True, exist_ok=True)
            name = f"{dtype}-{ranks}" if options.device == "cpu" else f"{options.device}-{dtype}"
            (options.results / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
            print(plain_table(results), flush=True)
            sound = sound and not results["failures"] and all(row["agrees"] for row in summarize(results))
    return 0 if sound else 1


def run_or_print(
    options: argparse.Namespace, run: Callable[[argparse.Namespace], int], as_markdown: Callable[[Answer], str]
) -> int:
    """Measure, or print results that there are; the exit status."""
    if options.table:
        print("\n\n".join(as_markdown(json.loads(path.read_text())) for path in options.table))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run(options)


if __name__ == "__main__":
    sys.exit(run_or_print(read_options(), run_cases, markdown))
