"""Embedding, head and loss on every rank for its own tokens: no communication."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, product
from megascale_moe.engine.value import Keep, Value
from megascale_moe.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_loss
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.strategy import Head, VocabularyStrategy


def whole_head(weight: str, head: Head, x: Value, vocab: int) -> Op:
    """From x [tokens, hidden] to "loss", a sum over this rank's targets, or to "logits" [tokens, vocab]."""
    return {"train": _train_head, "loss": _loss_head, "logits": _logits_head}[head](weight, x, vocab)


def whole_embedding(y: Value) -> Op:
    """From "tokens" to y [tokens, hidden], by a table of the whole vocabulary."""
    cost = Cost(memory_bytes=2 * y.nbytes)

    def weight_gradient(tokens: Tensor, d: Tensor, sink: Gradient) -> None:
        sink.value().index_add_(0, tokens, d.to(sink.buffer.dtype))

    backward = Op(
        name="embedding", phase=Phase.W, reads=("tokens", grad(y)), writes=(), gradients=("embedding.weight",),
        run=weight_gradient, cost=cost,
    )
    return Op(
        name="embedding", reads=("tokens",), writes=(y,), weights=("embedding.weight",), cost=cost,
        run=lambda tokens, w: w.index_select(0, tokens), backward=(backward,),
    )


def _head_cost(x: Value, vocab: int, products: int) -> Cost:
    T, hidden = x.shape
    return product(T, vocab, hidden, products * vocab * hidden * x.dtype.itemsize + 2 * x.nbytes, products)


LOSS = Value("loss", (), torch.float32, keep=Keep.FULL)


def _train_head(weight: str, x: Value, vocab: int) -> Op:
    """Loss with both gradients at once, because a block of logits is best used while it is in cache."""
    slope = x.named("final.slope")

    def run(x: Tensor, targets: Tensor, scale: float, w: Tensor, sink: Gradient) -> tuple[Any, ...]:
        return linear_cross_entropy(x, w, targets, scale, sink.add_mm)

    backward = Op(name="head", phase=Phase.B, reads=(slope,), writes=(x.gradient,), run=lambda slope: slope)
    return Op(
        name="head", reads=(x, "targets", "loss_scale"), writes=(LOSS, slope), weights=(weight,), gradients=(weight,),
        run=run, cost=_head_cost(x, vocab, 3), backward=(backward,),
    )


def _loss_head(weight: str, x: Value, vocab: int) -> Op:
    return Op(
        name="head", reads=(x, "targets"), writes=(LOSS,), weights=(weight,), cost=_head_cost(x, vocab, 1),
        run=lambda x, targets, w: linear_cross_entropy_loss(x, w, targets),
    )


def _logits_head(weight: str, x: Value, vocab: int) -> Op:
    logits = Value("logits", (x.shape[0], vocab), torch.float32, keep=Keep.FULL)
    return Op(
        name="head", reads=(x,), writes=(logits,), weights=(weight,), cost=_head_cost(x, vocab, 1),
        run=lambda x, w: (x @ w.t()).float(),
    )


class Replicated(VocabularyStrategy):
    """The whole vocabulary on every rank."""

    name = "replicated"
    title = "vocabulary replicated"

    def embedding_ops(self, y: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        return [whole_embedding(y)]

    def head_ops(self, weight: str, head: Head, x: Value, model: ModelConfig, layout: Layout) -> list[Op]:
        return [whole_head(weight, head, x, model.vocab)]


REPLICATED = Replicated()
