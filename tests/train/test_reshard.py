"""A checkpoint of any layout continues in any other: the same bits in, the same losses out.

What a rank holds of a weight, and which shard of that it saves, is cut anew by every strategy: heads, gate and up rows
of experts, rows of the vocabulary, layers by stage, flat ranges by replica. The files only know places in whole
tensors. So each state is saved in three layouts that cut it in all these ways, loaded in all layouts, saved there
again, and compared tensor by tensor; then training goes on and must not notice. The second model goes to those layouts
that cut its latent projections or share its embedding between stages.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.checkpoint import Checkpoint, SaveError, TensorPiece, save
from megascale_moe.checkpoint.boxes import Box, flat_range
from megascale_moe.checkpoint.manifest import MANIFEST, Manifest, StoredTensor
from megascale_moe.config import Config, ConfigError
from megascale_moe.model.counts import parameter_shapes
from megascale_moe.strategies.model import buffer_shapes
from megascale_moe.testing import run_ranks
from megascale_moe.train.trainer import Trainer
from tests.train.short_runs import MODEL, TRAIN, Story, config_of, mesh_for, train_steps, trainer_of

# Float32 sums in another order: some 2^-24 of a loss near 4, and two updates from there; see test_pipeline.py.
LOSS = 1e-5
SAVED = 2  # steps before the checkpoint, so that the moments of both are in it
MORE = {"A": 2, "D": 1, "F": 1}  # steps after it, by source: the first shows the weights, the second all the rest

UNTIED = replace(
    MODEL, layers=4, kv_heads=4, experts=8, score="sigmoid", correction_bias=True, bias_update_rate=0.01,
    shared_experts=1, dense_layers=2, dense_ffn_hidden=24,
)  # fmt: skip
MODELS = {
    "untied": UNTIED,
    "tied-mla": replace(
        UNTIED, tied_embeddings=True, attention="mla", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4,
    ),
}  # fmt: skip
INTERLEAVED = {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "A": {},
    "B": {"pp": 2, "dp": 2},
    "C": {"node": 4, "ep": 4, "dispatch": "all_to_all"},
    "D": {"node": 4, "attention": "tp", "ffn": "tp", "vocabulary": "sharded"},
    "E": {"node": 4, "ffn": "ep+tp", "ep": 2, "etp": 2, "dispatch": "all_to_all"},
    "F": {**INTERLEAVED, "node": 2, "attention": "tp", "ep": 2},
    "G": {"dp": 2, "node": 2, "ep": 4},
    "I": {"cp": 2, "node": 2, "attention": "cp", "ep": 2, "vocabulary": "sharded"},
    "H": {"pp": 2, "stage_layers": (1, 3), "schedule": "zero_bubble", "node": 2, "vocabulary": "sharded", "ep": 2},
}
SOURCES = tuple(MORE)
CASES = [("untied", layout) for layout in LAYOUTS] + [("tied-mla", layout) for layout in "DFH"]


def config_for(model: str, layout: str) -> Config:
    """Micro-batches of one row through a pipeline, else all rows at once."""
    return config_of(MODELS[model], replace(TRAIN, clip_norm=1.0, micro_batch=0), **LAYOUTS[layout])


def on_ranks(config: Config, function: Any, *arguments: Any) -> list[Any]:
    world = mesh_for(config).world
    return run_ranks(world, function, config, *arguments) if world > 1 else [function(config, *arguments)]


def save_to(folder: Path, trainer: Trainer, pieces: Sequence[TensorPiece] | None = None) -> None:
    world = trainer.mesh.world
    save(
        folder, trainer.steps, list(trainer.pieces()) if pieces is None else pieces, {"note": "short"},
        rank=dist.get_rank() if world > 1 else 0, world=world, barrier=dist.barrier if world > 1 else lambda: None,
    )  # fmt: skip


def begin(config: Config, folder: Path, more: int) -> list[float]:
    """Train, save, and go on: the losses behind the checkpoint."""
    trainer, story = trainer_of(config), Story()
    trainer.initialise()
    train_steps(trainer, SAVED, story)
    save_to(folder, trainer)
    train_steps(trainer, more, story)
    return story.losses[SAVED:]


def go_on(config: Config, root: Path, layout: str) -> dict[str, list[float]]:
    """Load what each source saved, one after the other into one trainer, save it again and go on."""
    trainer = trainer_of(config)
    losses = {}
    for source in SOURCES:
        story = Story()
        trainer.load(Checkpoint(root / source / f"step-{SAVED}"))
        save_to(root / f"{source}-{layout}", trainer)
        train_steps(trainer, MORE[source], story)
        losses[source] = story.losses
    return losses


@dataclass(frozen=True)
class Saved:
    """Checkpoints of one model by layout, and the losses that follow them there."""

    model: str
    root: Path
    losses: dict[str, list[float]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All of a checkpoint, whole."""
        checkpoint = Checkpoint(self.root / name / f"step-{SAVED}")
        checkpoint.verify()
        return {name: checkpoint.read(name, (0,) * len(shape), shape) for name, shape in checkpoint.tensors.items()}


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Nothing here is killed, and forcing some hundred files to the disk takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def saved_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The checkpoints of a model, made when first asked for."""

    @functools.cache
    def make(model: str) -> Saved:
        root, losses = tmp_path_factory.mktemp(model), {}
        for source in SOURCES:
            losses[source], *others = on_ranks(config_for(model, source), begin, root / source, MORE[source])
            assert all(other == losses[source] for other in others)
        return Saved(model, root, losses)

    return make


@pytest.fixture
def saved(model: str, saved_of: Callable[[str], Saved]) -> Saved:
    return saved_of(model)


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_holds_everything(saved: Saved) -> None:
    """Every expert, both moments, every correction bias: there, and not zero."""
    config = MODELS[saved.model]
    for source in SOURCES:
        state = saved.tensors(source)
        shapes = parameter_shapes(config)
        wanted = {f"{kind}.{name}" for kind in ("parameters", "exp_avg", "exp_avg_sq") for name in shapes}
        assert state.keys() == wanted | {f"buffers.{name}" for _, name, _ in buffer_shapes(config)}
        assert [name for name, value in state.items() if not value.any()] == []
        stacks = {name: value for name, value in state.items() if ".experts." in name}
        assert len(stacks) == 3 * 2 * 2  # kinds, w13 and w2, layers with experts
        assert all(value.flatten(1).any(1).all() for value in stacks.values())


@pytest.mark.parametrize("model", MODELS)
def test_the_sources_trained_alike(saved: Saved) -> None:
    for source in SOURCES[1:]:
        assert errors(saved.losses[source], saved.losses["A"][: MORE[source]]) < LOSS


def errors(ours: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_loaded_and_saved_again_is_the_same(saved: Saved, layout: str) -> None:
    losses, *others = on_ranks(config_for(saved.model, layout), go_on, saved.root, layout)
    assert all(other == losses for other in others)
    for source in SOURCES:
        before, after = saved.tensors(source), saved.tensors(f"{source}-{layout}")
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        wanted = saved.losses[source][: MORE[source]]
        assert errors(losses[source], wanted) < LOSS
        if source == layout:  # the same layout again: nothing is rounded another way
            assert losses[source] == wanted


# --- what is missing or doubled --------------------------------------------------------------------------------------


def without(piece: TensorPiece, expert: int) -> list[TensorPiece]:
    """A piece of a stack of experts without one of them."""
    if not (".experts." in piece.name and piece.offset[0] <= expert < piece.offset[0] + piece.size[0]):
        return [piece]
    return [part for part in by_expert(piece) if part.offset[0] != expert]


def by_expert(piece: TensorPiece) -> list[TensorPiece]:
    """The same elements as pieces of one expert each."""
    parts, begin = [], 0
    for box in flat_range(Box(piece.offset, piece.size), piece.start, len(piece.values)):
        values = piece.values[begin : begin + box.volume].view(box.size)
        begin += box.volume
        for index, slab in enumerate(values):
            offset = (box.offset[0] + index, *box.offset[1:])
            parts.append(TensorPiece(piece.name, piece.shape, offset, (1, *box.size[1:]), 0, slab.flatten()))
    return parts


def save_damaged(config: Config, folder: Path, doubled: bool) -> str:
    """Save without expert 3, or with it twice; what a rank is told."""
    trainer = trainer_of(config)
    trainer.initialise()
    pieces = []
    for piece in trainer.pieces():
        kept = without(piece, 3)
        pieces += kept
        if doubled and kept != [piece]:
            pieces += 2 * [part for part in by_expert(piece) if part.offset[0] == 3]
    with pytest.raises(SaveError) as caught:
        save_to(folder, trainer, pieces)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["A", "E", "F"])
@pytest.mark.parametrize(("doubled", "word"), [(False, "is missing"), (True, "is there 2 times")])
def test_an_incomplete_or_doubled_expert_is_not_saved(tmp_path: Path, layout: str, doubled: bool, word: str) -> None:
    """By a strategy whose parts do not cover its weights, say: every rank is told which expert."""
    config = config_for("untied", layout)
    for message in on_ranks(config, save_damaged, tmp_path / "checkpoints", doubled):
        # The first layer with experts of the first rank.
        assert re.search(rf"parameters\.layers\.[23]\.ffn\.experts\.w13: expert 3 {word} \(", message)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("model", ["untied"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("doubled", "word"), [(False, "is missing"), (True, "is there 2 times")])
def test_an_incomplete_or_doubled_expert_is_not_loaded(
    saved: Saved, tmp_path: Path, source: str, doubled: bool, word: str
) -> None:
    """A manifest that agrees with its checksum but says too little or too much of an expert."""
    manifest = Manifest.read(saved.root / source / f"step-{SAVED}" / MANIFEST)
    name = "exp_avg.layers.2.ffn.experts.w2"
    stack = manifest.tensors[name]
    pieces = []
    for piece in stack.pieces:
        at = piece.at
        for box in piece.boxes():
            for index in range(box.size[0]):
                length = box.volume // box.size[0]
                expert = box.offset[0] + index
                part = replace(
                    piece, offset=(expert, *box.offset[1:]), size=(1, *box.size[1:]), start=0, length=length,
                    at=at + 4 * index * length,
                )  # fmt: skip
                pieces += [part] * (1 if expert != 3 else 2 if doubled else 0)
            at += 4 * box.volume
    manifest.tensors[name] = StoredTensor(stack.shape, stack.dtype, pieces)
    manifest.write(tmp_path / MANIFEST)
    with pytest.raises(ConfigError, match=f"{name}: expert 3 {word}".replace(".", r"\.")):
        Checkpoint(tmp_path)
