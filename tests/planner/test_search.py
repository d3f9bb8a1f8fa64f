"""The search against trying everything, its lower bounds against prices, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megascale_moe.config import Config, ConfigError, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig
from megascale_moe.engine.op import Stream, Work
from megascale_moe.pipeline.batches import check_batches
from megascale_moe.planner.bounds import LowerBounds
from megascale_moe.planner.cluster import load
from megascale_moe.planner.explain import SHARES, WORDS, explain
from megascale_moe.planner.search import SearchResult, capacity, planned, search
from megascale_moe.planner.space import KEYS, Space, changed, parallel_words, value
from megascale_moe.planner.stages import StageKind
from megascale_moe.planner.step import Pricer, memory, price
from megascale_moe.presets import PRESETS
from megascale_moe.strategies.fit import mesh_of

pytestmark = pytest.mark.bulky  # lists and prices that a search keeps

H800 = load("h800")
MODEL = ModelConfig(
    layers=4, hidden=1024, heads=8, kv_heads=4, experts=8, top_k=2, ffn_hidden=2048, vocab=4096, sequence_length=2048,
    shared_experts=1,
)  # fmt: skip
WHOLE = Config(model=MODEL, train=TrainConfig(dtype="bf16", global_batch=16))


def space(gpus: int = 4, *kept: str, config: Config = WHOLE) -> Space:
    return Space(config, gpus, H800.node, frozenset(kept))


@pytest.mark.parametrize("gpus", [1, 4, 8, 24])
def test_every_layout_of_a_space_is_one_and_there_once(gpus: int) -> None:
    made = [layout.of(WHOLE) for layout in space(gpus).layouts()]
    assert len(made) == len(set(made)) > 0
    for config in made:
        check_batches(config, mesh_of(config.parallel, MODEL, gpus))
    if gpus == 8:
        p = [config.parallel for config in made]
        assert {each.pp for each in p} == {1, 2, 4}
        assert {each.attention for each in p} == {"sp", "tp", "cp"}
        assert {each.ffn for each in p} == {"ep", "tp", "ep+tp"}
        assert {each.schedule for each in p} == {"1f1b", "interleaved", "zero_bubble"}
        assert {config.train.micro_batch for config in made} == {1, 2, 4, 8, 16}


def test_nodes_share_sequences_that_are_long_enough() -> None:
    """Two, where each has 32,768 tokens of a sequence or more; or as many as the config says."""

    def shared(length: int, *kept: str, cp: int = 1) -> set[int]:
        parallel = ParallelConfig(node=2, cp=cp)
        long = replace(WHOLE, model=replace(MODEL, sequence_length=length), parallel=parallel)
        return {layout.mesh.cp for layout in space(8, "parallel.node", *kept, config=long).layouts()}

    assert shared(2**15) == {1}
    assert shared(2**16) == {1, 2}
    assert shared(2**20) == {1, 2, 4}
    assert shared(2**13, cp=2) == {1, 2}
    assert shared(2**20, "parallel.cp", cp=2) == {2}


def test_the_link_between_nodes_that_share_sequences_is_where_they_are() -> None:
    """Two such nodes may stand in one that the cluster calls so."""
    for machine, stream in ((8, Stream.INTRA), (2, Stream.INTER)):
        config = replace(WHOLE, parallel=ParallelConfig(cp=2, node=2, ep=4))
        found = Pricer(replace(H800, node=machine)).layout(config, 4)
        forward = found.stages.lists(StageKind((1,), first=False, last=False)).forward
        gather = next(op for op in forward if op.cost.axis == "cp")
        assert gather.stream == stream
        assert parallel_words(config.parallel) == "pp 1 x dp 0 x cp 2 x node 2, sp + ep 4"
        assert found.price.seconds > 0


def test_what_is_kept_stays() -> None:
    config = replace(WHOLE, parallel=ParallelConfig(pp=2, attention="tp", schedule="zero_bubble"))
    kept = ("parallel.pp", "parallel.attention", "parallel.schedule")
    found = [layout.of(config) for layout in space(8, *kept, config=config).layouts()]
    assert len(found) > 5
    assert {tuple(value(each, key) for key in kept) for each in found} == {(2, "tp", "zero_bubble")}
    with pytest.raises(ConfigError, match=r"--keep parallel\.pipeline: is not searched; searched are parallel\.pp"):
        space(8, "parallel.pipeline").check()


def test_lower_bounds_are_below_prices() -> None:
    """Of layouts of eight GPUs, with each amount that is recomputed."""
    pricer = Pricer(H800)
    for start, remat in enumerate(("none", "paper", "full")):
        bounds = LowerBounds(WHOLE, 8, H800, capacity(H800), [remat])
        for layout in list(space(8).layouts())[start::101]:
            bound, least = bounds.of(layout)
            config = replace(layout.of(WHOLE), overlap=OverlapConfig(order="scheduled", remat=remat))  # type: ignore[arg-type]
            found = pricer.layout(config, 8)
            assert least == remat
            assert bound <= found.lower_bound * (1 + 1e-9)
            assert found.lower_bound <= found.pipeline[0] * (1 + 1e-9)
            assert found.pipeline[0] < found.price.seconds


def test_memory_bounds_are_below_memory() -> None:
    """Bytes that make a bound infinite are bytes that the layout needs."""
    pricer = Pricer(H800)
    for layout in list(space(8).layouts())[::101]:
        config = replace(layout.of(WHOLE), overlap=OverlapConfig(remat="paper"))
        needed = pricer.layout(config, 8).bytes(0, update=False)
        stays = needed.peak - needed.activations
        assert LowerBounds(WHOLE, 8, H800, needed.peak, ["paper"]).of(layout)[0] < math.inf
        assert LowerBounds(WHOLE, 8, H800, 0.5 * stays, ["paper"]).of(layout)[0] == math.inf


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return search(space(4, "parallel.attention"), H800, workers=2)


def test_a_search_finds_what_trying_everything_finds(found: SearchResult) -> None:
    pricer = Pricer(H800)
    tried = []
    for layout in space(4, "parallel.attention").layouts():
        config = changed(changed(layout.of(WHOLE), "overlap.order", "scheduled"), "wire.gradients", "bf16")
        tried.append(pricer.layout(config, 4).price.seconds)  # the model is small: nothing is recomputed
    assert found.layouts == len(tried)
    assert found.priced < len(tried)
    assert found.plans[0].price.seconds <= min(tried) * (1 + 1e-9)
    seconds = [plan.price.seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    assert len({parallel_words(plan.config.parallel) for plan in found.plans}) == len(found.plans) == 6


def test_found_plans_are_what_their_configs_say(found: SearchResult) -> None:
    for plan in found.plans:
        plan.config.check()
        assert price(plan.config, H800, 4).seconds == pytest.approx(plan.price.seconds, rel=1e-9)
        assert memory(plan.config, H800, 4, plan.place).peak == plan.bytes.peak <= capacity(H800)


def test_shown_plans_are_refined(found: SearchResult) -> None:
    """Working on two micro-batches at once, which is never what is tried first, makes none of them faster."""
    pricer = Pricer(H800)
    for plan in found.plans:
        other = changed(plan.config, "overlap.micro_batches", 3 - plan.config.overlap.micro_batches)
        try:
            layout = pricer.layout(other, 4)
        except ConfigError:  # the schedule has no pairs
            continue
        assert layout.price.seconds >= plan.price.seconds or layout.bytes(0).peak > capacity(H800)


def test_a_model_that_does_not_fit_is_refused_with_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    mixtral = replace(PRESETS["mixtral-8x7b"], layers=8, sequence_length=4096)
    config = Config(model=mixtral, train=TrainConfig(dtype="bf16", global_batch=32))
    small = replace(H800, memory=44e9)
    wanted = r"--gpus 4: no layout of mixtral-8x7b fits the 44 GB of each of 4 GPUs \(h800\); the smallest cluster on "
    with pytest.raises(ConfigError, match=wanted + r"which one does has 8 GPUs"):
        search(space(4, config=config), small, workers=1)
    quick = ("parallel.attention", "parallel.ffn", "train.micro_batch", "overlap.split", "overlap.micro_batches")
    assert search(space(8, *quick, config=config), small, workers=1).plans[0].bytes.peak <= capacity(small)
    monkeypatch.setattr("megascale_moe.planner.search.LARGEST", 2)
    tiny = replace(H800, memory=6e9)
    with pytest.raises(ConfigError, match=r"with parallel\.pp kept fits the 6 GB .*; nor does one with more GPUs"):
        search(space(8, "parallel.pp", config=config), tiny, workers=1)


def test_a_batch_that_no_layout_divides_is_refused() -> None:
    odd = replace(WHOLE, train=TrainConfig(dtype="bf16", global_batch=7))
    with pytest.raises(ConfigError, match="no layout of 4 layers and 7 sequences has 128 GPUs"):
        search(space(128, config=odd), H800)


def test_an_explanation_adds_up(found: SearchResult) -> None:
    for config in (found.plans[0].config, replace(WHOLE, parallel=ParallelConfig(pp=2, node=2, ep=2))):
        layout = Pricer(H800).layout(config, 4)
        why = explain(layout)
        assert set(why.seconds) == set(WORDS)
        assert sum(why.seconds.values()) == pytest.approx(layout.price.seconds, rel=1e-6)
        assert all(seconds >= -1e-9 for name, seconds in why.seconds.items() if name != "bubble")
        assert why.gains[0].saved == max(gain.saved for gain in why.gains) > 0
        assert why.gains[0].what in why.limit
    assert set(SHARES) == {*map(str, Work), str(Stream.INTRA), str(Stream.INTER)}
    links = {stream: replace(link, rate=link.rate / 50) for stream, link in H800.links.items()}
    slow = Pricer(replace(H800, links=links))
    tensor = replace(WHOLE, parallel=ParallelConfig(node=4, attention="tp", ffn="tp"))
    assert explain(slow.layout(tensor, 4)).limit.startswith("the links inside a node")
    # Ranks of one node, whatever `parallel.node` calls so: what they wait for is not the network.
    experts = explain(slow.layout(replace(WHOLE, parallel=ParallelConfig(node=2, dp=2, ep=4)), 4))
    assert experts.seconds["intra"] > 0
    assert experts.seconds["inter"] == 0


def test_the_scale_up_criterion_is_the_papers() -> None:
    """R = 1.5 h_ffn bandwidth / peak in BF16 (its section 7): h_ffn 14,336, 200 GB/s, 989 TFLOP/s."""
    model = replace(MODEL, ffn_hidden=14336)
    why = explain(Pricer(H800).layout(replace(WHOLE, model=model, parallel=ParallelConfig(node=8)), 8))
    assert why.criterion == pytest.approx(1.5 * 14336 * 200e9 / 989e12)
    over_nodes = replace(WHOLE, model=model, parallel=ParallelConfig(node=4, ep=8))
    small = Pricer(replace(H800, node=4)).layout(over_nodes, 8)
    assert explain(small).criterion == pytest.approx(1.5 * 14336 * 50e9 / 989e12)


def test_what_follows_from_a_run_is_refused_where_it_is_fixed_and_replaced_where_it_is_searched() -> None:
    budget = replace(WHOLE, overlap=OverlapConfig(remat="budget", activation_bytes=10**6))
    with pytest.raises(ConfigError, match=r"overlap\.remat = 'budget' and split = 'auto' follow from times"):
        planned(budget, H800, 4)
    kept = [key for key in KEYS if key.startswith("parallel.") or key == "train.micro_batch"]
    fixed = replace(budget, parallel=ParallelConfig(pp=1, dp=1, node=4, ep=4, dispatch="all_gather"))
    found = search(space(4, *kept, config=replace(fixed, train=replace(WHOLE.train, micro_batch=2))), H800)
    found.plans[0].config.check()
    assert (found.layouts, found.plans[0].config.overlap.remat) == (1, "none")


def test_every_searched_key_is_a_key_of_the_config() -> None:
    for key in KEYS:
        assert changed(WHOLE, key, value(WHOLE, key)) == WHOLE


# DeepSeek-V2 and Kimi-K2, with few layers: their experts do not divide the assignments of a rank.
DEEPSEEK_V2 = replace(
    PRESETS["deepseek-v3"], layers=3, hidden=5120, heads=128, kv_heads=128, vocab=102400, experts=160, top_k=6,
    score="softmax", correction_bias=False, expert_groups=8, top_groups=3, ffn_hidden=1536, shared_experts=2,
    dense_layers=1, dense_ffn_hidden=12288,
)  # fmt: skip
KIMI_K2 = replace(
    PRESETS["deepseek-v3"], layers=3, heads=64, kv_heads=64, vocab=163840, experts=384, expert_groups=1, top_groups=1,
    dense_layers=1,
)  # fmt: skip
AWKWARD = {"deepseek-v2": DEEPSEEK_V2, "kimi-k2": KIMI_K2}


@pytest.mark.parametrize("model", AWKWARD.values(), ids=AWKWARD)
def test_experts_that_assignments_do_not_divide_by_are_planned(model: ModelConfig) -> None:
    """A plan counted rows of 160 or 384 experts in two ways that did not add up, and ended in a traceback."""
    whole = Config(model=model, train=TrainConfig(dtype="bf16", global_batch=32))
    kept = ("parallel.pp", "parallel.attention", "parallel.node", "train.micro_batch", "overlap.micro_batches")
    some = replace(whole, parallel=ParallelConfig(node=8), train=replace(whole.train, micro_batch=1))
    assert search(space(32, *kept, config=some), H800, top=1, workers=1).plans
    for form in ("all_to_all", "all_gather"):
        for ep, etp, split in ((32, 1, "none"), (32, 1, "4"), (16, 2, "none"), (16, 2, "4")):
            parallel = ParallelConfig(node=8, ep=ep, etp=etp, ffn="ep" if etp == 1 else "ep+tp", dispatch=form)
            fixed = replace(whole, parallel=parallel, overlap=OverlapConfig(order="scheduled", split=split))
            assert planned(fixed, H800, 32).bytes.activations > 0
