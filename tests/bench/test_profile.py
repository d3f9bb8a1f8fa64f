"""A profile of two small ranks, and the arithmetic from samples to curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.bench.machine import Effort
from megascale_moe.bench.profile import bench
from megascale_moe.bench.shares import Sample, link_of, rising, shares
from megascale_moe.cli import main
from megascale_moe.config import ConfigError, ModelConfig
from megascale_moe.engine.op import Stream, Work
from megascale_moe.planner.cluster import load

MODEL = ModelConfig(
    layers=1, hidden=32, heads=2, kv_heads=1, experts=4, top_k=2, ffn_hidden=32, shared_experts=1, vocab=64,
    sequence_length=32, balance_loss=0.01,
)  # fmt: skip
TINY = Effort(((MODEL, 1), (MODEL, 4)), (32, 64), 1 << 18, repeats=2, list_s=0.02, piece_s=0.01, step_s=0.01)


def profile(nproc: int, node: int | None = None, out: Path = Path("profile.toml"), base: str = "") -> int:
    """The exit status of a quick one."""
    return bench(nproc, node, None, out, base, TINY, as_json=False)


def test_a_profile_of_two_ranks_can_be_planned_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.toml"
    assert profile(2, out=path) == 0
    assert capfd.readouterr().out == f"profile: {path}\n"
    cluster = load(str(path))
    assert cluster.node == 2
    assert not cluster.rings  # gloo
    assert 0 < cluster.peaks["fp32"] < 1e15
    assert 0 < cluster.bandwidth < 1e14
    assert 0 < cluster.overhead < 0.1
    assert cluster.contention >= 1
    assert cluster.jitter >= 0
    assert cluster.host > 0
    assert cluster.memory > 0
    assert cluster.formulas is not None
    for curve in (*cluster.shares.values(), cluster.formulas):
        found = [share for _, share in curve.points]
        assert found == sorted(found)
    assert max(share for work in (Work.PRODUCT, Work.GROUPED) for _, share in cluster.shares[work].points) <= 1
    link = cluster.links[Stream.INTRA]
    assert link.seconds(1 << 20, 1) > link.seconds(1 << 10, 1) > 0
    assert cluster.links[Stream.INTER] == link  # there is one machine
    text = path.read_text(encoding="utf-8")
    assert torch.__version__ in text
    assert "ranks: 2, in nodes of 2" in text


def test_a_profile_of_one_rank_has_the_links_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    assert profile(1, out=path, base="h100") == 0
    found, base = load(str(path)), load("h100")
    assert (found.links, found.node, found.rings, found.contention) == (base.links, 8, True, 1)
    assert found.peaks["fp8"] == base.peaks["fp8"]
    assert found.peaks["fp32"] < 1e15
    assert found.shares != base.shares
    assert found.overhead != base.overhead


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nproc": 1}, "bench profile: 1 rank has no links to measure; start 2 or more with --nproc"),
        ({"nproc": 1, "base": "h1"}, "cluster profile 'h1' is unknown"),
        ({"nproc": 4, "node": 3}, "nodes of 3 do not divide the 4 ranks; use --node with one of 1, 2, 4"),
        ({"nproc": 2, "out": Path("profile.txt")}, "--out profile.txt: a profile is a .toml file"),
        ({"nproc": 2, "out": Path("/no/such/folder/a.toml")}, "cannot write to /no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ranks_start(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        profile(**options)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rates_rise_and_the_time_of_all_samples_stays() -> None:
    """Falling rates are pooled: 8 and 16 take 3 s for 24 of work, whatever each took."""
    samples = [Sample("product", size, work, seconds)
               for size, work, seconds in ((4, 4, 2), (8, 8, 0.5), (16, 16, 2.5), (32, 32, 2))]  # fmt: skip
    found = rising(samples)
    assert [rate for _, rate in found] == pytest.approx([2, 8, 8, 16])
    assert [size for size, _ in found] == pytest.approx([4, 8, 16, 32])
    seconds = sum(sample.work / rate for sample, (_, rate) in zip(samples, found, strict=True))
    assert seconds == pytest.approx(sum(sample.seconds for sample in samples))


def test_samples_of_about_one_size_are_one_point() -> None:
    (point,) = rising([Sample("rows", 1000, 1000, 1), Sample("rows", 1024, 1024, 3)])
    assert 1000 < point[0] < 1024
    assert point[1] == pytest.approx(2024 / 4)


def test_shares_are_of_a_peak_and_flat_stretches_keep_their_ends() -> None:
    assert shares([(1, 2.0), (2, 4.0), (4, 4.0), (8, 4.0), (16, 5.0)], 8.0) == [
        (1, 0.25), (2, 0.5), (8, 0.5), (16, 0.625),
    ]  # fmt: skip
    assert shares([(1, 9.0)], 8.0) == [(1, 1.0)]


@pytest.mark.parametrize("peers", [1, 3])
def test_a_link_that_obeys_the_formula_is_found(peers: int) -> None:
    rate, latency, peer = 2e7, 1e-3, 2e-4
    start = latency + peer * (peers - 1)
    sizes = [64.0, *(2.0**power for power in range(12, 22))]
    found = link_of([(size, start + (size * peers / rate if size > 64 else 0)) for size in sizes], peers, peer)
    assert found.rate == pytest.approx(rate)
    assert found.latency == pytest.approx(latency)
    assert found.peer == peer
    assert all(math.isclose(share, 1) for _, share in found.share.points)
    assert found.share.points[0][0] * peers / rate > 0.2 * start  # shorter ones are lost in the latency


def test_more_bytes_never_take_less_time() -> None:
    found = link_of([(64, 1.0), (1 << 12, 0.9), (1 << 20, 3.0), (1 << 21, 2.9)], 1, 0.0)
    assert found.latency == 1.0
    assert [size for size, _ in found.share.points] == [1 << 20, 1 << 21]
    assert found.share.points[0][1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["profile", "my.toml"], "bench profile measures the machine, not a config; leave out 'my.toml'"),
        (["profile", "--train.steps=3"], "leave out '--train.steps=3'"),
        (["profile", "--nproc=1"], "bench profile: 1 rank has no links to measure"),
        (["profile", "--nproc=0"], "argument --nproc: '0' is not a number of ranks"),
        (["overlap"], "bench overlap needs a CONFIG.toml; see megascale bench --help"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("megascale: ")
    assert said.err.count("\n") == 1
    assert reason in said.err


def test_a_link_of_which_only_the_latency_shows_has_a_rate() -> None:
    found = link_of([(64, 1.0), (1 << 12, 1.1)], 1, 0.0)
    assert (found.latency, found.share.points) == (1.0, ((1 << 12, 1.0),))
    assert found.rate == pytest.approx((1 << 12) / 1.1)
