"""The parts of a training step that a peer leaves to its user: loss, clipping, AdamW, master weights.

Shared by the sides so that each peer gets the same, fastest form: one fused AdamW (a parameter group
per mesh, weight decay on matrices only), one norm over all meshes. A BF16 model keeps FP32 master
weights here.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from case import Case


class Updater(Protocol):
    """Turns accumulated gradients into new weights."""

    def update(self) -> None: ...


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in FP32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def adamw(parameters: Iterable[nn.Parameter], case: Case) -> torch.optim.AdamW:
    """Fused AdamW; decay on matrices, groups that never mix meshes."""
    groups: dict[tuple[object, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = case.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((mesh_of(parameter), decay), []).append(parameter)
    settings = [{"params": members, "weight_decay": decay} for (_, decay), members in groups.items()]
    return torch.optim.AdamW(settings, lr=case.learning_rate, betas=case.betas, eps=case.eps, fused=True)


def mesh_of(tensor: Tensor) -> object:
    """The mesh of a distributed tensor, None of a plain one."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clip by the norm over all gradients, whatever meshes they live on."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(mesh_of(parameter), []).append(parameter)
    norms = [whole(get_total_norm([p.grad for p in members if p.grad is not None])) for members in groups.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for members in groups.values():
        clip_grads_with_norm_(members, limit, norm)


def whole(tensor: Tensor) -> Tensor:
    """The full value of a possibly distributed tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Plain:
    """Clip, step, forget the gradients."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.parameters = list(model.parameters())
        self.limit = case.clip
        self.optimizer = adamw(self.parameters, case)

    def update(self) -> None:
        clip_gradients(self.parameters, self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Master:
    """The same with a BF16 model: FP32 weights and optimizer state here, a BF16 copy in the model."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.working = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.working]
        for parameter in self.working:  # not model.to(): buffers such as rotary frequencies stay FP32
            parameter.data = parameter.data.bfloat16()
        self.limit = case.clip
        self.optimizer = adamw(self.masters, case)

    @torch.no_grad()
    def update(self) -> None:
        for master, parameter in zip(self.masters, self.working, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        clip_gradients(self.masters, self.limit)
        self.optimizer.step()
        torch._foreach_copy_([*self.working], [*self.masters])
