"""Embedding, head and loss: whole on every rank for its own tokens, or sharded by vocabulary over the ranks of a node.

Sharded, each rank has the rows of V / n tokens of the vocabulary. The embedding looks up what it has, for all tokens of
the node, and a reduce-scatter adds up and deals out; the head sees all tokens and a part of their logits, and one small
all-gather of three numbers per token (largest logit, sum of exponentials, the target's logit) makes the softmax whole.
Logits are kept between the two halves, n times narrower than those of the whole vocabulary: a second product instead
would cost more than the memory does. Tokens are in rank order, [n * tokens]: a rank's own are its slice of every row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending, all_gather, tag_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.config.refusals import divides
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import FREE, Cost, Op, product
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.cross_entropy import (
    combine_statistics,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    partial_statistics,
    sharded_slope,
)
from megascale_moe.model.weights import Weight
from megascale_moe.strategies.collective import gather_tokens, scatter_sums
from megascale_moe.strategies.layer import pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Placement, rows, share
from megascale_moe.strategies.strategy import Head, Rules, VocabularyStrategy

TABLE = ("embedding.weight",)
LOSS = Value("loss", (), torch.float32, keep=Keep.FULL)
GATHERED = Rows("gathered", "node")


class Replicated(VocabularyStrategy):
    """The whole vocabulary on every rank: no communication."""

    name = "replicated"
    title = "vocabulary replicated"

    def embedding_ops(self, y: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
            sink.value().index_add_(0, tokens, d.to(sink.buffer.dtype))

        cost = Cost(memory_bytes=2 * y.nbytes)
        op = Op("embedding", ("tokens",), (y,), lambda tokens, w: w.index_select(0, tokens), weights=TABLE, cost=cost)
        return [op.weight_gradient(("tokens", grad(y)), weight_gradient)]

    def head_ops(self, weight: str, head: Head, x: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        (T, hidden), vocab, weights = x.shape, model.vocab, (weight,)
        products = 3 if head == "train" else 1
        memory = products * vocab * hidden * x.dtype.itemsize + 2 * x.nbytes
        cost = product(T, vocab, hidden, memory, products)
        if head == "logits":
            logits = Value("logits", (T, vocab), torch.float32, keep=Keep.FULL)
            return [Op("head", (x,), (logits,), lambda x, w: (x @ w.t()).float(), weights=weights, cost=cost)]

        def loss(x: Tensor, targets: Tensor, w: Tensor) -> Tensor:
            return linear_cross_entropy_loss(x, w, targets)

        def train(x: Tensor, targets: Tensor, scale: float, w: Tensor, sink: Gradient) -> tuple[Any, ...]:
            """Compute the loss with both gradients at once: a block of logits is best used while it is in cache."""
            return linear_cross_entropy(x, w, targets, scale, sink.add_mm)

        if head == "loss":
            return [Op("head", (x, "targets"), (LOSS,), loss, weights=weights, cost=cost)]
        reads, slope = (x, "targets", "loss_scale"), x.named("final.slope")
        op = Op("head", reads, (LOSS, slope), train, weights=weights, gradients=weights, cost=cost)
        return [op.input_gradient((x,), (slope,), lambda slope: slope, cost=FREE)]


class Sharded(Replicated):
    """Rows of the vocabulary over the ranks of a node; on one rank the same as replicated."""

    name = "sharded"
    title = "vocabulary sharded over the ranks of a node"

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        divides("model.vocab", model.vocab, "parallel.node", mesh.node, " (or parallel.vocabulary = 'replicated')")

    def gathers_tokens(self, layout: Layout) -> bool:
        return layout.node.size > 1

    def rules(self, model: ModelConfig, layout: Layout) -> Rules:
        if not self.gathers_tokens(layout):
            return {}
        replicas = ("", "tied" if model.tied_embeddings else "tensor_data")

        def mine(weight: Weight) -> Placement:
            return rows(weight.shape, [_share(model, layout)], replicas)

        return {"embedding.weight": mine, "head.weight": mine}

    def embedding_ops(self, y: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        if not self.gathers_tokens(layout):
            return super().embedding_ops(y, model, layout)
        node, (piece,), mine = layout.node, pieces_of(layout.node, 1), _share(model, layout)
        shape, shard = (layout.tokens * node.size, model.hidden), Shard(("hidden_0",), GATHERED, partial="node")
        partial = Value("embedding_partial", shape, y.dtype, shard=shard, keep=Keep.FULL)

        def local(tokens: Tensor) -> tuple[Tensor, Tensor]:
            """Return rows of this rank's part of the table, and which tokens are there."""
            row = tokens - mine.start
            return row.clamp(0, len(mine) - 1), ((row >= 0) & (row < len(mine)))[:, None]

        def run(tokens: Tensor, weight: Tensor) -> Tensor:
            row, here = local(tokens)
            return weight.index_select(0, row) * here

        def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
            row, here = local(tokens)
            sink.value().index_add_(0, row, (d * here).to(sink.buffer.dtype))

        cost = Cost(memory_bytes=2 * partial.nbytes)
        look_up = Op("embedding", ("tokens",), (partial,), run, weights=TABLE, cost=cost)
        look_up = look_up.weight_gradient(("tokens", grad(partial)), weight_gradient)
        return [look_up, scatter_sums(layout, "scatter_embedding", partial, y, piece)]

    def head_ops(self, weight: str, head: Head, x: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        """Logits are [n * tokens, V / n], float32 where they are the result."""
        if not self.gathers_tokens(layout):
            return super().head_ops(weight, head, x, model, layout)
        node, (piece,), mine = layout.node, pieces_of(layout.node, 1), _share(model, layout)
        T = layout.tokens * node.size
        shard = Shard(("final",), GATHERED, partial_gradient="node")
        everyone = Value("final_ag", (T, model.hidden), layout.dtype, shard=shard, keep=Keep.FULL)
        gather = gather_tokens(layout, "gather_final", x, everyone, piece)
        name, dtype = ("logits", torch.float32) if head == "logits" else ("head_logits", layout.dtype)
        logits = Value(name, (T, len(mine)), dtype, shard=Shard((), GATHERED, (mine,)), keep=Keep.FULL)
        multiply = Op(
            "head_product", (everyone,), (logits,), lambda x, w: (x @ w.t()).to(dtype), weights=(weight,),
            cost=_product(everyone, logits, 1),
        )  # fmt: skip
        if head == "logits":
            return [gather, multiply]
        part = Value("head_part", (T, 3), torch.float32, keep=Keep.FULL)
        statistics = Op(
            "head_statistics", (logits, "targets"), (part,), cost=Cost(memory_bytes=logits.nbytes),
            run=lambda logits, targets: partial_statistics(logits, targets, mine.start),
        )  # fmt: skip
        normalizer = Value("head_normalizer", (T, 2), torch.float32, shard=Shard((), GATHERED), keep=Keep.FULL)

        def run_gather(part: Tensor) -> Pending:
            return all_gather(part[None], node, tag_of("gather_statistics")).then(combine_statistics)

        gather_statistics = Op(
            "gather_statistics", (part,), (normalizer,), run_gather, stream=layout.stream(node),
            cost=Cost(wire_bytes=part.nbytes * (node.size - 1), axis=node.name),
        )  # fmt: skip
        loss = _loss(weight, head, (everyone, logits, normalizer), layout)
        return [gather, multiply, statistics, gather_statistics, loss]


REPLICATED, SHARDED = Replicated(), Sharded()


def _share(model: ModelConfig, layout: Layout) -> range:
    """Return the tokens of the vocabulary whose rows are here."""
    return share(model.vocab, layout.node.size, layout.node.index)


def _product(x: Value, logits: Value, products: int) -> Cost:
    (T, hidden), V = x.shape, logits.shape[1]
    return product(T, V, hidden, x.dtype.itemsize * (products * V * hidden + T * hidden + T * V), products)


def _loss(weight: str, head: Head, given: tuple[Value, Value, Value], layout: Layout) -> Op:
    """Compute the loss of the own tokens; in training also both gradients of the head."""
    x, logits, normalizer = given
    first = layout.node.index * int(logits.shape[1])
    mine = share(layout.tokens * layout.node.size, layout.node.size, layout.node.index)
    own = slice(mine.start, mine.stop)

    def of_own(normalizer: Tensor, targets: Tensor) -> Tensor:
        log_sum, chosen = normalizer[own].unbind(-1)
        return ((log_sum - chosen) * (targets[own] >= 0)).sum()

    def train(
        x: Tensor, logits: Tensor, normalizer: Tensor, targets: Tensor, scale: float, w: Tensor, sink: Gradient
    ) -> tuple[Tensor, Tensor]:
        slope = sharded_slope(logits, normalizer[:, 0], targets, first, scale)
        sink.add_mm(slope.t(), x)
        return of_own(normalizer, targets), slope @ w

    if head == "loss":
        return Op("head", (normalizer, "targets"), (LOSS,), of_own)
    shard = Shard(("final.slope",), GATHERED, partial="node")
    slope = Value("final_ag.slope", x.shape, x.dtype, shard=shard, keep=Keep.FULL)
    reads, weights = (*given, "targets", "loss_scale"), (weight,)
    op = Op("head", reads, (LOSS, slope), train, weights=weights, gradients=weights, cost=_product(x, logits, 2))
    return op.input_gradient((x,), (slope,), lambda slope: slope, cost=FREE)
