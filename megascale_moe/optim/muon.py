"""Muon: momentum, orthogonalised matrix by matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

The update of a matrix is its Nesterov momentum with all singular values brought near one, by five Newton-Schulz steps
of an odd quintic polynomial: nothing but products of matrices, in BF16 on a GPU. So every direction counts as much as
any other, however small its gradients are. Weight decay and the scale "adamw_rms" are those of "Muon is Scalable for
LLM Training" (arXiv 2502.16982, Moonlight).

As in that paper, AdamW updates the embedding, the head and vectors, and Muon all matrices inside of the layers. The
router is one of them: the paper compares the singular values of routers that Muon and AdamW have trained, and finds the
largest difference there. Matrices that are stored as one weight (queries, keys and values, gate and up, experts) are
orthogonalised one by one, which Jordan et al. found better for queries, keys and values than together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost, Work, product
from megascale_moe.optim.adamw import ADAMW
from megascale_moe.optim.rule import MatrixRule, Rule, State, WeightShard, Whole

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5: as steep at zero as they can be while large singular values end within 0.3 of one."""
LEAST = 1e-7
"""Norm by which a matrix is divided at least, so that one without gradient stays zero."""
RMS = 0.2
"""Root mean square of the elements of AdamW's updates: 0.2 to 0.4 in training (arXiv 2502.16982, section 2.2)."""


class Muon(MatrixRule):
    """Orthogonalised momentum for matrices; AdamW for the rest."""

    name = "muon"
    state = (State("momentum"),)

    def of(self, matrices: tuple[int, ...]) -> Rule:
        """Return AdamW for weights without matrices."""
        return self if matrices else ADAMW

    def prepare(self, shard: WeightShard, gradient: Tensor, config: TrainConfig) -> Tensor:
        """Return gradient + mu (mu momentum + gradient), float32 [S], in the place of the gradient."""
        momentum = shard.state["momentum"].mul_(config.muon_momentum).add_(gradient)
        return gradient.add_(momentum, alpha=config.muon_momentum)

    def transform(self, matrices: Tensor, config: TrainConfig) -> Tensor:
        """Return orthogonalised and scaled matrices, [count, rows, columns]."""
        rows, columns = matrices.shape[-2:]
        return orthogonalised(matrices).mul_(scale(rows, columns, config))

    def update(self, shard: WeightShard, change: Tensor, rate: float, config: TrainConfig) -> None:
        """Take the orthogonalised direction `change`, float32 [S], from the weights, which decay."""
        shard.master.mul_(1.0 - rate * config.weight_decay).add_(change, alpha=-rate)

    def dtype(self, device: torch.device, config: TrainConfig) -> torch.dtype:
        """Return float32 on a CPU and bfloat16 elsewhere, unless the config says which."""
        wanted = config.muon_dtype
        narrow = wanted == "bf16" or (wanted == "auto" and device.type != "cpu")
        return torch.bfloat16 if narrow else torch.float32

    def prepare_cost(self, elements: int) -> Cost:
        """Return the traffic of three passes, in which momentum moves five times and the gradient three times."""
        return Cost(memory_bytes=32 * elements)

    def transform_cost(self, rows: int, columns: int) -> Cost:
        """Return the products of five steps: [m, n] by [n, m], [m, m] by [m, m] and [m, m] by [m, n], m the shorter."""
        m, n = min(rows, columns), max(rows, columns)
        products = product(m, m, n, 0.0), product(m, m, m, 0.0), product(m, n, m, 0.0)
        flops = sum(each.flops for each in products)
        size = flops / sum(each.flops / each.size for each in products)
        moved = 2 * (4 * m * n + 6 * m * m)  # in BF16: each factor read, each result written, what is added read
        return Cost(STEPS * flops, STEPS * moved, work=Work.PRODUCT, size=size)

    def cost(self, elements: int) -> Cost:
        """Return the traffic of two passes: weights are read and written twice, the direction is read."""
        return Cost(memory_bytes=20 * elements)

    def plain(self, whole: Whole, rate: float, config: TrainConfig) -> Tensor:
        """See `Rule.plain`."""
        mu = config.muon_momentum
        direction = whole.gradient + mu * (mu * whole.state["momentum"] + whole.gradient)
        a, b, c = COEFFICIENTS
        changes = []
        for matrix in direction.split(list(whole.matrices), dim=-2):
            x = matrix / matrix.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST)
            for _ in range(STEPS):
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            changes.append(x * scale(matrix.shape[-2], matrix.shape[-1], config))
        decay = rate * config.weight_decay if whole.decay else 0.0
        return whole.weight * (1.0 - decay) - rate * torch.cat(changes, dim=-2)

    def comparable(self, config: TrainConfig) -> TrainConfig:
        """Return a config with float32 everywhere: rounding to BF16 turns nearly equal into a BF16 step apart."""
        return replace(ADAMW.comparable(config), muon_dtype="fp32")


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices [count, rows, columns] with their large singular values near one, in their dtype.

    A singular value s, in units of the matrix's norm, becomes the quintic polynomial of s five times over. Small ones
    grow by 3.4445 each time, so that those below about 1e-3 of the norm do not get near one.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp(min=LEAST)
    x = (x / norm).to(x.dtype)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def scale(rows: int, columns: int, config: TrainConfig) -> float:
    """Return the factor of an orthogonalised matrix.

    "adamw_rms" gives its elements the root mean square of AdamW's updates, so that AdamW's learning rate and weight
    decay carry over. "spectral" gives matrices of all shapes the same effect on the root mean square of what they map.
    """
    if config.muon_scale == "adamw_rms":
        return RMS * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


MUON = Muon()
