"""What every layout is compared with: the plain model under autograd, and the list of one rank with all its tensors.

The plain modules share no operator, no backward formula and no communication with the lists, so they judge; the
one-rank list, judged by them first, then tells where in a list a difference begins.

A router decides by comparing numbers. Two scores that agree to a few bits may be ordered differently where sums are
taken in another order, and one token at another expert is a large difference with nothing wrong. So weights are drawn
again until no decision of the reference depends on the last bits (`decided`): choices and capacity must survive noise
ten times as large as rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import single
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import in_layer, is_grad, parse, without_micro
from megascale_moe.engine.op import Op, is_sum
from megascale_moe.model.router import route, within_capacity
from megascale_moe.model.transformer import Transformer, build
from megascale_moe.model.weights import Kind, weights_of
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import SHARED, of_micro
from megascale_moe.strategies.model import local_inputs, moe_layers
from megascale_moe.tools.verify.batch import BatchRows, random_rows

NOISE = 2e-5
"""On router logits of size one: FP32 rounding of the sums before them comes to about 1e-6."""

SEEDS = 40

FLOOR = 1e-3
"""A gradient far below the others is measured against this share of their size: where it is zero but for rounding (the
router of a top-1 model whose weights are normalised), its own size means nothing."""


class Recorder:
    """An observer of `Program.run` that keeps a copy of every tensor under its name.

    A copy, since the last reader of a tensor may overwrite it in the optimizer's list.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, op: Op, alive: dict[str, Any]) -> None:
        """Record the operator's tensors; results that still travel are recorded once their first reader has them."""
        for name in (*op.reads, *op.writes):
            value = alive.get(name)
            if isinstance(value, Tensor) and name not in self.values:
                self.values[name] = value.clone()


