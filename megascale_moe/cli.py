"""The command line: parsing, and turning errors into one line and an exit status. Nothing is computed here.

Exit status: 0 fine, 1 a check did not hold, 2 the user's input is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from rich.console import Console

from megascale_moe.bench import convergence as bench_convergence
from megascale_moe.bench import overlap as bench_overlap
from megascale_moe.bench import profile as bench_profile
from megascale_moe.checkpoint import SaveError
from megascale_moe.comm.local_ranks import GRACE, fork_ranks
from megascale_moe.comm.lost import LostPeer
from megascale_moe.config import Config, ConfigError
from megascale_moe.planner.cluster import NAMES
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.tools import doctor, settings
from megascale_moe.tools.dryrun.step import dry_run
from megascale_moe.tools.dryrun.table import show
from megascale_moe.tools.plan import command as plan_command
from megascale_moe.tools.report.command import outdated, report
from megascale_moe.tools.verify.command import verify
from megascale_moe.train.config_file import read_config
from megascale_moe.train.job import TIMEOUT, check_device, join, local_rank_count, number, under_launcher
from megascale_moe.train.loop import check_before_start, train
from megascale_moe.train.output import print_json
from megascale_moe.train.progress import counted_progress

Command = Callable[[argparse.Namespace, list[str]], int]
"""From options and overrides of config keys to the exit status."""
OVERRIDE = re.compile(r"--[\w-]+\.[\w.-]+(=.*)?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        return _guarded(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))
    except LostPeer as lost:  # in a rank that a launcher started: those forked here are ended by `fork_ranks`
        print(f"megascale: {lost}", file=sys.stderr, flush=True)
        time.sleep(GRACE)  # whoever waits for this rank would take its end for the cause
        return 1


def _guarded(work: Callable[[], int]) -> int:
    """Run `work`; make one line and an exit status of what the user or the machine did wrong."""
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except (ConfigError, SaveError) as error:
        if _speaks():
            print(f"megascale: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1


def _speaks() -> bool:
    """Return whether to print an error: joined ranks agree on it, earlier each node has its own files and network."""
    return os.environ.get("RANK" if dist.is_initialized() else "LOCAL_RANK", "0") == "0"


def _main(arguments: list[str]) -> int:
    overrides, rest = _split(arguments)
    options, unknown = _parser().parse_known_args(rest)
    takes = options.command not in ("doctor", "config")
    unknown += [] if takes else overrides
    if unknown:
        hint = "config keys are overridden as --section.key=value" if takes else "leave it out"
        raise ConfigError(f"argument {unknown[0]!r} is unknown; {hint}; see megascale {options.command} --help")
    run: Command = options.run
    return run(options, overrides)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides, `--section.key=value` and `--section.key value` alike, and everything else."""
    overrides: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        match = OVERRIDE.fullmatch(argument)
        if match and match[1] is None:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise ConfigError(f"override {argument!r}: a value is missing; write {argument}=VALUE")
            argument += f"={value}"
        (overrides if match else rest).append(argument)
    return overrides, rest


