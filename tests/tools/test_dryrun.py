"""What a dry run says of a rank that is not there, against formulas, and against ranks that are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale_moe.comm.axis import axes_of, connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import (
    Config,
    ConfigError,
    ModelConfig,
    OverlapConfig,
    ParallelConfig,
    TrainConfig,
    WireConfig,
    load,
)
from megascale_moe.data import Batch
from megascale_moe.engine.memory import Meter
from megascale_moe.pipeline.checker import bubble
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.presets import PRESETS
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.weights import placements
from megascale_moe.testing import run_ranks
from megascale_moe.tools.dryrun import messages
from megascale_moe.tools.dryrun.messages import check_messages
from megascale_moe.tools.dryrun.step import dry_run, step_timeline
from megascale_moe.train.trainer import Trainer
from tests.runs import start

pytestmark = pytest.mark.bulky  # a meter imports torch's compiler

CONFIG = Path(__file__).parents[2] / "configs" / "internal-352b.toml"
MODEL = ModelConfig(
    layers=4, hidden=32, heads=4, kv_heads=2, experts=4, top_k=4, ffn_hidden=24, vocab=64, sequence_length=16,
    balance_loss=0.1,
)  # every token goes to every expert, so routing is balanced, as a dry run takes it to be
BSH = 8192 * 4096  # of the paper's model with one sequence


def wire(found: Any, phase: str) -> dict[str, float]:
    """Bytes of one message of each operator."""
    return {w["op"]: w["bytes"] / w["count"] for w in found.rank["wire"] if w["phase"] == phase}


# --- the paper's model on its cluster ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    """The four layouts of the paper's ablation, with as many micro-batches as stages instead of sixty to be quick."""
    found = {}
    for attention in ("sp", "tp"):
        for ffn in ("ep", "tp"):
            layout = [f"parallel.attention={attention}", f"parallel.ffn={ffn}", "train.global_batch=180"]
            found[f"{attention}+{ffn}"] = dry_run(load(CONFIG, layout, PRESETS), 1440, 0, all_ranks=False)
    return found


def test_the_papers_model_has_its_size(paper: dict[str, Any]) -> None:
    """351.9 billion parameters, and 282.5 GFLOP per token from its MFU (paper, section 5)."""
    for found in paper.values():
        assert round(found.parameters_total / 1e9, 1) == 351.9
        assert round(found.flops_per_token / 1e9, 1) == 282.5
        assert found.ranks == 1440
        assert found.micro_batches == 15


@pytest.mark.parametrize("layout", ["sp+ep", "sp+tp", "tp+ep", "tp+tp"])
def test_volumes_are_the_papers(paper: dict[str, Any], layout: str) -> None:
    """Elements of two bytes, n = 8, m = 4, k = 3 (paper, section 3)."""
    n, m, k = 8, 4, 3
    sent = wire(paper[layout], "F")
    attention, ffn = layout.split("+")
    if attention == "sp":
        assert sent["scatter_heads"] + sent["gather_heads"] == 2 * BSH * (2 + 2 / m) * (n - 1) / n**2
    else:
        assert sent["gather_tokens"] + sent["scatter_tokens"] == 2 * 2 * BSH * (n - 1) / n
    if ffn == "ep":
        assert sent["dispatch_all_to_all"] + sent["combine_all_to_all"] == 2 * 2 * k / n * BSH * (n - 1) / n
    else:
        assert sent["dispatch_all_gather"] + sent["combine_reduce_scatter"] == 2 * 2 * BSH * (n - 1) / n
    assert sent["send_hidden"] == 2 * BSH / n


def test_sequence_parallelism_costs_as_much_memory_as_in_the_paper(paper: dict[str, Any]) -> None:
    """The paper measured +1.2 % to +5.4 % in total for replicated attention weights."""
    for ffn in ("ep", "tp"):
        more = paper[f"sp+{ffn}"].rank["memory"]["peak"] / paper[f"tp+{ffn}"].rank["memory"]["peak"] - 1
        assert 0.012 < more < 0.054


