"""Profiles of clusters: what curves say between their points, what bases give, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megascale_moe.config import ConfigError
from megascale_moe.engine.op import Stream, Work
from megascale_moe.planner.cluster import NAMES, Curve, Link, load

WHOLE = """
stack = "a stack"
[gpu]
memory_gb = 80
reserved_gb = 4
memory_tb_per_s = 2.0
overhead_us = 3
peak_tflops = { bf16 = 100 }
share = { product = [[128, 0.5]], grouped = [[128, 0.5]], attention = [[128, 0.5]], rows = [[128, 0.5]] }
[node]
ranks = 8
[links.intra]
gb_per_s = 100
latency_us = 10
peer_us = 0
share = [[1024, 0.5]]
[links.inter]
gb_per_s = 10
latency_us = 20
peer_us = 1
share = [[1024, 0.5]]
"""


def test_a_curve_is_straight_over_the_logarithm_and_constant_beyond() -> None:
    curve = Curve(((100, 0.2), (400, 0.6)))
    assert curve.at(1) == curve.at(100) == 0.2
    assert curve.at(400) == curve.at(1e9) == 0.6
    assert curve.at(200) == pytest.approx(0.4)


def test_a_link_takes_its_latency_its_peers_and_its_bytes() -> None:
    link = Link(rate=1e9, latency=1e-5, peer=1e-6, share=Curve(((1000, 0.25), (4000, 0.5))))
    assert link.seconds(4000, 1) == pytest.approx(1e-5 + 4000 / 0.5e9)
    # The same bytes to four peers are messages of a thousand, which reach half of the rate.
    assert link.seconds(4000, 4) == pytest.approx(1e-5 + 3e-6 + 4000 / 0.25e9)
    assert link.seconds(0, 4) == link.seconds(4000, 0) == 0


@pytest.mark.parametrize("name", NAMES)
def test_profiles_that_come_with_the_package(name: str) -> None:
    cluster = load(name)
    assert cluster.name == name
    assert set(cluster.shares) == set(Work)
    assert {"fp32", "bf16", "fp8"} <= set(cluster.peaks)
    assert cluster.links[Stream.INTRA].rate > cluster.links[Stream.INTER].rate
    assert cluster.memory > 64e9
    for curve in [*cluster.shares.values(), *(link.share for link in cluster.links.values())]:
        shares = [share for _, share in curve.points]
        assert shares == sorted(shares)  # more work at once is never done at a lower rate


def test_all_profiles_are_listed() -> None:
    folder = Path(load.__code__.co_filename).parent / "clusters"
    assert {path.stem for path in folder.glob("*.toml")} == set(NAMES)


def test_a_base_gives_what_is_not_said() -> None:
    h100, h800 = load("h100"), load("h800")
    assert h800.links[Stream.INTRA].rate == 200e9
    assert h800.links[Stream.INTRA].share == h100.links[Stream.INTRA].share
    assert h800.links[Stream.INTER] == h100.links[Stream.INTER]
    assert (h800.peaks, h800.shares, h800.bandwidth) == (h100.peaks, h100.shares, h100.bandwidth)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE)
    cluster = load(str(path))
    assert (cluster.name, cluster.stack, cluster.node) == ("mine", "a stack", 8)
    assert (cluster.memory, cluster.bandwidth, cluster.peaks["bf16"]) == (80e9, 2e12, 1e14)
    assert math.isclose(cluster.overhead, 3e-6)
    assert (cluster.contention, cluster.rings, cluster.jitter, cluster.imbalance, cluster.host) == (1, True, 0, 1, 0)
    more = 'jitter = 0.02\nimbalance = 1.5\nstep_ms = 2\n'
    path.write_text(WHOLE.replace("ranks = 8", f"ranks = 8\nrings = false\n[run]\n{more}"))
    assert load(str(path)).rings is False
    assert (load(str(path)).jitter, load(str(path)).imbalance, load(str(path)).host) == (0.02, 1.5, 0.002)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("memory_gb = 80", "", "gpu.memory_gb is missing"),
        ("memory_gb = 80", "memory_gb = -1", "gpu.memory_gb = -1: must be a positive number"),
        ("memory_gb = 80", "memory_gb = true", "gpu.memory_gb = True: must be a positive number"),
        ("memory_gb = 80", "memory_gb = inf", "gpu.memory_gb = inf: must be a positive number"),
        ("reserved_gb = 4", "reserved_gb = 90", "gpu.reserved_gb = 90.0: must be below gpu.memory_gb = 80.0"),
        ("overhead_us = 3", "overhead_us = -3", "gpu.overhead_us = -3: must be a number of at least 0"),
        ("ranks = 8", "ranks = 2.5", "node.ranks = 2.5: must be a whole number"),
        ("bf16 = 100", "fp8 = 100", "gpu.peak_tflops: bf16 is missing"),
        ("product = [[128, 0.5]]", "product = [[128, 1.5]]", "gpu.share.product: must be pairs [size, share]"),
        ("product = [[128, 0.5]]", "product = [[8, 0.5], [4, 0.6]]", "gpu.share.product: must be pairs [size, share]"),
        ("product = [[128, 0.5]]", "product = []", "gpu.share.product: must be pairs [size, share]"),
        ("[links.inter]", "[links.outer]", "links.inter is missing"),
        ('stack = "a stack"', 'stack = "a stack"\nrun = 3', "run = 3: must be a table"),
        ("ranks = 8", "ranks = 8\nrings = 1", "node.rings = 1: must be true or false"),
        ("overhead_us = 3", "overhead_us = 3\ncontention = 0.9", "contention = 0.9: must be a number of at least 1"),
        ("[links.inter]", "[run]\njitter = -1\n[links.inter]", "run.jitter = -1: must be a number of at least 0"),
        ('stack = "a stack"', "stack = ", "not valid TOML"),
        ('stack = "a stack"', 'base = "h900"', "cluster profile 'h900' is unknown; known: a100, b200"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path: Path, before: str, after: str, reason: str) -> None:
    path = tmp_path / "bad.toml"
    assert before in WHOLE
    path.write_text(WHOLE.replace(before, after))
    with pytest.raises(ConfigError) as refused:
        load(str(path))
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_profile_cannot_be_its_own_base(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text(f'base = "{path}"\n')
    with pytest.raises(ConfigError, match="is its own base"):
        load(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / "none.toml"))
