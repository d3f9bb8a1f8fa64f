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

from megascale_moe.kernels.blocks import Rowwise

BLOCK_TOKENS = {"cpu": 256, "cuda": 4096}  # a block of logits in the cache; enough rows to fill a GPU


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
    block = BLOCK_TOKENS[x.device.type]
    for start in range(0, x.shape[0], block):
        part, target = x[start : start + block], targets[start : start + block]
        slope, losses = _loss_and_slope(part @ weight.t(), target, scale)
        total += losses.sum()
        torch.mm(slope, weight, out=gradient[start : start + block])
        add_weight_gradient(slope.t(), part)
    return total, gradient


def _slope_formula(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradient of a block's logits, scaled, and the loss of each token."""
    counts = (target >= 0)[:, None]
    chosen = target.clamp(min=0)[:, None]
    log_p = logits.float().log_softmax(-1)
    losses = torch.where(counts, -log_p.gather(1, chosen), 0.0)
    slope = log_p.exp_().scatter_add_(1, chosen, torch.full_like(losses, -1.0)).mul_(counts * scale)
    return slope.to(logits.dtype), losses


_loss_and_slope = Rowwise(_slope_formula, shared=1)


def linear_cross_entropy_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss alone, for evaluation."""
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    block = BLOCK_TOKENS[x.device.type]
    for part, target in zip(x.split(block), targets.split(block), strict=True):
        total += F.cross_entropy((part @ weight.t()).float(), target, ignore_index=-100, reduction="sum")
    return total
