"""Muon: its Newton-Schulz steps against singular values, its training against a plain one of a single device."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale_moe.checkpoint import Checkpoint, save
from megascale_moe.cli import main
from megascale_moe.config import Config, ConfigError, OverlapConfig, TrainConfig, WireConfig, from_dict, load
from megascale_moe.data import IGNORE, micro_batches
from megascale_moe.engine.op import Work
from megascale_moe.model.counts import parameter_matrices, parameter_shapes
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import Transformer, build
from megascale_moe.optim.adamw import ADAMW
from megascale_moe.optim.muon import COEFFICIENTS, MUON, orthogonalised, scale
from megascale_moe.optim.rule import WeightShard
from megascale_moe.presets import PRESETS
from megascale_moe.testing import run_ranks
from megascale_moe.tools.dryrun.step import dry_run
from tests.optim import layouts
from tests.optim.layouts import on_ranks
from tests.train.short_runs import MODEL, TRAIN, Story, alone, config_of, rows_of, state_of, train_steps, trainer_of

# --- one matrix -------------------------------------------------------------------------------------------------------


def singular(s: Tensor) -> Tensor:
    """What becomes of singular values of a matrix of norm one."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
def test_newton_schulz_is_a_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    """By a decomposition in float64. 1e-5: small singular values grow 485-fold, and so does their rounding of 1e-8."""
    matrices = torch.randn(3, *shape)
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    wanted = u @ torch.diag_embed(singular(s / s.norm(dim=-1, keepdim=True))) @ v
    found = orthogonalised(matrices.clone())
    assert found.shape == matrices.shape
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_directions_that_are_not_tiny_count_as_much_as_any() -> None:
    """Singular values from 1 down to a hundredth end within 0.3 of one, or a little above: the polynomial's range."""
    u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in range(2))
    matrix = u @ torch.diag(torch.logspace(0, -2, 16, dtype=torch.float64)) @ v
    found = torch.linalg.svdvals(orthogonalised(matrix[None].float())[0].double())
    assert float(found.min()) > 0.65
    assert float(found.max()) < 1.3


def test_a_matrix_without_gradient_stays_zero_and_its_size_does_not_matter() -> None:
    matrix = torch.randn(1, 4, 6)
    assert not orthogonalised(torch.zeros(1, 4, 6)).any()
    assert torch.equal(orthogonalised(matrix), orthogonalised(1024.0 * matrix))  # a power of two


@pytest.mark.parametrize("kind", ["adamw_rms", "spectral"])
def test_against_torchs_muon(kind: str) -> None:
    """Three updates of a tall and a wide matrix; torch's steps are in BF16, of which 2^-8 in each of 15 products."""
    config = TrainConfig(muon_scale=kind, muon_dtype="bf16", weight_decay=0.1)  # type: ignore[arg-type]
    for shape in ((24, 8), (8, 24)):
        weight = nn.Parameter(torch.randn(shape))
        start = weight.detach().clone()
        state = {"momentum": torch.zeros(weight.numel())}
        shard = WeightShard(start.flatten().clone(), state, torch.zeros(()), decay=True)
        theirs = torch.optim.Muon(
            [weight], lr=0.02, weight_decay=0.1, momentum=0.95,
            adjust_lr_fn="match_rms_adamw" if kind == "adamw_rms" else "original",
        )  # fmt: skip
        for _ in range(3):
            weight.grad = torch.randn(shape)
            theirs.step()
            direction = MUON.prepare(shard, weight.grad.flatten(), config)
            changed = MUON.transform(direction.view(1, *shape).bfloat16(), config)
            MUON.update(shard, changed.flatten().float(), 0.02, config)
        ours, wanted = shard.master.view(shape) - start, weight.detach() - start
        assert float((ours - wanted).norm() / wanted.norm()) < 0.03


