"""Embedding, head and loss cut by vocabulary over the ranks of a node.

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
from megascale_moe.config import ModelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, grad, product
from megascale_moe.kernels.cross_entropy import combine_statistics, partial_statistics, sharded_slope
from megascale_moe.strategies.collective import gather_tokens, scatter_sums
from megascale_moe.strategies.layout import Layout


def embedding_ops(c: ModelConfig, layout: Layout) -> list[Op]:
    """tokens int64 [n * tokens] -> hidden_0 [tokens, hidden]."""
    node = layout.node
    size = c.vocab // node.size
    cost = Cost(memory_bytes=layout.bytes(2 * layout.tokens * node.size * c.hidden))

    def run(tokens: Tensor, weight: Tensor) -> Tensor:
        local = tokens - node.index * size
        mine = (local >= 0) & (local < size)
        return weight.index_select(0, local.clamp(0, size - 1)) * mine[:, None]

    def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
        local = tokens - node.index * size
        mine = (local >= 0) & (local < size)
        sink.value().index_add_(0, local.clamp(0, size - 1), (d * mine[:, None]).to(sink.buffer.dtype))

    partial = "embedding_partial"
    backward = Op(
        name="embedding", phase=Phase.W, reads=("tokens", grad(partial)), writes=(), gradients=("embedding.weight",),
        run=weight_gradient, cost=cost,
    )
    look_up = Op(
        name="embedding", reads=("tokens",), writes=(partial,), weights=("embedding.weight",), cost=cost, run=run,
        backward=(backward,),
    )
    return [look_up, scatter_sums("scatter_embedding", partial, "hidden_0", c.hidden, node, layout)]


def head_ops(weight: str, head: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """final [tokens, hidden] -> "loss" of this rank's targets, or "logits" [n * tokens, V / n] for head "logits"."""
    gather = gather_tokens("gather_final", "final", "final_ag", c.hidden, layout.node, layout)
    if head == "logits":
        return [gather, _logits("logits", weight, c, layout)]
    return [gather, _logits("head_logits", weight, c, layout), _statistics(c, layout),
            _gather_statistics(layout), _loss(weight, head, c, layout)]  # fmt: skip


def _product(c: ModelConfig, layout: Layout, products: int) -> Cost:
    T, V = layout.tokens * layout.node.size, c.vocab // layout.node.size
    moved = layout.bytes(products * V * c.hidden, T * c.hidden, T * V)
    return product(T, V, c.hidden, moved, products)


def _logits(y: str, weight: str, c: ModelConfig, layout: Layout) -> Op:
    def run(x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.t()
        return logits.float() if y == "logits" else logits

    return Op(
        name="head_product", reads=("final_ag",), writes=(y,), weights=(weight,), run=run, cost=_product(c, layout, 1)
    )


def _statistics(c: ModelConfig, layout: Layout) -> Op:
    first = layout.node.index * (c.vocab // layout.node.size)
    return Op(
        name="head_statistics", reads=("head_logits", "targets"), writes=("head_part",),
        run=lambda logits, targets: partial_statistics(logits, targets, first),
        cost=Cost(memory_bytes=layout.bytes(layout.tokens * c.vocab)),
    )


def _gather_statistics(layout: Layout) -> Op:
    node, name = layout.node, "gather_statistics"
    wire = 4.0 * 3 * layout.tokens * node.size * (node.size - 1)

    def run(part: Tensor) -> Pending:
        return all_gather(part[None], node, tag_of(name)).then(combine_statistics)

    return Op(
        name=name, reads=("head_part",), writes=("head_normalizer",), run=run, stream=layout.stream(node),
        cost=Cost(wire_bytes=wire, axis=node.name),
    )


def _loss(weight: str, head: str, c: ModelConfig, layout: Layout) -> Op:
    """Loss of the own tokens; in training also both gradients of the head."""
    node = layout.node
    first = node.index * (c.vocab // node.size)
    own = slice(node.index * layout.tokens, (node.index + 1) * layout.tokens)

    def loss(normalizer: Tensor, targets: Tensor) -> Tensor:
        log_sum, chosen = normalizer[own].unbind(-1)
        return ((log_sum - chosen) * (targets[own] >= 0)).sum()

    def train(
        x: Tensor, logits: Tensor, normalizer: Tensor, targets: Tensor, scale: float, w: Tensor, sink: Gradient
    ) -> tuple[Tensor, Tensor]:
        slope = sharded_slope(logits, normalizer[:, 0], targets, first, scale)
        sink.add_mm(slope.t(), x)
        return loss(normalizer, targets), slope @ w

    if head == "loss":
        return Op(name="head", reads=("head_normalizer", "targets"), writes=("loss",), run=loss)
    backward = Op(
        name="head", phase=Phase.B, reads=("final_ag.slope",), writes=(grad("final_ag"),), run=lambda slope: slope
    )
    reads = ("final_ag", "head_logits", "head_normalizer", "targets", "loss_scale")
    return Op(
        name="head", reads=reads, writes=("loss", "final_ag.slope"), weights=(weight,), gradients=(weight,), run=train,
        cost=_product(c, layout, 2), backward=(backward,),
    )


def rank_order(x: Tensor, parts: int) -> Tensor:
    """x [rows, length] -> [rows * length]: the slices of every row of rank 0, of rank 1, ..."""
    rows, length = x.shape
    return torch.movedim(x.view(rows, parts, length // parts), 1, 0).reshape(-1)
