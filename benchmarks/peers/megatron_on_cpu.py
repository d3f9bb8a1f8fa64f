"""Lets Megatron-Core run on a CPU: what it asks of CUDA gets an answer. Import before anything of megatron.

All of it is put in from outside; none of it changes what is computed or sent. Streams and events mean nothing here,
since operators of a CPU run in order and gloo communicates in threads of its own.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CPU = "cpu"


class Stream:
    """A stream or an event: everything is done when it is asked for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None: ...


STREAM = Stream()


@contextlib.contextmanager
def nothing(*_: object) -> Iterator[None]:
    """In place of a stream that becomes current, and of a random state of each kind: dropout is off."""
    yield


def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory that makes its tensors here when it is asked for CUDA's."""

    def make(*arguments: Any, **named: Any) -> Tensor:
        return factory(*arguments, **named | ({"device": CPU} if named.get("device") == "cuda" else {}))

    return make


def type_name(tensor: Tensor, dtype: object = None, **named: Any) -> object:
    """The optimizer asks by name whether a tensor is CUDA's in FP32."""
    if dtype is None:
        return original_type(tensor).replace("torch.F", "torch.cuda.F")
    return original_type(tensor, dtype, **named)


class FusedAdamW(torch.optim.AdamW):
    """torch's fused form in place of Apex's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, fused=True)


original_type = Tensor.type
torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: STREAM  # type: ignore[assignment, return-value]
torch.cuda.Stream = torch.cuda.Event = Stream  # type: ignore[assignment, misc]
torch.cuda.stream = nothing  # type: ignore[assignment]
torch.cuda.synchronize = lambda *_: None
for name in ("tensor", "zeros", "empty", "arange", "ones"):
    setattr(torch, name, on_cpu(getattr(torch, name)))
Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment, method-assign]
Tensor.type = type_name  # type: ignore[assignment, method-assign]
torch.optim.AdamW = FusedAdamW  # type: ignore[misc]

from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils, token_dispatcher

CudaRNGStatesTracker.fork = nothing
moe_utils.te_general_gemm = None


def counts(tensor: Tensor | None, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Message sizes are wanted as numbers; what is not on a CUDA device is left as it is there."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


token_dispatcher.maybe_move_tensor_to_cpu = counts
