"""The cluster of network namespaces: bytes by class, limits, cleanup, refusals. Needs root; skipped elsewhere.

The bytes of a message as the links count them are compared with what the sender counted (`Pending.wire_bytes`). A full
packet has 66 bytes of headers for 1,448 of payload (x 1.0456); acknowledgements of the other direction, packets sent
again and the rendezvous come on top, on a busy machine up to some percent. Never asserted: that something is fast.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.cluster import run
from benchmarks.cluster.cluster import BURST, NAMESPACES, PREFIX, Cluster, Shape, clean, cluster, missing
from benchmarks.cluster.iso import NODES, balance, ratio
from benchmarks.cluster.ranks import RankFailed, run_command, run_on_cluster
from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import exchange, tag_of
from megascale_moe.config import ConfigError

REASON = missing()
on_cluster = pytest.mark.skipif(bool(REASON), reason=REASON or "possible here")
PATIENCE = 20.0  # seconds until a test gives up; nothing is measured

MESSAGE = 2_000_000  # bytes from each rank to each other
HEADERS = 1 + 66 / 1448
MOST = 1.2  # acknowledgements up to 4 %, retransmissions seen up to 6 % with 16 processes on 2 cores
SMALL_TALK = 100_000  # bytes of rendezvous, connections and barriers of one rank


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two ranks of one node."""
    with cluster(Shape(2, 2, intra=200e6)) as made:
        yield made


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two nodes of two ranks."""
    with cluster(Shape(4, 2, intra=400e6, inter=100e6)) as made:
        yield made


def swap(peers: tuple[tuple[int, ...], ...]) -> tuple[int, float, float, bool]:
    """Exchange with the own group of `peers`: wire bytes, when it began and ended, whether all arrived."""
    rank = dist.get_rank()
    group = next(ranks for ranks in peers if rank in ranks)
    made = {ranks: dist.new_group(list(ranks)) for ranks in peers}[group]
    axis = Axis("ep", len(group), group.index(rank), made, (), "gloo")
    out = [torch.full((MESSAGE,), rank, dtype=torch.uint8) for _ in group]
    into = [torch.empty_like(part) for part in out]
    dist.barrier()
    start = time.monotonic()
    pending = exchange(out, into, axis, tag_of("swap"))
    pending.wait()
    end = time.monotonic()
    arrived = all(bool((part == source).all()) for part, source in zip(into, group, strict=True))
    return pending.wire_bytes, start, end, arrived


def swapped(made: Cluster, *peers: tuple[int, ...]) -> tuple[int, float, list[tuple[int, int]]]:
    """Wire bytes of each rank as counted by the sender, seconds from the first start to the last end, and bytes by
    the links, (inside the node, between nodes) of each rank."""
    before = made.traffic()
    results = run_on_cluster(made, swap, peers)
    moved = [now - then for now, then in zip(made.traffic(), before, strict=True)]
    assert all(arrived for *_, arrived in results)
    assert len({wire for wire, *_ in results}) == 1
    seconds = max(end for _, _, end, _ in results) - min(start for _, start, _, _ in results)
    return results[0][0], seconds, [(one.sent_intra, one.sent_inter) for one in moved]


def as_counted(link: int, wire: int) -> bool:
    """True if what a link counted is `wire` bytes of payload with their overhead."""
    return wire * HEADERS <= link <= wire * MOST + SMALL_TALK


@on_cluster
def test_two_ranks_send_what_the_sender_counts(pair: Cluster) -> None:
    wire, seconds, links = swapped(pair, (0, 1))
    assert wire == MESSAGE
    assert all(as_counted(intra, wire) and inter == 0 for intra, inter in links)
    assert seconds >= (wire - 2 * BURST) * 8 / pair.shape.intra  # a burst may be waiting at either end of the cable


@on_cluster
def test_four_ranks_send_over_the_right_links(nodes: Cluster) -> None:
    wire, seconds, links = swapped(nodes, (0, 1, 2, 3))
    assert wire == 3 * MESSAGE
    assert all(as_counted(intra, wire // 3) and as_counted(inter, wire // 3 * 2) for intra, inter in links)
    assert seconds >= (wire // 3 * 2 - 2 * BURST) * 8 / nodes.shape.inter


@on_cluster
@pytest.mark.parametrize(("groups", "used"), [(((0, 1), (2, 3)), 0), (((0, 2), (1, 3)), 1)])
def test_classes_of_links_are_separate(nodes: Cluster, groups: tuple[tuple[int, ...], ...], used: int) -> None:
    wire, _, links = swapped(nodes, *groups)
    assert all(as_counted(own[used], wire) and own[1 - used] < SMALL_TALK for own in links)


@on_cluster
def test_what_is_sent_is_received(nodes: Cluster) -> None:
    before = nodes.traffic()
    swapped(nodes, (0, 1, 2, 3))
    moved = [now - then for now, then in zip(nodes.traffic(), before, strict=True)]
    sent, received = sum(one.sent for one in moved), sum(one.received_intra + one.received_inter for one in moved)
    assert received <= sent <= received + sum(one.dropped for one in moved) * 65_536


@on_cluster
def test_command_gets_the_environment_of_torchrun(nodes: Cluster, tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR GLOO_SOCKET_IFNAME OMP_NUM_THREADS"
    script = f"echo {' '.join('$' + name for name in names.split())} > {tmp_path}/$RANK"
    assert run_command(nodes, ["sh", "-c", script]) == 0
    texts = [(tmp_path / str(rank)).read_text(encoding="ascii").split() for rank in range(4)]
    assert texts == [[str(rank), "4", str(rank % 2), "2", "10.77.0.1", "intra", "1"] for rank in range(4)]


@on_cluster
def test_failing_command_gives_its_status_and_its_rank(nodes: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(nodes, ["sh", "-c", "test $RANK != 2 || exit 7; exec sleep 1000"]) == 7
    assert f"cluster: rank 2 on {nodes.hosts[2].name} failed with exit status 7" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="'no-such-command' not found"):
        run_command(nodes, ["no-such-command"])


@on_cluster
def test_exception_comes_back_with_its_rank(pair: Cluster) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 on .*error-1.*ValueError: one"):
        run_on_cluster(pair, fail)


def fail() -> None:
    if dist.get_rank() == 1:
        raise ValueError("one")
    time.sleep(1000)


@on_cluster
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_peer_ends_all_and_is_named(pair: Cluster, tmp_path: Path, number: signal.Signals) -> None:
    verb = "killed" if number == signal.SIGKILL else "stopped"
    with pytest.raises(RankFailed, match=f"rank 1 on .* was {verb} by {number.name}"):
        run_on_cluster(pair, lose_rank_1, tmp_path, number, timeout=2.0)
    left = [int(path.name) for path in tmp_path.iterdir()]
    assert len(left) == 4
    assert not any(alive(pid) for pid in left)


def lose_rank_1(folder: Path, number: int) -> None:
    """Each rank also starts a process that nothing else would end."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    for pid in (os.getpid(), child.pid):
        (folder / str(pid)).touch()
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    dist.barrier()