@dataclass(frozen=True)
class Reference:
    """Results of a model on the whole global batch.

    Attributes:
        loss, auxiliary: sums over tokens. output: last hidden state [tokens, hidden], behind the final norm.
        gradients: of loss / targets + auxiliary / tokens, by parameter.
        values: every tensor of the one-rank list. parts: (tensor, operator) -> what the operator added to the tensor's
            gradient.
        list_error: the largest relative error of the one-rank list against the plain model.
        decided: no choice of a router depends on rounding.
    """

    model: ModelConfig
    batch: BatchRows
    weights: dict[str, Tensor]
    loss: float
    auxiliary: float
    output: Tensor
    gradients: dict[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    list_error: float = 0.0
    decided: bool = True

    @property
    def scales(self) -> dict[str, Any]:
        """Factors that turn sums into means, by the names that a training step reads."""
        return {
            "loss_scale": 1.0 / self.batch.target_count,
            "auxiliary_scale": torch.tensor(1.0 / self.batch.tokens.numel()),
        }

    @cached_property
    def floors(self) -> dict[str, float]:
        """The norm that each gradient counts with at least."""
        norms, elements = zip(*((value.norm(), value.numel()) for value in self.gradients.values()), strict=True)
        size = FLOOR * float(torch.stack(norms).norm()) / sum(elements) ** 0.5
        return {name: size * value.numel() ** 0.5 for name, value in self.gradients.items()}

    def gradient_errors(self, gradients: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the relative error of every gradient."""
        return {name: relative(gradients[name], value, self.floors[name]) for name, value in self.gradients.items()}


def reference(model: ModelConfig, rows: int, seed: int = 0) -> Reference:
    """Return the results with the first of `SEEDS` seeds from `seed` on whose routing is decided, or with the last."""
    for attempt in range(seed, seed + SEEDS):
        result = _with_list(_plain(model, random_rows(model, rows, attempt + 1), attempt))
        if result.decided:
            break
    return result


def drawn(model: ModelConfig, seed: int) -> Transformer:
    """Return the model with random weights everywhere: also in norms and biases, which training starts equal."""
    built = build(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weights = weights_of(built)
        for name, parameter in built.named_parameters():
            middle = {Kind.NORM: 1.0, Kind.BIAS: 0.0}.get(weights[name].kind)
            if middle is not None:
                parameter.copy_(torch.empty(parameter.shape).uniform_(middle - 0.5, middle + 0.5, generator=generator))
        for buffer in built.buffers():
            buffer.copy_(torch.empty(buffer.shape).uniform_(-0.2, 0.2, generator=generator))
    return built


def _plain(model: ModelConfig, batch: BatchRows, seed: int) -> Reference:
    """Return what the plain model computes under autograd."""
    built = drawn(model, seed)
    tokens, targets, segments = batch.part(slice(None))
    loss, auxiliary = built.losses(tokens, targets, segments)
    (loss / batch.target_count + auxiliary / batch.tokens.numel()).backward()
    with torch.no_grad():
        output, _ = built.hidden(tokens.flatten(), segments)
    weights = {name: value.detach() for name, value in built.state_dict().items()}
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in built.named_parameters()
    }
    return Reference(model, batch, weights, float(loss.detach()), float(auxiliary.detach()), output, gradients)


def _with_list(plain: Reference) -> Reference:
    """Return the results with every tensor of the one-rank list, and how far that is from the plain model."""
    model, weights, (tokens, targets, segments) = plain.model, plain.weights, plain.batch.part(slice(None))
    plan = StepPlan(model, ParallelConfig(), single(), torch.float32, len(tokens))
    inputs = local_inputs(tokens, targets, plan.layout, segments, model)
    given = {of_micro(name, 0): value for name, value in inputs.items()} | dict.fromkeys(SHARED) | plain.scales
    sinks = {name: Gradient(torch.empty_like(value)) for name, value in plain.gradients.items()}
    recorder = Recorder()
    plan.program().run(given, weights, sinks, observe=recorder)
    values = {without_micro(name): value for name, value in recorder.values.items()}
    errors = plain.gradient_errors({name: sink.value() for name, sink in sinks.items()})
    list_error = max(relative(values["final"], plain.output), off(float(values["loss"]), plain.loss), *errors.values())
    # Tensors that one rank never makes: logits, what is gathered of their softmax [T, 2], and losses by token [T].
    logits = values["final"] @ weights["embedding.weight" if model.tied_embeddings else "head.weight"].t()
    wanted = targets.flatten()
    chosen = logits.gather(1, wanted.clamp(min=0)[:, None]).squeeze(1) * (wanted >= 0)
    total = logits.logsumexp(-1)
    values |= {
        "head_logits": logits, "head_normalizer": torch.stack((total, chosen), dim=-1),
        "losses": (total - chosen) * (wanted >= 0),
    }  # fmt: skip
    return replace(
        plain, values=values, parts=_parts(plan.ops, values), list_error=list_error,
        decided=_decided(model, values, weights, len(tokens)),
    )  # fmt: skip


def _parts(ops: list[Op], values: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Return (tensor, operator) -> what the operator adds to the tensor's gradient."""
    parts: dict[tuple[str, str], Tensor] = {}
    for op in ops:
        for name in map(without_micro, op.writes):
            if is_grad(name) and not is_sum(op):
                key = str(parse(name)._replace(term=0, gradient=False)), op.name
                parts[key] = parts[key] + values[name] if key in parts else values[name]
    return parts


def _decided(model: ModelConfig, values: dict[str, Tensor], weights: dict[str, Tensor], rows: int) -> bool:
    """Return whether choices and drops are the same with a little noise on all logits."""
    generator = torch.Generator().manual_seed(0)
    for layer in moe_layers(model):
        logits = values[in_layer(layer, "ln2_out")] @ weights[in_layer(layer, "ffn.router.weight")].t()
        bias = weights.get(in_layer(layer, "ffn.router.bias"))
        routed = _routed(logits, bias, model, rows)
        for _ in range(3):
            noise = torch.empty_like(logits).uniform_(-NOISE, NOISE, generator=generator)
            if not torch.equal(_routed(logits + noise, bias, model, rows), routed):
                return False
    return True


def _routed(logits: Tensor, bias: Tensor | None, model: ModelConfig, rows: int) -> Tensor:
    """Return which tokens an expert works on, bool [T, E]."""
    gate, choice, _ = route(logits, bias, model)
    taken = within_capacity(choice, gate, rows, model) if model.capacity_factor else torch.ones_like(choice).bool()
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, choice, taken)


# --- errors ----------------------------------------------------------------------------------------------------------


def relative(value: Tensor, wanted: Tensor, least: float = 1e-12) -> float:
    """Return the norm of the difference over that of what is wanted (at least `least`); infinite where it is NaN."""
    if value.shape != wanted.shape:
        return math.inf
    return or_infinite(float((value - wanted).norm()) / max(float(wanted.norm()), least))


def off(value: float, wanted: float) -> float:
    """Return the relative error of a number; infinite where it is NaN."""
    return or_infinite(abs(value - wanted) / max(abs(wanted), 1e-12))


def or_infinite(error: float) -> float:
    """Return the error, infinite where it is NaN: `max` would pass over it."""
    return math.inf if math.isnan(error) else error
