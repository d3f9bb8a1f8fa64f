"""What an optimizer is, apart from where its numbers lie and how they travel.

A rule says which state it keeps for an element of a weight, how a flat shard of weights is updated from the summed
gradients, and what that costs. Everything else reads these: the sharded buffers (`sharded.py`), checkpoints, the
planner's and the dry run's bytes, and `megascale verify`, which compares the sharded update with the rule's own plain
form on whole weights.

Most rules work element by element, so that a shard may cut a weight anywhere. One that needs whole matrices
(`MatrixRule`) gets them in the middle of its update: `whole.py` collects the parts of a matrix on one rank, and gives
back what the rule makes of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost


@dataclass(frozen=True)
class State:
    """One number that a rule keeps for every element of a weight.

    Attributes:
        name: what checkpoints call it, such as "exp_avg"; without a dot. signed: whether it may be negative.
    """

    name: str
    dtype: torch.dtype = torch.float32
    signed: bool = True


@dataclass
class WeightShard:
    """The elements of a group of weights that this rank updates.

    Attributes:
        master: exact weights, float32 [S]. state: by name, each [S], zeros before the first update.
        count: updates done, float32 []; a rule that reads it adds one in `update`. decay: whether weights decay.
    """

    master: Tensor
    state: dict[str, Tensor]
    count: Tensor
    decay: bool


@dataclass
class Whole:
    """One weight of the model as a single device has it, to say plainly what an update is.

    Attributes:
        weight, gradient: float32, of the weight's shape. state: by name, of the same shape, before the update.
        matrices: see `Placement.matrices`. count: updates done. decay: whether the weight decays.
    """

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    matrices: tuple[int, ...] = ()
    count: int = 0
    decay: bool = True


class Rule(ABC):
    """How weights follow from their gradients. A rule has no numbers of its own, so one object serves all groups.

    Attributes:
        name: what the config calls it (`train.optimizer`). state: what it keeps.
    """

    name: str
    state: tuple[State, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of state for an element of a weight, the exact weight itself not included."""
        return sum(state.dtype.itemsize for state in self.state)

    def of(self, matrices: tuple[int, ...]) -> Rule:
        """Return the rule for a weight that consists of these matrices (`Placement.matrices`): this one or another."""
        return self

    @abstractmethod
    def update(self, shard: WeightShard, change: Tensor, rate: float, config: TrainConfig) -> None:
        """Update the master weights and the state of a shard in place.

        Args:
            change: float32 [S], the summed gradients after clipping, or what a `MatrixRule` has made of them; it may be
                overwritten. rate: the learning rate of this step.
        """

    @abstractmethod
    def cost(self, elements: int) -> Cost:
        """Return the memory traffic (and FLOPs, where they count) of `update` for so many elements."""

    @abstractmethod
    def plain(self, whole: Whole, rate: float, config: TrainConfig) -> Tensor:
        """Return a whole weight after one update, float32: what all ranks together must come to, in plain PyTorch.

        The same calculation written a second time for reading and for tests; nothing in it is sharded or in place.
        """

    def comparable(self, config: TrainConfig) -> TrainConfig:
        """Return the config with which two updates from nearly equal gradients are nearly equal; for `verify`."""
        return config


class MatrixRule(Rule):
    """A rule whose update needs whole matrices: element by element, matrix by matrix, then element by element again.

    It is only ever asked to update weights that are matrices; `of` must send others to another rule.
    """

    @abstractmethod
    def prepare(self, shard: WeightShard, gradient: Tensor, config: TrainConfig) -> Tensor:
        """Return what matrices are made of, float32 [S], and update the state; `gradient` [S] may be overwritten.

        What lies between the weights of a shard is zero, and must come out as zero.
        """

    @abstractmethod
    def transform(self, matrices: Tensor, config: TrainConfig) -> Tensor:
        """Return what becomes of some whole matrices, [count, rows, columns] in `dtype`, which may be overwritten."""

    @abstractmethod
    def dtype(self, device: torch.device, config: TrainConfig) -> torch.dtype:
        """Return the dtype in which matrices are transformed, and travel to where that is done and back."""

    @abstractmethod
    def prepare_cost(self, elements: int) -> Cost:
        """Return the memory traffic of `prepare` for so many elements."""

    @abstractmethod
    def transform_cost(self, rows: int, columns: int) -> Cost:
        """Return the FLOPs and memory traffic of `transform` for one matrix; ranks are balanced by its FLOPs."""
