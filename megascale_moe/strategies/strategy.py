"""What a strategy is: one object that says all that the rest of the house needs to know of it.

    AttentionStrategy    how a layer's attention is shared out over ranks
    FFNStrategy          how its experts and its plain FFNs are
    DispatchForm         how tokens get to their experts and back
    VocabularyStrategy   how embedding, head and loss are

Each has a name (the user's word in `[parallel]`), a title for people, a refusal of models and meshes that it does not
fit, its operators, which declare their values, and the weights that it cuts. `registry.py` lists the objects; config
checks, the planner's space, the layouts that `verify` runs, reports and documents read that list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.op import Op
from megascale_moe.engine.value import Value
from megascale_moe.model.weights import Weight
from megascale_moe.strategies.placement import Placement
from megascale_moe.strategies.slices import Slices

if TYPE_CHECKING:
    from megascale_moe.strategies.layer import Layer
    from megascale_moe.strategies.layout import Layout
    from megascale_moe.strategies.row_maps import Routing

Rule = Callable[[Weight], Placement]
"""From what a weight is to this rank's part of it."""

Rules = Mapping[str, Rule]
"""By a weight's name inside its layer; weights without a rule lie whole on every rank."""

Head = Literal["train", "loss", "logits"]


class Strategy:
    """What all strategies have in common.

    Attributes:
        name: the user's word. title: what it is, in the field's words, as in "sequence-parallel attention".
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        """Refuse what it does not fit.

        Raises:
            ConfigError: one line with what is wrong, where, and what would be right.
        """

    def rules(self, model: ModelConfig, layout: Layout) -> Rules:
        """Return where the weights lie that it cuts."""
        return {}


class AttentionStrategy(Strategy):
    """From a layer's normed input to the result of its attention.

    Attributes:
        zigzag: whether the ranks of a node hold an early and a late chunk of every sequence each (`slices.Slices`).
    """

    zigzag: ClassVar[bool] = False

    def ops(self, layer: Layer, x: Value) -> tuple[list[Op], Value]:
        """Return the operators from x [tokens, hidden] to the attention's result, [tokens, hidden]."""
        raise NotImplementedError

    def slices(self, layout: Layout) -> Slices:
        """Return how the ranks of a layout share out the tokens of a micro-batch between modules."""
        node = layout.node.size
        return Slices(layout.rows, layout.length, node, self.zigzag and node > 1, layout.cp.size)

    def rope_axis(self, layout: Layout, model: ModelConfig) -> str:
        """Return the axis whose ranks' tokens rotary embedding is applied to, "node" or "sequence"; "": the own ones.
        """
        return ""


class FFNStrategy(Strategy):
    """Where experts lie: ep ranks share them out by index, etp ranks each expert's width.

    Attributes:
        shares_width: whether dense and shared FFNs have their width over etp ranks, too.
    """

    shares_width: ClassVar[bool] = False

    def asked(self, parallel: ParallelConfig) -> int:
        """Return how many ranks a config asks for to share one set of all experts; 0 if it leaves that open."""
        return parallel.ep * parallel.etp

    def sizes(self, parallel: ParallelConfig, node: int, stage: int) -> tuple[int, int]:
        """Return (ep, etp) of a layout, worked out where the config leaves them open.

        Raises:
            ConfigError: sizes that do not fit the ranks of a stage.
        """
        raise NotImplementedError

    def pays(self, node: int) -> bool:
        """Return whether a search tries it on nodes of so many ranks."""
        return True

    def etp_choices(self, machine: int) -> Sequence[int]:
        """Return the values of `parallel.etp` that a search tries, where so many GPUs share a fast link."""
        return [1]

    def ep_choices(self, node: int, stage: int, etp: int) -> Sequence[int]:
        """Return the values of `parallel.ep` that a search tries for nodes and pipeline stages of so many ranks."""
        raise NotImplementedError

    def words(self, parallel: ParallelConfig) -> str:
        """Return the strategy with its sizes, as a table has room for."""
        raise NotImplementedError


class DispatchForm(Strategy):
    """How tokens get to their experts and back.

    Attributes:
        travels: whether each routed row travels on its own, so that message sizes follow from routing.
    """

    travels: ClassVar[bool] = False

    def axis(self, layout: Layout) -> Axis:
        """Return the axis along which it is cut by peer."""
        raise NotImplementedError

    def ops(self, layer: Layer, x: Value, routing: Routing) -> tuple[list[Op], Value]:
        """Return the operators from x [tokens, hidden] to the sum of each token's experts, [tokens, hidden]."""
        raise NotImplementedError

    def rows(self, top_k: int, ep: int, etp: int, relative_cost: float) -> float:
        """Return what a rank sends per token and way, in rows of the hidden size.

        Args:
            relative_cost: time per byte of an all-to-all over that of all-gather and reduce-scatter.
        """
        raise NotImplementedError


class VocabularyStrategy(Strategy):
    """From tokens to the first hidden state, and from the last one to the loss."""

    def embedding_ops(self, y: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        """Return the operators from "tokens" to y [tokens, hidden]."""
        raise NotImplementedError

    def head_ops(self, weight: str, head: Head, x: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        """Return the operators from x [tokens, hidden] to "loss" (and its gradients in training), or to "logits"."""
        raise NotImplementedError

    def gathers_tokens(self, layout: Layout) -> bool:
        """Return whether a rank reads the tokens and targets of all ranks of its node, in rank order."""
        return False


class Strategies(NamedTuple):
    """The strategy of each module of a layout."""

    attention: AttentionStrategy
    ffn: FFNStrategy
    dispatch: DispatchForm
    vocabulary: VocabularyStrategy