# --- what can be said -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Refuses as everything else does: in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    description = "Communication-efficient training of Mixture-of-Experts models."
    parser = _Parser(prog="megascale", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = _command(
        commands, "train", _train,
        help="train a model; starts its own local ranks, or is one rank under torchrun",
        usage="megascale train CONFIG.toml [--section.key=value ...] [--nproc N] [--resume] [--json]",
        epilog="Any config key can be overridden: --parallel.ep=4 --train.steps=100. Exit status: 0 fine, 1 it failed, "
        "2 the input is wrong, 130 interrupted.",
        config="what to train, and how; see configs/", ranks="as the mesh needs",
    )  # fmt: skip
    run.add_argument("--resume", action="store_true", help="continue from the run folder's newest checkpoint")
    proof = _command(
        commands, "verify", _verify,
        help="show that outputs and gradients of every layout are those of one device",
        usage="megascale verify CONFIG.toml [--section.key=value ...] [--nproc N] [--only] [--json]",
        epilog="Scales the config's model down and runs a training step of every layout that fits N ranks. Exit "
        "status: 0 all right, 1 a layout differs (the first operator that does is named), 2 the input is wrong.",
        config="the model and its layout; see configs/", ranks="as many as GPUs, or 8",
    )  # fmt: skip
    proof.add_argument("--only", action="store_true", help="verify the config's own layout alone")
    dry = _command(
        commands, "dryrun", _dryrun,
        help="what one rank of a job of any size holds, sends and computes, without the job",
        usage="megascale dryrun CONFIG.toml --gpus N [--rank R] [--section.key=value ...] [--skip-messages] [--json]",
        epilog="Runs the training step of one rank without its peers and on tensors without storage. Exit status: 0 "
        "fine, 1 ranks disagree about a message, 2 the input is wrong.",
        config="the model, its layout and batch; see configs/",
    )  # fmt: skip
    dry.add_argument("--gpus", type=_count, required=True, metavar="N", help="ranks of the job")
    dry.add_argument("--rank", type=_rank_number, default=0, metavar="R", help="the rank that is run (default: 0)")
    dry.add_argument("--skip-messages", action="store_true", help="do not compare the messages of all ranks")
    _add_plan(commands)
    _add_bench(commands)
    page = _command(
        commands,
        "report",
        _report,
        help="one page about a run: its step, what travels, memory, curves",
        usage="megascale report RUN | CONFIG.toml [--out PATH] [--gpus N] [--section.key=value ...] [--json]",
        epilog="Writes report.html into the run folder, or beside the TOML file. Exit status: 0 fine, 2 the input is "
        "wrong.",
    )
    page.add_argument("source", metavar="RUN", help="a run folder, or a TOML file for a plan without a run")
    page.add_argument("--out", type=Path, metavar="PATH", help="where to write the page")
    page.add_argument("--gpus", type=_count, metavar="N", help="ranks of a plan (default: as the mesh needs)")
    keys = _command(
        commands,
        "config",
        lambda options, _: settings.main(options.key, as_json=options.json, schema=options.schema),
        help="what each key of the configuration means, takes and is by default",
        usage="megascale config [KEY] [--json | --schema]",
        epilog="A key is found by its name, by that of its section, or by what other libraries call it: train.steps, "
        'parallel, max_grad_norm, "gradient accumulation". Exit status: 0 fine, 2 there is no such key.',
    )
    keys.add_argument("key", metavar="KEY", nargs="?", default="", help="section.key, section or name (default: all)")
    keys.add_argument("--schema", action="store_true", help="print a JSON schema of TOML files, for editors")
    _command(commands, "doctor", lambda options, _: doctor.main(options.json),
             help="what this machine has, what will be used, what is missing")  # fmt: skip
    return parser


def _add_plan(commands: Any) -> None:
    planner = _command(
        commands,
        "plan",
        _plan,
        help="which layout is the fastest on a cluster that you do not have, does it fit, and why",
        usage="megascale plan CONFIG.toml --cluster NAME --gpus N [--fixed] [--keep KEYS] [--out FOLDER] "
        "[--section.key=value ...] [--json]\n       megascale plan --compare A.toml B.toml --cluster NAME --gpus N\n"
        "       megascale plan --validate ROWS.csv",
        epilog="Searches all layouts and options of the config's model and batch; the best is written into the folder "
        "as plan.toml, which train, verify and dryrun take, with a trace, a report and a plot. Profiles: "
        f"{', '.join(NAMES)}, or a TOML file. Exit status: 0 fine, 2 the input is wrong or nothing fits.",
    )
    planner.add_argument("config", metavar="CONFIG.toml", nargs="?", help="model, batch, and what is kept")
    planner.add_argument("--cluster", metavar="NAME", help="profile of GPU, node, network and software")
    planner.add_argument("--gpus", type=_count, metavar="N", help="GPUs of the job")
    planner.add_argument("--fixed", action="store_true", help="price the layout of the config, search nothing")
    planner.add_argument("--keep", default="", metavar="KEYS", help="keys that stay, comma-separated: parallel.pp,...")
    planner.add_argument("--compare", nargs=2, metavar=("A.toml", "B.toml"), help="price two configs side by side")
    planner.add_argument("--validate", type=Path, metavar="ROWS.csv", help="predict measured rows: how far off is it?")
    planner.add_argument(
        "--out",
        type=Path,
        default=Path("runs/plan"),
        metavar="FOLDER",
        help="where the best plan is written (default: runs/plan)",
    )


def _add_bench(commands: Any) -> None:
    measure = _command(
        commands, "bench", _bench,
        help="measure what layouts, orders and splits bring, what wire formats do to the loss, or "
        "what the machine can do",
        usage="megascale bench overlap|convergence CONFIG.toml [--nproc N] [--rounds N] [--seeds N] [--variants NAMES] "
        "[--out FOLDER] [--section.key=value ...] [--json]\n"
        "       megascale bench profile [--nproc N] [--node N] [--dtype fp32|bf16] [--base NAME] [--out FILE.toml] "
        "[--json]",
        epilog="overlap: forward and backward of the config's model, all variants interleaved. convergence: the config "
        "is trained once per wire format and seed; called again, it goes on. profile: operators and messages of the "
        "ranks at hand, as a cluster profile for the planner. Exit status: 0 fine, 1 a rank failed, 2 the input is "
        "wrong.", ranks="as the mesh needs",
    )  # fmt: skip
    measure.add_argument("name", choices=["overlap", "convergence", "profile"], help="what to measure")
    measure.add_argument(
        "config",
        metavar="CONFIG.toml",
        nargs="?",
        help="the model, the batch, and dp and node of its mesh; not of a profile",
    )
    measure.add_argument("--rounds", type=_count, default=5, metavar="N", help="overlap: measured rounds (default: 5)")
    measure.add_argument("--seeds", type=_count, default=1, metavar="N", help="convergence: how many (default: 1)")
    measure.add_argument("--variants", default="", metavar="NAMES", help="convergence: formats, comma-separated")
    measure.add_argument(
        "--node",
        "--ranks-per-node",
        type=_count,
        metavar="N",  # torchrun takes --node for its own
        help="profile: ranks of a node (default: of this machine)",
    )
    measure.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="profile: of products (default: bf16 on GPUs, fp32 on a CPU)"
    )
    measure.add_argument(
        "--base",
        default="",
        metavar="NAME",
        help="profile: the profile that says what cannot be measured here, as the links of one GPU",
    )
    measure.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="convergence: folder of results (default: runs/convergence); profile: the file (default: profile.toml)",
    )