def test_scales() -> None:
    rms, spectral = (TrainConfig(muon_scale=kind) for kind in ("adamw_rms", "spectral"))  # type: ignore[arg-type]
    assert scale(64, 16, rms) == scale(16, 64, rms) == pytest.approx(0.2 * 8)
    assert scale(64, 16, spectral) == 2.0
    assert scale(16, 64, spectral) == 1.0
    # Elements of an orthogonal matrix [n, m] have a root mean square of 1 / sqrt(longer side); here 0.7 to 1.2 of it.
    assert 0.7 * 0.2 < float(MUON.transform(torch.randn(1, 32, 8), rms).square().mean().sqrt()) < 1.2 * 0.2


def test_steps_are_in_bf16_on_gpus_and_in_fp32_on_cpus() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for kind, wanted in (
        ("auto", (torch.float32, torch.bfloat16)), ("fp32", (torch.float32,) * 2), ("bf16", (torch.bfloat16,) * 2),
    ):  # fmt: skip
        config = TrainConfig(muon_dtype=kind)  # type: ignore[arg-type]
        assert (MUON.dtype(cpu, config), MUON.dtype(gpu, config)) == wanted


def test_declared_products_are_counted() -> None:
    """Two products of the longer side and one of the shorter in each of five steps, two FLOPs for each term."""
    cost = MUON.transform_cost(48, 16)
    assert cost == MUON.transform_cost(16, 48)
    assert cost.flops == 5 * 2 * (2 * 16 * 16 * 48 + 16**3)
    assert cost.work == Work.PRODUCT
    assert 16 < cost.size < 3 / (1 / 16 + 1 / 16 + 1 / 48)  # between a product of 16 x 16 and one of 16 x 16 x 48


def test_which_weights_follow_which_rule() -> None:
    """The router is a matrix like others; vectors, the ends of the model and a gate of one row are not."""
    model = replace(MODEL, shared_experts=1, shared_gate=True, dense_layers=1, dense_ffn_hidden=8)
    rules = {name: MUON.of(matrices) for name, matrices in parameter_matrices(model).items()}
    assert {name for name, rule in rules.items() if rule is ADAMW} == {
        name for name in rules if "norm" in name or name in ("embedding.weight", "head.weight") or "gate" in name
    }
    assert rules["layers.1.ffn.router.weight"] is MUON


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("muon_momentum", 1.0, "train.muon_momentum = 1.0: must be at least 0 and below 1"),
        ("muon_scale", "rms", "train.muon_scale = 'rms': must be one of 'adamw_rms', 'spectral'"),
        ("muon_dtype", "fp16", "train.muon_dtype = 'fp16': must be one of 'auto', 'fp32', 'bf16'"),
        ("optimizer", "moun", "train.optimizer = 'moun': must be one of 'adamw', 'muon'"),
    ],
)
def test_wrong_settings_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict({"train": {key: value}})
    assert message in str(refusal.value)


# --- training against a plain one -------------------------------------------------------------------------------------

