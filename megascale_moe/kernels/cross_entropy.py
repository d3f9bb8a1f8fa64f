"""The output projection and the cross-entropy in one pass over blocks of tokens.

Logits of all tokens would be the largest tensor of a small model and, with softmax and its gradient, cost several
passes over it. Here a block of logits is made, turned in place into its gradient, and used for both products while
it is in cache; it is never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.kernels.blocks import Rowwise

BLOCK_TOKENS = {"cpu": 256, "cuda": 4096, "meta": 4096}  # a block of logits in the cache; enough rows to fill a GPU


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return the same rows of all tensors, as views, block by block."""
    return zip(*(each.split(BLOCK_TOKENS[x.device.type]) for each in (x, *others)), strict=True)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, add_weight_gradient: Callable[[Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Compute loss and gradients of the output layer.

    Args:
        x: [T, D]. weight: [V, D]. targets: int64 [T], -100 does not count.
        scale: factor on the gradients (one over the number of targets in the global batch).
        add_weight_gradient: called with (a, b) whose product a @ b [V, D] belongs to the weight's gradient.

    Returns:
        (sum of the losses, float32 scalar, not scaled; gradient of x [T, D], scaled).
    """
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    gradient = torch.empty_like(x)
    for rows, target, dx in _blocks(x, targets, gradient):
        slope, losses = _slope_and_loss(rows @ weight.t(), target, scale)
        total += losses.sum()
        torch.mm(slope, weight, out=dx)
        add_weight_gradient(slope.t(), rows)
    return total, gradient


def _slope_formula(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradient of a block's logits, scaled, and the loss of each token."""
    counts = (target >= 0)[:, None]
    chosen = target.clamp(min=0)[:, None]
    log_p = logits.float().log_softmax(-1)
    losses = torch.where(counts, -log_p.gather(1, chosen), 0.0)
    slope = log_p.exp_().scatter_add_(1, chosen, torch.full_like(losses, -1.0)).mul_(counts * scale)
    return slope.to(logits.dtype), losses


_slope_and_loss = Rowwise(_slope_formula, shared=1)


def linear_cross_entropy_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss alone, for evaluation."""
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for rows, target in _blocks(x, targets):
        total += F.cross_entropy((rows @ weight.t()).float(), target, ignore_index=-100, reduction="sum")
    return total


# --- a vocabulary cut over several ranks -----------------------------------------------------------------------------


def partial_statistics(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """Return what a part of the vocabulary, from token `first` on, says of each row's softmax.

    logits [T, V / n], targets int64 [T] -> float32 [T, 3]: largest logit, sum of exp(logit - largest), the target's
    logit (0 where it lies in another part).
    """
    statistics = []
    for rows, target in _blocks(logits, targets):
        values = rows.float()
        largest = values.amax(-1)
        total = (values - largest[:, None]).exp_().sum(-1)
        chosen, mine = _columns(target, first, logits.shape[1])
        statistics.append(torch.stack((largest, total, values.gather(1, chosen).squeeze(1) * mine), dim=-1))
    return torch.cat(statistics)


def _columns(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Return targets as columns of a part of the vocabulary, [T, 1], and whether they lie in it, [T]."""
    local = targets - first
    mine = (local >= 0) & (local < size) & (targets >= 0)
    return local.clamp(0, size - 1)[:, None], mine


def combine_statistics(parts: Tensor) -> Tensor:
    """Reduce float32 [n, T, 3] of all parts -> [T, 2]: log of the sum of all exponentials, the target's logit."""
    largest = parts[..., 0].amax(0)
    total = (parts[..., 1] * (parts[..., 0] - largest).exp()).sum(0)
    return torch.stack((largest + total.log(), parts[..., 2].sum(0)), dim=-1)


def sharded_slope(logits: Tensor, log_sum: Tensor, targets: Tensor, first: int, scale: float) -> Tensor:
    """Return the gradient of a part's logits [T, V / n], times `scale`; overwrites nothing.

    Args:
        log_sum: of the exponentials of the whole vocabulary, float32 [T].
    """
    gradient = torch.empty_like(logits)
    for rows, log_total, target, slope in _blocks(logits, log_sum, targets, gradient):
        p = (rows.float() - log_total[:, None]).exp_()
        chosen, mine = _columns(target, first, logits.shape[1])
        p.scatter_add_(1, chosen, -mine.float()[:, None])
        slope.copy_(p.mul_(((target >= 0) * scale)[:, None]))
    return gradient