@on_cluster
def test_hosts_of_several_ranks_share_an_address() -> None:
    with cluster(Shape(4, 2, inter=100e6, per_node=True)) as made:
        assert [(host.ranks, host.address) for host in made.hosts] == [((0, 1), "10.77.0.1"), ((2, 3), "10.77.1.1")]
        assert [host.rates for host in made.hosts] == [{"inter": 200e6}] * 2
        assert run_on_cluster(made, dist.get_rank) == [0, 1, 2, 3]
        assert min(one.sent_inter for one in made.traffic()) > 0


@on_cluster
def test_nothing_is_left_after_success_or_an_exception() -> None:
    before = namespaces(os.getpid())
    with cluster(Shape(2, 1)):
        assert len(namespaces(os.getpid())) == len(before) + 3
    with pytest.raises(KeyError), cluster(Shape(2, 1)):
        raise KeyError
    assert namespaces(os.getpid()) == before


@on_cluster
def test_sigterm_leaves_nothing() -> None:
    with running_cluster() as owner:
        os.kill(owner, signal.SIGTERM)
        assert eventually(lambda: not alive(owner))
        assert namespaces(owner) == []


@on_cluster
def test_clean_removes_what_a_killed_owner_left_and_nothing_else(pair: Cluster) -> None:
    with running_cluster() as owner:
        assert clean() == []
        left = namespaces(owner)
        ranks = inside(left)
        assert len(ranks) == 2
        os.kill(owner, signal.SIGKILL)
        assert eventually(lambda: not any(map(alive, [owner, *ranks])))
        assert sorted(clean()) == left
        assert namespaces(owner) == []
    assert len(namespaces(os.getpid())) >= len(pair.hosts)