def test_parameters_of_a_rank(paper: dict[str, Any]) -> None:
    """Four layers: attention whole or an eighth, experts an eighth in either way; BF16, FP32, and 12 bytes sharded."""
    attention = 4096 * 4096 * 2 + 2 * 1024 * 4096
    layer = 4096 * 32 + 2 * 4096  # router, norms
    routed, shared = 32 * 3 * 14336 * 4096, 3 * 14336 * 4096
    embedding = 65536 * 4096
    for layout, found in paper.items():
        held = (
            4 * (attention // (8 if layout.startswith("tp") else 1) + layer + routed // 8
                 + shared // (8 if layout.endswith("tp") else 1)) + embedding
        )  # fmt: skip
        memory = found.rank["memory"]
        assert memory["parameters"] == pytest.approx(2 * held, rel=1e-5)  # padding to equal shards
        assert memory["gradients"] == 2 * memory["parameters"]
        # Masters and moments: experts over 12 replicas, the rest over 96 (or 12, where it is cut over the node).
        whole = 4 * (attention + layer + routed + shared) + embedding
        assert memory["optimizer"] == pytest.approx(12 * whole / 96, rel=1e-5)
        assert memory["peak"] == sum(value for name, value in memory.items() if name != "peak")


# --- against ranks that run -------------------------------------------------------------------------------------------


def config_of(parallel: ParallelConfig, **train: Any) -> Config:
    settings = TrainConfig(global_batch=4, micro_batch=1, clip_norm=0.0, **train)
    return Config(model=MODEL, parallel=replace(parallel, dispatch="auto"), train=settings)


def real_step(config: Config, mesh: Mesh) -> dict[str, int]:
    """Bytes that a rank really sends in a step, by operator without its layer."""
    axes = connect(mesh) if mesh.world > 1 else single()
    trainer = Trainer(config, mesh, axes, torch.device("cpu"))
    trainer.initialise()
    length = config.model.sequence_length
    tokens = torch.randint(0, config.model.vocab, (1, length))
    batches = [Batch(tokens, tokens, (0, length))] * (4 // mesh.dp)
    sent: dict[str, int] = {}
    for (name, _), count in trainer.step(batches, 4 * length).trace.wire_bytes().items():
        stem = name.split(".", 2)[2] if name.startswith("layers.") else name
        sent[stem] = sent.get(stem, 0) + count
    return sent


LAYOUTS = {
    "sp+ep": ParallelConfig(dp=2, node=2, ep=2),
    "tp+tp": ParallelConfig(node=2, dp=2, attention="tp", ffn="tp", vocabulary="sharded"),
    "cp+ep": ParallelConfig(dp=2, node=2, ep=2, attention="cp"),
    "pipeline": ParallelConfig(pp=2, node=2, schedule="zero_bubble"),
    "interleaved": ParallelConfig(pp=2, dp=2, node=1, ep=1, schedule="interleaved", virtual_stages=2),
    "ep x etp": ParallelConfig(node=4, ffn="ep+tp", ep=2, etp=2),
    "cp": ParallelConfig(cp=2, node=2, ep=2),
    "cp + cp": ParallelConfig(cp=2, node=2, ep=2, attention="cp", vocabulary="sharded"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_that_real_ranks_send(name: str) -> None:
    config = config_of(LAYOUTS[name])
    mesh = mesh_of(config.parallel, config.model, 4)
    results = run_ranks(4, real_step, config, mesh)
    for rank in (0, 3):  # of the first and of the last stage
        sent = results[rank]
        expected: dict[str, int] = {}
        for w in dry_run(config, 4, rank, all_ranks=False).rank["wire"]:
            expected[w["op"]] = expected.get(w["op"], 0) + w["bytes"]
        assert {op: count for op, count in sent.items() if count} == expected


def held_by_a_real_step(config: Config) -> int:
    """In a process of its own: a trainer tells the allocator to keep freed memory, which other tests would notice."""
    trainer = Trainer(config, Mesh(), single(), torch.device("cpu"))
    trainer.initialise()
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    meter = Meter()
    with meter:
        shared = {"loss_scale": 1.0, "auxiliary_scale": torch.tensor(1.0)}
        trainer.run([Batch(tokens, tokens, (0, 16))] * 4, "train", shared, observe=meter.between)
    return meter.held


def test_memory_between_operators_is_that_of_a_real_step() -> None:
    """One rank, one thread: the meter counts the same bytes on real tensors as on tensors without storage."""
    config = config_of(ParallelConfig())
    config = replace(config, train=replace(config.train, compile="off"))
    (held,) = run_ranks(1, held_by_a_real_step, config)
    expected = dry_run(config, 1, 0).rank["memory"]["activations"]
    assert 0 <= held - expected <= 3 * 2000  # inputs of three micro-batches: the dry run makes those of one for all


def test_meter_counts_what_a_graph_keeps() -> None:
    meter = Meter()
    with meter:
        x = torch.empty(1000, device="meta").requires_grad_()
        with torch.enable_grad():
            y = x.exp().sin()  # exp's result is kept by both
        assert meter.alive == 3 * 4000
        z = y.detach().view(10, 100)  # a view adds nothing
        del y
        assert meter.alive == 2 * 4000  # x and what z shows
        del z
        assert (meter.alive, meter.peak) == (4000, 3 * 4000)


def test_meter_leaves_out_what_was_there_before() -> None:
    """A transposed weight is a view: counted as new, every rank of a dry run held its weights and gradients twice."""
    weight, buffer = torch.empty(100, 50, device="meta"), torch.empty(100, 50, device="meta")
    meter = Meter()
    with meter:
        x = torch.empty(10, 50, device="meta")
        y = x @ weight.t()
        buffer.view(-1)[:100].add_(1)
        torch.mm(y.t(), x, out=buffer)
    assert meter.alive == meter.peak == 4 * (10 * 50 + 10 * 100)


@pytest.mark.parametrize("overlap", [OverlapConfig(split="2"), OverlapConfig(order="paper", remat="paper", split="4")])
def test_passes_have_a_form_without_storage(overlap: OverlapConfig) -> None:
    config = replace(config_of(ParallelConfig(dp=2, node=4)), overlap=overlap)
    plain = dry_run(config_of(ParallelConfig(dp=2, node=4)), 8, 1)
    found = dry_run(config, 8, 1)
    assert found.agreement is not None
    assert found.agreement.disagreement == ""
    dispatched = {name: sum(w["bytes"] for w in run.rank["wire"] if w["op"].startswith("dispatch"))
                  for name, run in (("plain", plain), ("cut", found))}  # fmt: skip
    again = 1.5 if overlap.remat == "paper" else 1.0  # forward and backward, and once more for what is recomputed
    assert dispatched["cut"] == again * dispatched["plain"]


def test_narrow_messages_have_a_form_without_storage() -> None:
    """What real ranks send, gradients half as much, and no more memory: the cast is in the gradients' own buffer."""
    plain = config_of(ParallelConfig(dp=2, node=2, ep=2, dispatch="all_gather"))
    narrow = replace(plain, wire=WireConfig(gradients="bf16", activations="fp8", parameters="bf16"))
    found = dry_run(narrow, 4, 0)
    assert found.agreement is not None
    assert found.agreement.disagreement == ""
    expected: dict[str, int] = {}
    for w in found.rank["wire"]:
        expected[w["op"]] = expected.get(w["op"], 0) + w["bytes"]
    sent = run_ranks(4, real_step, narrow, mesh_of(narrow.parallel, narrow.model, 4))[0]
    assert {op: count for op, count in sent.items() if count} == expected
    halves = {w["op"]: w["bytes"] / 2 for w in dry_run(plain, 4, 0).rank["wire"] if w["op"].startswith("gradients.")}
    del halves["gradients.norm_all_reduce"]
    assert halves == {op: expected[op] for op in halves}


# --- the job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "interleaved"])
def test_bubble_of_equal_stages_is_the_formula(schedule: str) -> None:
    """Without embedding and head the stages are equal; B takes twice F with 1F1B because W is in it."""
    virtual = 2 if schedule == "interleaved" else 1
    config = config_of(ParallelConfig(pp=2, node=1, schedule=schedule, virtual_stages=virtual))  # type: ignore[arg-type]
    model = replace(MODEL, vocab=1, experts=1, top_k=1, balance_loss=0.0)
    mesh = mesh_of(config.parallel, model, 2)
    trainer = Trainer(replace(config, model=model), mesh, single() | {}, torch.device("meta"))
    times = step_timeline(trainer.plan(1, 4))
    costs = {a.phase: end - start for a, start, end in times.spans[0]}
    f = costs["F"] * virtual
    b, w = (costs["B"], costs["W"]) if "B" in costs else (costs["BW"] * virtual, 0.0)
    assert times.bubble == pytest.approx(bubble(schedule, 2, 4, virtual, f, b, w), abs=0.02)  # the head's small rest


def test_all_ranks_agree_on_every_message_of_the_paper_layout() -> None:
    """With two layers in a stage instead of four, which are alike."""
    config = load(CONFIG, ["train.global_batch=180", "model.layers=30"], PRESETS)
    mesh = mesh_of(config.parallel, config.model, 1440)
    found = check_messages(config, mesh)
    assert (found.ranks, found.disagreement) == (1440, "")
    assert found.messages > 1440 * 50


@pytest.mark.parametrize("attention", ["sp", "tp", "cp"])
def test_all_ranks_agree_where_nodes_share_sequences(attention: str) -> None:
    """Experts on fewer ranks than a sequence, on as many and on more; in a pipeline."""
    for ep in (2, 4, 8):
        parallel = ParallelConfig(pp=2, dp=2, cp=2, node=2, ep=ep, attention=attention)  # type: ignore[arg-type]
        config = replace(config_of(parallel), model=replace(MODEL, experts=8, sequence_length=32))
        found = check_messages(config, mesh_of(parallel, config.model, 16))
        assert (found.ranks, found.disagreement) == (16, "")


def test_a_rank_that_thinks_of_another_layout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(ParallelConfig(pp=2, dp=2, node=2))
    mesh = mesh_of(config.parallel, config.model, 8)
    whole = messages.rank_messages

    def confused(config: Config, mesh: Mesh, rank: int, *rest: Any) -> Any:
        parallel = replace(config.parallel, dispatch="all_gather" if rank == 5 else "all_to_all")
        return whole(replace(config, parallel=parallel), mesh, rank, *rest)

    monkeypatch.setattr(messages, "rank_messages", confused)
    found = check_messages(config, mesh)
    assert "rank 4" in found.disagreement
    assert "rank 5" in found.disagreement
    assert "dispatch_all" in found.disagreement


def test_a_message_that_nobody_receives_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(ParallelConfig(pp=2, node=1))
    mesh = mesh_of(config.parallel, config.model, 2)
    whole = messages.rank_messages

    def forgetful(config: Config, mesh: Mesh, rank: int, *rest: Any) -> Any:
        found = whole(config, mesh, rank, *rest)
        return replace(found, receives={}) if rank == 1 else found

    monkeypatch.setattr(messages, "rank_messages", forgetful)
    assert "rank 0 to rank 1: message 0: sends" in check_messages(config, mesh).disagreement


@pytest.mark.parametrize("name", ["qwen3-235b-a22b", "deepseek-v3", "paper-hunyuan-large", "olmoe-1b-7b"])
def test_other_models(name: str) -> None:
    """Every kind of layer has a form without storage."""
    config = load(CONFIG, [f"model.preset={name}", "parallel.pp=1", "model.layers=4", "train.global_batch=4"], PRESETS)
    found = dry_run(config, 32, 3)
    assert found.rank["memory"]["peak"] > 0
    assert found.agreement is not None
    assert found.agreement.disagreement == ""


def test_parts_of_all_ranks_are_the_model() -> None:
    """Parameters of all stages and experts' ranks add up to the whole."""
    config = config_of(ParallelConfig(pp=2, dp=1, node=2, attention="tp", ffn="tp", vocabulary="sharded"))
    mesh = mesh_of(config.parallel, config.model, 4)
    total = 0
    for rank in range(4):
        plan = StepPlan(config.model, config.parallel, axes_of(mesh, rank), torch.float32, 1)
        for placement in placements(config.model, plan.layout, plan.part).values():
            replicas = 2 if placement.replicas[0] else 1
            total += math.prod(placement.shape) / replicas  # type: ignore[assignment]
    assert total == dry_run(config, 4, 0).parameters_total


# --- the command ------------------------------------------------------------------------------------------------------


def command(tmp_path: Path, *options: str) -> Any:
    path = tmp_path / "config.toml"
    path.write_text('[model]\npreset = "debug"\n[parallel]\nnode = 2\n[train]\nglobal_batch = 8\n')
    return start("dryrun", str(path), *options).wait()


def test_json_is_one_document_with_the_promised_names(tmp_path: Path) -> None:
    found = command(tmp_path, "--gpus=8", "--rank", "3", "--json")
    assert found.status == 0, found.stderr
    document = json.loads(found.stdout)
    assert {"parameters_total", "parameters_active", "flops_per_token", "ranks", "rank"} <= document.keys()
    rank = document["rank"]
    assert {"stage", "memory", "wire", "flops"} <= rank.keys()
    assert {"parameters", "gradients", "optimizer", "activations", "buffers", "peak"} == rank["memory"].keys()
    assert all({"op", "axis", "phase", "bytes", "count"} == entry.keys() for entry in rank["wire"])


def test_table_names_what_matters(tmp_path: Path) -> None:
    found = command(tmp_path, "--gpus=8")
    assert found.status == 0, found.stderr
    for text in ("8 ranks = pp 1 x dp 4 x node 2", "activations", "dispatch_all_", "all 8 ranks", "agree on every"):
        assert text in found.stdout


def test_table_shows_recomputed_messages(tmp_path: Path) -> None:
    """Tokens are gathered once more in backward: the table ended in a KeyError, with recomputed messages too."""
    for option in ("--parallel.attention=tp", "--overlap.remat=paper"):
        found = command(tmp_path, "--gpus=8", option)
        assert found.status == 0, found.stderr
        assert "recomputed" in found.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus=3"], "parallel.node = 2 does not divide the 3 ranks; use one of 1, 3"),
        (["--gpus=0"], "'0' is not a number of ranks; give 1 or more"),
        (["--gpus=8", "--rank=8"], "--rank 8: a job of 8 ranks has ranks 0 to 7"),
        (["--gpus=8", "--rank=-1"], "is not a rank"),
        (["--gpus=64"], "train.global_batch = 8 is not divisible by parallel.dp = 32"),
        (["--gpus=8", "--wire.activations=auto"], "a dry run measures no times, and wire.activations = 'auto' follows"),
        (["--gpus=8", "--parallel.pp=4"], "model.layers = 2 are fewer than the 4 stages"),
        ([], "--gpus"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    found = command(tmp_path, *options)
    assert found.status == 2
    assert len(found.messages) == 1
    assert message in found.messages[0]
    assert not found.stdout


def test_refused_without_a_traceback_in_process() -> None:
    with pytest.raises(ConfigError, match="has ranks 0 to 1"):
        dry_run(config_of(ParallelConfig(node=2)), 2, 2)