STEPS = 20
SMALL = replace(MODEL, heads=8, kv_heads=4, experts=8, shared_experts=1)
MUON_TRAIN = replace(
    TRAIN, optimizer="muon", steps=STEPS, warmup=0, learning_rate=0.01, clip_norm=1.0, weight_decay=0.1,
    muon_momentum=0.9,
)  # fmt: skip
HEIGHTS = {"qkv": (16, 8, 8), "experts.w13": (16, 16), "shared.w13": (16, 16)}
"""Of the matrices of fused weights: queries, keys and values; gate and up."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 4},
    "ep": {"node": 4, "ep": 4},
    "tp attention": {"node": 4, "ep": 4, "attention": "tp"},
    "tp": {"node": 4, "attention": "tp", "ffn": "tp", "vocabulary": "sharded"},
    "ep+tp": {"node": 4, "ffn": "ep+tp", "ep": 2, "etp": 2},
    "pp": {"pp": 2, "node": 2, "ep": 2},
    "two nodes": {"dp": 2, "node": 2, "ep": 2, "attention": "tp"},
    "two nodes, ep+tp over both": {"dp": 2, "node": 2, "ffn": "ep+tp", "ep": 2, "etp": 2},
    "hidden": {"dp": 2, "node": 2, "ep": 4},
    "hidden in a pipeline": {"pp": 2, "dp": 2, "node": 1},
}

# Relative norms of weights, float32: 20 updates from gradients that differ by rounding, 1e-7 or so, which Newton-Schulz
# may grow; the largest seen is 4.3e-7. A matrix at the wrong place, or two taken for one, differ by part of the update,
# which is 1e-2 of a weight each step.
TOLERANCE = 1e-5


class PlainMuon:
    """Muon and AdamW as one would write them in a notebook."""

    def __init__(self, model: Transformer, config: TrainConfig) -> None:
        self.config = config
        matrices, others = [], []
        for name, weight in model.named_parameters():
            inside = name.startswith("layers.") and weight.dim() > 1
            (matrices if inside else others).append((name, weight))
        self.matrices = [(name, weight, torch.zeros_like(weight)) for name, weight in matrices]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [w for _, w in others if w.dim() > 1], "weight_decay": config.weight_decay},
                {"params": [w for _, w in others if w.dim() == 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps,
        )  # fmt: skip

    def step(self) -> None:
        self.adamw.step()
        c = self.config
        with torch.no_grad():
            for name, weight, momentum in self.matrices:
                assert weight.grad is not None
                momentum.mul_(c.muon_momentum).add_(weight.grad)
                nesterov = weight.grad + c.muon_momentum * momentum
                heights = next((rows for part, rows in HEIGHTS.items() if part in name), (weight.shape[-2],))
                parts = [
                    self.orthogonal(matrix)
                    for expert in nesterov.view(-1, *weight.shape[-2:]) for matrix in expert.split(list(heights))
                ]  # fmt: skip
                weight.mul_(1 - c.learning_rate * c.weight_decay)
                weight.sub_(c.learning_rate * torch.cat(parts).view_as(weight))

    def orthogonal(self, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        x = matrix / (matrix.norm() + 1e-20)
        for _ in range(5):
            xx = x @ x.T
            x = 3.4445 * x - 4.7750 * xx @ x + 2.0315 * xx @ xx @ x
        spectral = self.config.muon_scale == "spectral"
        return x * (math.sqrt(max(1, rows / columns)) if spectral else 0.2 * math.sqrt(max(rows, columns)))


@functools.cache
def plain(kind: str = "adamw_rms", steps: int = STEPS) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of the plain modules on the whole batch, under autograd."""
    config = replace(MUON_TRAIN, muon_scale=kind)  # type: ignore[arg-type]
    model = build(SMALL, config.seed)
    optimizer, losses = PlainMuon(model, config), []
    for step in range(steps):
        rows = rows_of(SMALL, config.global_batch, step)
        (batch,) = micro_batches(rows, len(rows))
        segments = Segments(len(rows), SMALL.sequence_length, batch.boundaries)
        loss, auxiliary = model.losses(batch.tokens, batch.targets, segments)
        mean = loss / int((batch.targets != IGNORE).sum())
        model.zero_grad(set_to_none=False)
        (mean + auxiliary / batch.tokens.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(float(mean.detach()))
    return {name: weight.detach() for name, weight in model.named_parameters()}, losses


def trained(config: Config, steps: int = STEPS) -> Story:
    """The same through a trainer, on a rank of a layout."""
    trainer, story = trainer_of(config), Story()
    trainer.initialise()
    train_steps(trainer, steps, story)
    trainer.settle()
    story.pieces = list(trainer.pieces())
    return story


def weights_of(stories: list[Story]) -> dict[str, Tensor]:
    """All weights of the model, each from the ranks that save it."""
    state = state_of(stories)
    return {name.removeprefix("parameters."): value for name, value in state.items() if name.startswith("parameters.")}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())


def config_for(layout: str, train: TrainConfig = MUON_TRAIN) -> Config:
    config = config_of(SMALL, train, **LAYOUTS[layout])
    order = "paper" if layout.startswith("hidden") else "serial"
    return replace(config, overlap=OverlapConfig(order=order))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_are_those_of_a_plain_muon(layout: str) -> None:
    wanted, losses = plain()
    stories = run_ranks(4, trained, config_for(layout))
    assert worst(weights_of(stories), wanted) < TOLERANCE
    for story in stories:
        assert story.losses == pytest.approx(losses, rel=TOLERANCE)