def hold() -> None:
    with cluster(Shape(2, 1)) as made:
        run_command(made, ["sleep", "1000"])


@contextlib.contextmanager
def running_cluster() -> Iterator[int]:
    """A process that owns a cluster on which two ranks sleep."""
    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert process.pid is not None
    try:
        assert eventually(lambda: len(inside(namespaces(process.pid))) == 2)
        yield process.pid
    finally:
        process.kill()
        process.join()
        clean()


def inside(names: list[str]) -> list[int]:
    """Processes that sleep in the namespaces."""
    return [int(pid) for name in names for pid in ip("netns", "pids", name).split() if sleeps(pid)]


def sleeps(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").startswith("sleep")
    except (FileNotFoundError, ProcessLookupError):
        return False


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], timeout=PATIENCE, capture_output=True, text=True, check=False).stdout


def namespaces(owner: int | None) -> list[str]:
    """Names of what a process owns."""
    return sorted(path.name for path in NAMESPACES.glob(f"{PREFIX}-{owner}-*"))


def alive(pid: int) -> bool:
    """A process that is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool]) -> bool:
    """Poll until it holds."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shape(4, 3), "nodes of 3 ranks do not divide the 4 ranks; use one of 1, 2, 4"),
        (lambda: Shape(0, 1), "0 ranks in nodes of 1"),
        (lambda: Shape(intra=5), "intra = 5 bits/s: must be between"),
        (lambda: Shape(600, 2), "300 nodes, or ranks in one, are too many"),
    ],
)
def test_impossible_shapes_are_refused(make: Callable[[], Shape], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no command"),
        (("--ranks", "x", "--", "true"), "argument --ranks: invalid int value: 'x'"),
        (("--intra", "fast", "--", "true"), "rate 'fast': write 200mbit"),
        (("--iso", "h800", "--inter", "1gbit"), "leave out --intra and --inter"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_status_2(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(arguments, monkeypatch, capsys)


def test_user_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in refusal(("--", "true"), monkeypatch, capsys)


@pytest.mark.skipif(os.geteuid() != 0, reason="without root that is what is said")
def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert "ip and tc not found; install iproute2" in refusal(("--", "true"), monkeypatch, capsys)


@on_cluster
def test_kernel_without_a_feature_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cluster.cluster._limit", lambda *_: "qdisc add dev a root no_such_qdisc")
    assert "has no tbf for us" in missing()
    assert namespaces(os.getpid()) == [name for name in namespaces(os.getpid()) if "probe" not in name]
    assert "congestion control 'vegas9' is not for namespaces of this kernel; use one of" in missing("vegas9")


def refusal(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that run.py says."""
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    assert run.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", sorted(NODES))
@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_links_in_proportion_give_the_ratio_of_the_node(name: str, dtype: str, itemsize: int) -> None:
    node, flops = NODES[name], {"bf16": 90e9, "fp32": 40e9}
    found = balance(node, dtype, flops)
    paper = 1.5 * 1408 * node.nvlink / node.peak
    assert ratio(1408, node.nvlink, node.peak, 2) == pytest.approx(paper)
    # Links are rounded to 0.1 Mbit/s: half of that, of the slowest link here (18 Mbit/s).
    assert ratio(1408, found.intra / 8, flops[dtype], itemsize) == pytest.approx(paper, rel=0.05 / 18)
    assert found.intra / found.inter == pytest.approx(node.nvlink / node.nic, rel=0.05 / 18)