def _command(
    commands: Any, name: str, run: Command, *, config: str = "", ranks: str = "", **texts: str
) -> argparse.ArgumentParser:
    """Add a command with what every command takes.

    Args:
        config: help of its TOML file, ranks: how many are started by default, for commands that have these.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, allow_abbrev=False, **texts)
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    parser.set_defaults(run=run)
    if config:
        parser.add_argument("config", metavar="CONFIG.toml", help=config)
    if ranks:
        parser.add_argument("--nproc", type=_count, metavar="N", help=f"ranks to start here (default: {ranks})")
    return parser


def _whole_number(least: int, what: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}; give {least} or more")
    return int(text)


_count = partial(_whole_number, 1, "a number of ranks")
_rank_number = partial(_whole_number, 0, "a rank")


# --- commands ---------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(options.config, overrides)
    return verify(config, options.nproc, only=options.only, as_json=options.json)


def _dryrun(options: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(options.config, overrides)
    with counted_progress() as progress:
        result = dry_run(config, options.gpus, options.rank, all_ranks=not options.skip_messages, progress=progress)
    if options.json:
        print_json(result.document())
    else:
        show(result)
    return 1 if result.agreement is not None and result.agreement.disagreement else 0


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.validate:
        if options.config or overrides or options.compare:
            raise ConfigError("--validate: rows are predicted as they are; leave configs and overrides out")
        return plan_command.validate_rows(options.validate, as_json=options.json)
    given = options.compare or ([options.config] if options.config else [])
    if options.compare and options.config:
        raise ConfigError(f"argument {options.config!r} with --compare: give the two configs behind --compare alone")
    if not given:
        raise ConfigError("CONFIG.toml is missing: what is to be planned; see megascale plan --help")
    configs = [read_config(path, overrides) for path in given]
    return plan_command.plan(
        configs, options.cluster, options.gpus, options.keep, fixed=options.fixed, out=options.out, as_json=options.json
    )


def _bench(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.name == "profile":
        given = [*([options.config] if options.config else []), *overrides]
        if given:
            raise ConfigError(f"bench profile measures the machine, not a config; leave out {given[0]!r}")
        nproc, out = options.nproc or local_rank_count(Config()), options.out or Path("profile.toml")
        return bench_profile.bench(nproc, options.node, options.dtype, out, options.base, as_json=options.json)
    if options.config is None:
        raise ConfigError(f"bench {options.name} needs a CONFIG.toml; see megascale bench --help")
    config = read_config(options.config, overrides)
    if options.name == "overlap":
        return bench_overlap.bench(config, options.nproc, options.rounds, as_json=options.json)
    out = options.out or Path("runs/convergence")
    return bench_convergence.bench(config, options.nproc, options.variants, options.seeds, out, as_json=options.json)


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    document = report(Path(options.source), overrides, options.out, options.gpus)
    if options.json:
        print_json(document)
    else:
        print(f"report: {document['path']}")
    return 0


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(options.config, overrides)
    if options.resume:
        config = replace(config, run=replace(config.run, resume=config.run.resume or "auto"))
    status = _run(config, options.nproc, options.json)
    if dist.is_initialized():  # under a launcher; the report looks at memory with process groups of its own
        dist.barrier()
        dist.destroy_process_group()
    if status == 0 and number("RANK", 0) == 0:
        _end_with_report(Path(config.run.folder))
    return status


def _run(config: Config, nproc: int | None, as_json: bool) -> int:
    if under_launcher():
        return _rank(config, number("WORLD_SIZE", 1), as_json)
    world = nproc or local_rank_count(config)
    check_device(config, world)
    check_before_start(config, mesh_of(config.parallel, config.model, world))
    if world == 1:
        return _rank(config, 1, as_json)

    def forked(rank: int) -> None:
        status = _guarded(lambda: _rank(config, world, as_json))
        if status:
            sys.stderr.flush()
            os._exit(status)

    return fork_ranks(world, forked, timeout=TIMEOUT.total_seconds())


def _rank(config: Config, world: int, as_json: bool) -> int:
    mesh = mesh_of(config.parallel, config.model, world)
    job = join(config, mesh)
    resume = job.from_lead(lambda: str(check_before_start(config, mesh) or ""))
    outcome = train(config, mesh, job, Path(resume) if resume else None)
    if job.leads and as_json:
        print_json(asdict(outcome))
    elif job.leads:
        console = Console(highlight=False, soft_wrap=True)
        losses = {"loss": outcome.loss, "eval_loss": outcome.eval_loss}
        shown = "".join(f", {name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
        console.print(f"step {outcome.step}{shown}; results in {outcome.folder}", markup=False)
        if outcome.sample:
            console.rule("sample")
            console.print(outcome.sample, markup=False)
    return 0


def _end_with_report(folder: Path) -> None:
    """Write the page of a run, which stays a good run where that fails; one that had ended before keeps its page."""
    try:
        if outdated(folder):
            report(folder, [], None, rehearse=False)
    except Exception as error:  # whatever is wrong with a page, hours of training are not
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        line = " ".join(str(error).split())
        print(f"megascale: no report: {kind}{line}", file=sys.stderr, flush=True)
