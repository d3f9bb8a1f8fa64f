"""Training without files: a `Trainer` on forked ranks, fed with rows that are made up, and what each rank saw of it.

Whole command-line runs (runs.py) take a second each and hide the weights behind a checkpoint; these take tenths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # autograd imports it at its first use, 0.4 s in every rank
from torch import Tensor

from megascale_moe.checkpoint import TensorPiece
from megascale_moe.checkpoint.boxes import Box, flat_range
from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megascale_moe.data import IGNORE, TokenRow, micro_batches
from megascale_moe.pipeline.batches import micro_batch
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.testing import run_ranks
from megascale_moe.train.config_file import choices
from megascale_moe.train.trainer import Trainer

MODEL = ModelConfig(
    layers=2, hidden=16, heads=4, kv_heads=2, experts=4, top_k=2, ffn_hidden=16, vocab=48, sequence_length=16,
    balance_loss=0.02, z_loss=0.001, init_std=0.2,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=30, global_batch=4, micro_batch=1, learning_rate=5e-3, warmup=2, lr_schedule="constant", clip_norm=0.0,
    device="cpu", compile="off",
)  # fmt: skip


@dataclass
class Story:
    """What one rank saw; all but the pieces should be the same on every rank.

    Attributes:
        loads: tokens per expert, int64 [layers, experts] of every step.
        pieces: its part of the state at the end.
    """

    losses: list[float] = field(default_factory=list)
    auxiliary: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    evaluation: float = 0.0
    sample: list[int] = field(default_factory=list)
    pieces: list[TensorPiece] = field(default_factory=list)


def config_of(model: ModelConfig = MODEL, train: TrainConfig = TRAIN, **parallel: object) -> Config:
    """A checked config; sizes of the mesh that are not given are 1."""
    sizes = {"dp": 1, "node": 1, "ep": 1} | parallel
    if sizes.get("ffn") == "tp":
        sizes["etp"] = sizes["node"]
    config = Config(model=model, parallel=ParallelConfig(**sizes), train=train)  # type: ignore[arg-type]
    config.check(choices())
    return config


def mesh_for(config: Config) -> Mesh:
    """As the command line makes it."""
    p = config.parallel
    return mesh_of(p, config.model, p.pp * p.dp * p.cp * p.node)


def rows_of(model: ModelConfig, count: int, seed: int) -> list[TokenRow]:
    """Rows of a noisy progression, which a model can learn, every second one of two documents."""
    chooser, length = np.random.default_rng(seed), model.sequence_length
    rows = []
    for index in range(count):
        start, noise = chooser.integers(model.vocab), chooser.integers(0, 3, length + 1)
        stream = (start + 5 * np.arange(length + 1) + noise) % model.vocab
        targets = stream[1:].copy()
        starts = np.array([0] if index % 2 else [0, int(chooser.integers(1, length))])
        targets[starts[1:] - 1] = IGNORE
        rows.append(TokenRow(stream[:-1], targets, starts))
    return rows


def trainer_of(config: Config) -> Trainer:
    """This rank's trainer, without weights."""
    mesh = mesh_for(config)
    return Trainer(config, mesh, connect(mesh) if mesh.world > 1 else single(), torch.device("cpu"))


def own(rows: Sequence[TokenRow], trainer: Trainer) -> list[TokenRow]:
    """The share of the rank's data-parallel place."""
    mesh = trainer.mesh
    place = mesh.replica(dist.get_rank() if mesh.world > 1 else 0)
    share = len(rows) // mesh.dp
    return list(rows[place * share : (place + 1) * share])


def train_steps(trainer: Trainer, count: int, story: Story) -> None:
    """So many more steps."""
    micro = micro_batch(trainer.config, trainer.mesh)
    for _ in range(count):
        rows = rows_of(trainer.model, trainer.config.train.global_batch, trainer.steps)
        targets = sum(int((row.targets != IGNORE).sum()) for row in rows)
        result = trainer.step(micro_batches(own(rows, trainer), micro), targets)
        story.losses.append(result.loss)
        story.auxiliary.append(result.auxiliary)
        story.norms.append(result.grad_norm)
        story.loads.append(result.load)


def tell(config: Config, steps: int) -> Story:
    """Train from the seed, evaluate, generate: on one rank of the layout."""
    trainer, story = trainer_of(config), Story()
    trainer.initialise()
    train_steps(trainer, steps, story)
    held_out = rows_of(config.model, 4, 1000)
    targets = sum(int((row.targets != IGNORE).sum()) for row in held_out)
    story.evaluation = trainer.evaluate(micro_batches(own(held_out, trainer), 1), targets)
    story.sample = trainer.generate([1, 6, 11], 3, end=-1)
    story.pieces = list(trainer.pieces())
    return story


def stories(config: Config, steps: int) -> list[Story]:
    """Of all ranks; a lone one runs in this process, which has one thread like every forked rank (conftest.py)."""
    world = mesh_for(config).world
    if world == 1:
        assert torch.get_num_threads() == 1  # with more, sums have another order
        return [tell(config, steps)]
    return run_ranks(world, tell, config, steps)


def alone(config: Config) -> Config:
    """The same training on one rank without a pipeline."""
    return replace(config, parallel=ParallelConfig(dp=1, node=1, ep=1))


def state_of(parts: Sequence[Story]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of all ranks' pieces, float32; each element must be there exactly once."""
    state: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for piece in (piece for part in parts for piece in part.pieces):
        whole = state.setdefault(piece.name, torch.zeros(piece.shape))
        seen = times.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.int))
        begin = 0
        for box in flat_range(Box(piece.offset, piece.size), piece.start, len(piece.values)):
            where = box.slices((0,) * len(piece.shape))
            whole[where] = piece.values[begin : begin + box.volume].view(box.size)
            seen[where] += 1
            begin += box.volume
    assert [name for name, seen in times.items() if not (seen == 1).all()] == []
    return state


def same_on_every_rank(parts: Sequence[Story]) -> None:
    """Whatever a rank reports, and rank 0 alone writes to the metrics, is of the whole job."""
    first = parts[0]
    for other in parts[1:]:
        assert (other.losses, other.auxiliary, other.norms) == (first.losses, first.auxiliary, first.norms)
        assert all(torch.equal(a, b) for a, b in zip(other.loads, first.loads, strict=True))
        assert (other.evaluation, other.sample) == (first.evaluation, first.sample)
