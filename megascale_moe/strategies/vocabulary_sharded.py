"""Embedding, head and loss sharded by vocabulary over the ranks of a node.

Each rank has the rows of V / n tokens of the vocabulary. The embedding looks up what it has, for all tokens of the
node, and a reduce-scatter adds up and deals out; the head sees all tokens and a part of their logits, and one small
all-gather of three numbers per token (largest logit, sum of exponentials, the target's logit) makes the softmax whole.
Logits are kept between the two halves, n times narrower than those of the whole vocabulary: a second product instead
would cost more than the memory does.

Tokens are in rank order, [n * tokens]: a rank's own are its slice of every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending, all_gather, tag_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, product
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.cross_entropy import combine_statistics, partial_statistics, sharded_slope
from megascale_moe.model.weights import Weight
from megascale_moe.strategies.collective import gather_tokens, scatter_sums
from megascale_moe.strategies.layer import pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Placement, rows, share
from megascale_moe.strategies.refusals import divides
from megascale_moe.strategies.strategy import Head, Rules, VocabularyStrategy
from megascale_moe.strategies.vocabulary_replicated import whole_embedding, whole_head

GATHERED = Rows("gathered", "node")


def embedding_ops(y: Value, c: ModelConfig, layout: Layout) -> list[Op]:
    """tokens int64 [n * tokens] -> y [tokens, hidden]."""
    node = layout.node
    size = c.vocab // node.size
    (piece,) = pieces_of(node, 1)
    shard = Shard(("hidden_0",), GATHERED, partial="node")
    partial = Value("embedding_partial", (layout.tokens * node.size, c.hidden), y.dtype, shard=shard, keep=Keep.FULL)
    cost = Cost(memory_bytes=2 * partial.nbytes)

    def run(tokens: Tensor, weight: Tensor) -> Tensor:
        local = tokens - node.index * size
        mine = (local >= 0) & (local < size)
        return weight.index_select(0, local.clamp(0, size - 1)) * mine[:, None]

    def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
        local = tokens - node.index * size
        mine = (local >= 0) & (local < size)
        sink.value().index_add_(0, local.clamp(0, size - 1), (d * mine[:, None]).to(sink.buffer.dtype))

    backward = Op(
        name="embedding", phase=Phase.W, reads=("tokens", grad(partial)), writes=(), gradients=("embedding.weight",),
        run=weight_gradient, cost=cost,
    )
    look_up = Op(
        name="embedding", reads=("tokens",), writes=(partial,), weights=("embedding.weight",), cost=cost, run=run,
        backward=(backward,),
    )
    return [look_up, scatter_sums(layout, "scatter_embedding", partial, y, piece)]


def head_ops(weight: str, head: str, x: Value, c: ModelConfig, layout: Layout) -> list[Op]:
    """x [tokens, hidden] -> "loss" of this rank's targets, or "logits" [n * tokens, V / n] for head "logits"."""
    node, dtype = layout.node, layout.dtype
    (piece,) = pieces_of(node, 1)
    T = layout.tokens * node.size
    shard = Shard(("final",), GATHERED, partial_gradient="node")
    everyone = Value("final_ag", (T, c.hidden), dtype, shard=shard, keep=Keep.FULL)
    gather = gather_tokens(layout, "gather_final", x, everyone, piece)
    local = c.vocab // node.size
    mine = (range(node.index * local, (node.index + 1) * local),)
    name, kind = ("logits", torch.float32) if head == "logits" else ("head_logits", dtype)
    logits = Value(name, (T, local), kind, shard=Shard((), GATHERED, mine), keep=Keep.FULL)
    multiply = Op(
        name="head_product", reads=(everyone,), writes=(logits,), weights=(weight,),
        cost=_product(everyone, logits, 1), run=lambda x, w: (x @ w.t()).to(kind),
    )
    if head == "logits":
        return [gather, multiply]
    part = Value("head_part", (T, 3), torch.float32, keep=Keep.FULL)
    normalizer = Value("head_normalizer", (T, 2), torch.float32, shard=Shard((), GATHERED), keep=Keep.FULL)
    statistics = Op(
        name="head_statistics", reads=(logits, "targets"), writes=(part,), cost=Cost(memory_bytes=logits.nbytes),
        run=lambda logits, targets: partial_statistics(logits, targets, mine[0].start),
    )
    return [gather, multiply, statistics, _gather_statistics(part, normalizer, layout),
            _loss(weight, head, (everyone, logits, normalizer), layout)]  # fmt: skip


def _product(x: Value, logits: Value, products: int) -> Cost:
    (T, hidden), V = x.shape, logits.shape[1]
    moved = x.dtype.itemsize * (products * V * hidden + T * hidden + T * V)
    return product(T, V, hidden, moved, products)


def _gather_statistics(part: Value, normalizer: Value, layout: Layout) -> Op:
    node, name = layout.node, "gather_statistics"

    def run(part: Tensor) -> Pending:
        return all_gather(part[None], node, tag_of(name)).then(combine_statistics)

    return Op(
        name=name, reads=(part,), writes=(normalizer,), run=run, stream=layout.stream(node),
        cost=Cost(wire_bytes=part.nbytes * (node.size - 1), axis=node.name),
    )


def _loss(weight: str, head: str, given: tuple[Value, Value, Value], layout: Layout) -> Op:
    """Loss of the own tokens; in training also both gradients of the head."""
    x, logits, normalizer = given
    node, loss = layout.node, Value("loss", (), torch.float32, keep=Keep.FULL)
    first = node.index * int(logits.shape[1])
    own = slice(node.index * layout.tokens, (node.index + 1) * layout.tokens)

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
        return Op(name="head", reads=(normalizer, "targets"), writes=(loss,), run=of_own)
    shard = Shard(("final.slope",), GATHERED, partial="node")
    slope = Value("final_ag.slope", x.shape, x.dtype, shard=shard, keep=Keep.FULL)
    backward = Op(name="head", phase=Phase.B, reads=(slope,), writes=(x.gradient,), run=lambda slope: slope)
    return Op(
        name="head", reads=(*given, "targets", "loss_scale"), writes=(loss, slope), weights=(weight,),
        gradients=(weight,), run=train, cost=_product(x, logits, 2), backward=(backward,),
    )


class Sharded(VocabularyStrategy):
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
        node, inter = layout.node, "tied" if model.tied_embeddings else "tensor_data"

        def mine(weight: Weight) -> Placement:
            return rows(weight.shape, [share(weight.shape[0], node.size, node.index)], ("", inter))

        return {"embedding.weight": mine, "head.weight": mine}

    def embedding_ops(self, y: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        return embedding_ops(y, model, layout) if self.gathers_tokens(layout) else [whole_embedding(y)]

    def head_ops(self, weight: str, head: Head, x: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        if self.gathers_tokens(layout):
            return head_ops(weight, head, x, model, layout)
        return [whole_head(weight, head, x, model.vocab)]


SHARDED = Sharded()
