"""Run a command on a cluster of network namespaces, once per rank, as torchrun would. Linux and root only.

    python benchmarks/cluster/run.py --ranks 4 --node 2 --intra 200mbit --inter 50mbit -- \\
        megascale train configs/quickstart.toml
    python benchmarks/cluster/run.py --iso h800 --dtype bf16 -- COMMAND   links in proportion to the ranks' GEMM rate
    python benchmarks/cluster/run.py --iso h800                           print the proportion only
    python benchmarks/cluster/run.py clean                                remove what dead runs have left

Exit status: that of the rank that failed, else 0; 2 if the input is wrong or this machine cannot have a cluster.
Standard output belongs to the command; what is said here goes to standard error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.cluster.cluster import Shape, clean, cluster, missing
from benchmarks.cluster.iso import ITEMSIZE, NODES, balance, gemm_rates
from benchmarks.cluster.ranks import run_command
from megascale_moe.config import ConfigError, require

UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see run.py --help")


def bits_per_second(text: str) -> float:
    """A rate as `tc` writes it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)?bit", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"rate {text!r}: write 200mbit, 1gbit or 500kbit")
    return float(found[1]) * UNITS[f"{found[2] or ''}bit"]


def parser() -> Parser:
    """All options; the command is cut off before."""
    default = Shape()
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("action", nargs="?", choices=["clean"], help="remove what dead runs have left, and end")
    p.add_argument("--ranks", type=int, default=default.ranks)
    p.add_argument("--node", type=int, help="ranks of one node (default: all)")
    p.add_argument("--intra", type=bits_per_second, help="per rank and direction inside a node (default: 200mbit)")
    p.add_argument("--inter", type=bits_per_second, help="per rank and direction between nodes (default: 50mbit)")
    p.add_argument("--per-node", action="store_true", help="one host per node; its ranks talk over loopback")
    p.add_argument("--congestion", default=default.congestion, help="TCP congestion control: reno (default) or bbr")
    p.add_argument("--iso", choices=sorted(NODES), help="choose the links that balance the ranks as this GPU node is")
    p.add_argument("--dtype", choices=sorted(ITEMSIZE), default="bf16", help="for --iso: what is computed and sent")
    p.add_argument("--ffn", type=int, default=14_336, help="for --iso: expert width for which R is printed")
    return p


def shape_of(o: argparse.Namespace) -> Shape:
    """The cluster that was asked for."""
    shape = Shape(o.ranks, o.node or o.ranks, per_node=o.per_node, congestion=o.congestion)
    asked = {name: rate for name in ("intra", "inter") if (rate := getattr(o, name)) is not None}
    require(not (asked and o.iso), f"--iso {o.iso} chooses the links; leave out --intra and --inter")
    if o.iso:
        found = balance(NODES[o.iso], o.dtype, gemm_rates(o.ranks))
        tell(found.table(o.ffn))
        asked = {"intra": found.intra, "inter": found.inter}
    return replace(shape, **asked)


def start(o: argparse.Namespace, command: Sequence[str]) -> int:
    """Build, run, count, remove."""
    if command:
        reason = missing(o.congestion)
        require(not reason, reason)
    shape = shape_of(o)
    if not command:
        return 0
    with cluster(shape) as made:
        status = run_command(made, command)
        for host, bytes_of in zip(made.hosts, made.traffic(), strict=True):
            ranks = ",".join(map(str, host.ranks))
            tell(
                f"rank {ranks} on {host.address}: sent {bytes_of.sent_intra / 1e6:.2f} MB inside the node, "
                f"{bytes_of.sent_inter / 1e6:.2f} MB between nodes; {bytes_of.dropped} packets dropped"
            )
    return status


def tell(text: str) -> None:
    """To people, beside the output of the command."""
    for line in text.splitlines():
        print(f"cluster: {line}", file=sys.stderr, flush=True)


def run(arguments: Sequence[str]) -> int:
    """Parse and do."""
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:cut], arguments[cut + 1 :]
    o = parser().parse_args(own)
    if o.action == "clean":
        removed = clean()
        tell(f"removed {', '.join(removed)}" if removed else "nothing is left of dead runs")
        return 0
    require(bool(command) or bool(o.iso), "no command; give one after --, or --iso to see the rates")
    return start(o, command)


def main() -> int:
    """Exit status; what the user or the machine did wrong in one line."""
    try:
        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        tell(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