def test_the_other_scale() -> None:
    wanted, _ = plain("spectral", 5)
    config = config_for("two nodes", replace(MUON_TRAIN, muon_scale="spectral"))
    assert worst(weights_of(run_ranks(4, trained, config, 5)), wanted) < TOLERANCE
    assert worst(plain("adamw_rms", 5)[0], wanted) > 0.01  # it is another one


# --- checkpoints ------------------------------------------------------------------------------------------------------


def begin(config: Config, folder: Path, steps: int) -> None:
    trainer, world = trainer_of(config), dist.get_world_size()
    trainer.initialise()
    train_steps(trainer, steps, Story())
    save(folder, trainer.steps, list(trainer.pieces()), {}, rank=dist.get_rank(), world=world, barrier=dist.barrier)


def go_on(config: Config, folder: Path, steps: int) -> Story:
    trainer, story = trainer_of(config), Story()
    trainer.load(Checkpoint(folder))
    train_steps(trainer, steps, story)
    trainer.settle()
    story.pieces = list(trainer.pieces())
    return story


@pytest.mark.parametrize(("first", "second"), [("tp", "pp"), ("hidden", "ep+tp"), ("pp", "hidden")])
def test_resumed_in_another_layout_it_ends_the_same(first: str, second: str, tmp_path: Path) -> None:
    """Half of the steps in one layout, half in the other, against a plain run of all."""
    run_ranks(4, begin, config_for(first), tmp_path, STEPS // 2)
    names = set(Checkpoint(tmp_path / f"step-{STEPS // 2}").tensors)
    kinds = {True: ("parameters", "momentum"), False: ("parameters", "exp_avg", "exp_avg_sq")}
    matrices = parameter_matrices(SMALL)
    assert names == {f"{kind}.{name}" for name, heights in matrices.items() for kind in kinds[bool(heights)]}
    stories = run_ranks(4, go_on, config_for(second), tmp_path / f"step-{STEPS // 2}", STEPS // 2)
    wanted, losses = plain()
    assert worst(weights_of(stories), wanted) < TOLERANCE
    assert stories[0].losses == pytest.approx(losses[STEPS // 2 :], rel=TOLERANCE)


def refused(config: Config, folder: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        trainer_of(config).load(Checkpoint(folder))
    return str(refusal.value)


def test_adamws_checkpoint_is_not_muons(tmp_path: Path) -> None:
    adamw = config_of(SMALL, replace(MUON_TRAIN, optimizer="adamw"), dp=2)
    run_ranks(2, begin, adamw, tmp_path, 1)
    (message,) = run_ranks(1, refused, alone(config_for("dp")), tmp_path / "step-1")
    assert message == (
        f"{tmp_path / 'step-1'} is a checkpoint of another optimizer: it keeps exp_avg, exp_avg_sq of each weight, "
        "train.optimizer = 'muon' keeps exp_avg, exp_avg_sq, momentum; resume with the one that saved it"
    )


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_state_is_four_bytes_of_a_matrix_and_eight_of_the_rest(layout: str) -> None:
    """Of a rank's shard of each group, which is padded to 16 elements a weight and 16 a rank."""
    train = TrainConfig(optimizer="muon")
    for result in on_ranks(layouts.LAYOUTS[layout], train, 1):
        wanted = 0
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, place in result.placed.items():
            groups.setdefault((place.replicas, bool(place.matrices), len(place.whole) > 1), []).append(name)
        for (_, muon, _), names in groups.items():
            ranks = result.replicas[names[0]]
            elements = sum(-(-math.prod(result.placed[name].shape) // 16) * 16 for name in names)
            wanted += (4 if muon else 8) * -(-elements // (16 * ranks)) * 16
        assert result.held["optimizer"] == wanted


def test_in_bf16_matrices_travel_in_half_the_bytes() -> None:
    sent = {}
    for dtype in ("fp32", "bf16"):
        results = on_ranks(layouts.LAYOUTS["tp in two nodes"], TrainConfig(optimizer="muon", muon_dtype=dtype), 1)  # type: ignore[arg-type]
        sent[dtype] = [
            {name: count for name, count in result.sent.items() if name.startswith("update.")} for result in results
        ]
    for whole, half in zip(sent["fp32"], sent["bf16"], strict=True):
        assert whole == {name: 2 * count for name, count in half.items()}
    assert {name.rsplit(".", 1)[1] for found in sent["fp32"] for name in found} == {
        "inter_collect", "inter_return", "intra_collect", "intra_return", "tensor_collect", "tensor_return"
    }  # fmt: skip


@pytest.mark.parametrize(("layout", "nodes"), [("dp", 4), ("two nodes", 2)])
def test_no_more_than_a_shard_is_collected(layout: str, nodes: int) -> None:
    """A rank sends each of the other nodes' ranks its shard of the weights, and less than one shard to be transformed;
    of experts nothing, whose matrices fill shards."""
    results = on_ranks(layouts.LAYOUTS[layout], TrainConfig(optimizer="muon"), 1)
    collected = 0
    for sent in (result.sent for result in results):
        shard = sent["parameters.replicated.inter_all_gather"] / (nodes - 1)
        collected += sent.get("update.replicated.inter_collect", 0)
        assert sent.get("update.replicated.inter_collect", 0) <= shard
        assert not any(name.startswith("update.experts.") for name in sent)
    assert collected


WIRES = [WireConfig(gradients="bf16"), WireConfig(gradients="fp8", parameters="bf16")]


@pytest.mark.parametrize("wire", WIRES, ids=["bf16", "fp8"])
def test_other_formats_on_the_wire_change_nothing_of_the_update(
    wire: WireConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of few digits: they arrive exact. 1e-6: other shards, other batches of equal matrices."""
    monkeypatch.setattr(layouts, "CHUNK", 200)  # at least as much as shares a scale
    train = TrainConfig(optimizer="muon")
    exact = on_ranks(layouts.LAYOUTS["two nodes"], train, 2)
    for found, wanted in zip(on_ranks(layouts.LAYOUTS["two nodes"], train, 2, wire), exact, strict=True):
        for name, weight in wanted.weights.items():
            # Weights arrive rounded: half a BF16 step, 2^-9 of an element.
            allowed = 2.0**-8 if wire.parameters == "bf16" and wanted.replicas[name] > 1 else 1e-6
            assert float((found.weights[name] - weight).norm() / weight.norm()) < allowed


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "ranks"), [("mixtral-8x7b", 2), ("deepseek-v3", 2)])
def test_every_layout_is_verified(
    preset: str, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[model]\npreset = "{preset}"\n[train]\noptimizer = "muon"\n', encoding="utf-8")
    assert main(["verify", str(path), "--nproc", str(ranks)]) == 0
    assert "all right" in capsys.readouterr().out


def test_a_dry_run_of_the_papers_model() -> None:
    """On 96 ranks a stage: 8 bytes of a matrix and 12 of the embedding, all ranks agree on every message; 1e-5 of
    padding. With attention cut over the node, its matrices travel there and back, and experts do not travel."""
    path = Path(__file__).parents[2] / "configs" / "internal-352b.toml"
    changes = ["train.optimizer=muon", "train.global_batch=12", "parallel.attention=tp", "model.layers=8"]
    config = load(path, [*changes, "parallel.pp=2"], PRESETS)
    run = dry_run(config, 192, 0)
    assert run.agreement is not None
    assert run.agreement.disagreement == ""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config.model).items()}
    stage = {name: size for name, size in sizes.items() if name.startswith(tuple(f"layers.{i}." for i in range(4)))}
    matrices = sum(size for name, size in stage.items() if "norm" not in name)
    others = sum(stage.values()) - matrices + sizes["embedding.weight"]
    assert run.rank["memory"]["optimizer"] == pytest.approx((8 * matrices + 12 * others) / 96, rel=1e-5)
    moved = {wire["op"] for wire in run.rank["wire"] if wire["op"].startswith("update.")}
    assert any(op.startswith("update.tensor.tensor_") for op in moved)
    assert not any(op.startswith("update.experts.") for op in moved)
