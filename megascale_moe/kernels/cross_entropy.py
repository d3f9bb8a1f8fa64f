"""The output projection and the cross-entropy in one pass over blocks of tokens.

Logits of all tokens would be the largest tensor of a small model and, with softmax and its gradient, cost several
passes over it. Here a block of logits is made, turned in place into its gradient, and used for both products while
it is in cache; it is never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TOKENS = 256


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, add_weight_gradient: Callable[[Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Loss and gradients of the output layer.

    Args:
        x: [T, D]. weight: [V, D]. targets: int64 [T], -100 does not count.
        scale: factor on the gradients (one over the number of targets in the global batch).
        add_weight_gradient: called with (a, b) whose product a @ b [V, D] belongs to the weight's gradient.

    Returns:
        (sum of the losses, float32 scalar, not scaled; gradient of x [T, D], scaled).
    """
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    gradient = torch.empty_like(x)
    for start in range(0, x.shape[0], BLOCK_TOKENS):
        part, target = x[start : start + BLOCK_TOKENS], targets[start : start + BLOCK_TOKENS]
        logits = (part @ weight.t()).float()
        loss, softmax = _loss_and_softmax(logits, target)
        total += loss
        counts = target >= 0
        softmax[torch.arange(len(target), device=x.device), target.clamp(min=0)] -= 1.0
        softmax.mul_((counts * scale)[:, None])
        slope = softmax.to(x.dtype)
        torch.mm(slope, weight, out=gradient[start : start + BLOCK_TOKENS])
        add_weight_gradient(slope.t(), part)
    return total, gradient


def _loss_and_softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a block; the logits become their softmax in place."""
    chosen = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    peak = logits.amax(-1, keepdim=True)
    logits.sub_(peak).exp_()
    sums = logits.sum(-1, keepdim=True)
    logits.div_(sums)
    losses = sums.log().squeeze(1) + peak.squeeze(1) - chosen
    return (losses * (target >= 0)).sum(), logits


def linear_cross_entropy_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss alone, for evaluation."""
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for part, target in zip(x.split(BLOCK_TOKENS), targets.split(BLOCK_TOKENS), strict=True):
        total += F.cross_entropy((part @ weight.t()).float(), target, ignore_index=-100, reduction="sum")
    return total
