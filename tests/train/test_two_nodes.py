"""torchrun on two machines, which are two network namespaces joined by a cable (a veth pair).

They share no loopback interface, so whatever does not go over the given addresses fails. Collected for root only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import TIMEOUT, Place

STEPS = "--train.steps=5"
LAYOUT = ("--parallel.dp=2", "--parallel.node=2", "--parallel.ep=4")  # experts over both nodes
PORT = 29_500  # nobody else is in the namespaces


class Node:
    """A network namespace with one cable."""

    def __init__(self, index: int) -> None:
        self.name = f"msm{os.getpid()}n{index}"
        self.interface = f"msm{os.getpid() % 10**6}v{index}"  # at most 15 characters
        self.address = f"10.213.0.{index + 1}"

    def command(self, *arguments: str) -> list[str]:
        """Run inside."""
        return ["ip", "netns", "exec", self.name, *arguments]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, timeout=TIMEOUT, stdout=subprocess.PIPE, text=True).stdout


def remove(node: Node) -> None:
    """End all that runs inside, then the namespace; its end of the cable goes with it, and so the cable."""
    for pid in ip("netns", "pids", node.name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "delete", node.name)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two namespaces and the cable; removed whatever happens."""
    both = [Node(0), Node(1)]
    with contextlib.ExitStack() as stack:
        for node in both:
            ip("netns", "add", node.name)
            stack.callback(remove, node)
        ip("link", "add", both[0].interface, "type", "veth", "peer", "name", both[1].interface)
        for node in both:
            ip("link", "set", node.interface, "netns", node.name)
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.interface)
            ip("-n", node.name, "link", "set", node.interface, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
        yield both


def torchrun(place: Place, nodes: list[Node], index: int, run: str, log: Path) -> subprocess.Popen[bytes]:
    """The launcher of one node, its output in `log`."""
    launcher = (
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", f"--node-rank={index}",
        f"--master-addr={nodes[0].address}", f"--master-port={PORT}", f"--local-addr={nodes[index].address}",
        "--rdzv-backend=static", "-m", "megascale_moe",
    )  # fmt: skip
    command = ("train", str(place.config), f"--run.folder={place.folder(run)}", STEPS, *LAYOUT, "--json")
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": nodes[index].interface, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
        inside = nodes[index].command(sys.executable, *launcher, *command)
        return subprocess.Popen(inside, env=environment, stdout=out, stderr=err)


@pytest.fixture(scope="module")
def logs(shared: Place, nodes: list[Node]) -> list[Path]:
    """What the launchers of a run of two nodes wrote to standard output, after both have ended well."""
    logs = [shared.root / f"node-{index}.out" for index in range(2)]
    launchers = [torchrun(shared, nodes, index, "two", log) for index, log in enumerate(logs)]
    statuses = [launcher.wait(TIMEOUT) for launcher in launchers]
    assert statuses == [0, 0], "\n".join(log.with_suffix(".err").read_text() for log in logs)
    return logs


def test_two_nodes_train_like_one(shared: Place, logs: list[Path]) -> None:
    shared.train(STEPS, "--nproc=4", *LAYOUT, run="one")
    assert len(logs) == 2
    errors = [abs(a - b) for a, b in zip(shared.losses("two"), shared.losses("one"), strict=True)]
    # The same ranks add the same numbers in the same order; only gloo's all-reduce of the loss may go another way
    # round, a few 2^-53 of float64.
    assert max(errors) < 1e-6


def test_rank_0_alone_reports(logs: list[Path]) -> None:
    texts = [log.read_text() for log in logs]
    assert texts[0].startswith('{"step": 5, ')
    assert texts[0].count("\n") == 1
    assert texts[1] == ""
