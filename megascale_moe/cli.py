"""The command line: parsing, and turning errors into one line and an exit status. Nothing is computed here.

Exit status: 0 fine, 1 a check did not hold, 2 the user's input is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.console import Console

from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.comm.mesh import mesh_of
from megascale_moe.config import Config, ConfigError, load
from megascale_moe.presets import PRESETS
from megascale_moe.train import doctor
from megascale_moe.train.job import join, local_rank_count, under_launcher
from megascale_moe.train.loop import check_before_start, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options, overrides = _parser().parse_known_args(arguments)
    try:
        if options.command == "doctor":
            _refuse_leftovers(overrides)
            return doctor.main(options.json)
        config = load(options.config, _overrides(overrides), PRESETS)
        if options.resume:
            config = replace(config, run=replace(config.run, resume="auto"))
        return _train(config, options.nproc, options.json)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megascale: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megascale", description="Communication-efficient training of Mixture-of-Experts models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "train", help="train a model; starts its own local ranks, or is one rank under torchrun",
        epilog="Any config key can be overridden: --parallel.ep=4 --train.steps=100",
    )
    run.add_argument("config", help="TOML file")
    run.add_argument("--nproc", type=int, default=0, help="ranks to start here (default: what the config's mesh needs)")
    run.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    run.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    examine = commands.add_parser("doctor", help="what this machine has, what will be used, what is missing")
    examine.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _overrides(arguments: list[str]) -> list[str]:
    """`--section.key=value` and `--section.key value` alike."""
    overrides: list[str] = []
    waiting = ""
    for argument in arguments:
        if waiting:
            overrides.append(f"{waiting}={argument}")
            waiting = ""
        elif argument.startswith("--") and "=" not in argument and "." in argument:
            waiting = argument
        else:
            overrides.append(argument)
    if waiting:
        raise ConfigError(f"override {waiting!r}: a value is missing; write {waiting}=VALUE")
    return overrides


def _refuse_leftovers(arguments: list[str]) -> None:
    if arguments:
        raise ConfigError(f"argument {arguments[0]!r} is unknown; see megascale --help")


def _train(config: Config, nproc: int, as_json: bool) -> int:
    if under_launcher():
        return _rank(config, int(os.environ["WORLD_SIZE"]), as_json)
    world = local_rank_count(config, nproc)
    check_before_start(config, mesh_of(config.parallel, config.model, world))
    if world == 1:
        return _rank(config, 1, as_json)
    return fork_ranks(world, lambda _: _exit_unless_zero(_guarded_rank(config, world, as_json)))


def _guarded_rank(config: Config, world: int, as_json: bool) -> int:
    try:
        return _rank(config, world, as_json)
    except ConfigError as error:
        if os.environ["RANK"] == "0":
            print(f"megascale: {error}", file=sys.stderr)
        return 2


def _exit_unless_zero(status: int) -> None:
    if status:
        sys.stderr.flush()
        os._exit(status)


def _rank(config: Config, world: int, as_json: bool) -> int:
    mesh = mesh_of(config.parallel, config.model, world)
    job = join(config, mesh)
    resume = job.together(lambda: check_before_start(config, mesh))
    outcome = train(config, mesh, job, resume)
    if job.leads:
        _report(asdict(outcome), as_json)
    return 0


def _report(outcome: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(outcome))
        return
    console = Console(highlight=False)
    losses = ", ".join(f"{name} {outcome[name]:.3f}" for name in ("loss", "eval_loss") if outcome[name] is not None)
    console.print(f"step {outcome['step']}: {losses}; results in {outcome['folder']}")
    if outcome["sample"]:
        console.rule("sample")
        console.print(outcome["sample"], markup=False)
