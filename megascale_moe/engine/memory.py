"""Memory that a list takes, byte for byte, without taking it.

Inside `Meter` every tensor that torch makes is counted by its storage, from its birth to its death, also those that
live only inside an operator or in an autograd graph. On the meta device nothing is allocated, so the peak of a rank
with 80 GB can be found on a laptop. What a real allocator adds (rounding, fragmentation) is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Meter(TorchDispatchMode):
    """Counts bytes alive while it is active.

    Attributes:
        alive: bytes of tensors made inside and not yet gone. peak: the most there ever were.
        held: the most there were between two operators (see `between`): what is kept from one to the next.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self.held = 0
        self._known: set[int] = set()

    def between(self, *_: object) -> None:
        """To be called after each operator; fits `Program.run(observe=...)`."""
        self.held = max(self.held, self.alive)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tensors_in([*args, *(kwargs or {}).values()]):
            self._note(tensor, 0)  # not made inside, or it would be known: a view of it must not count as new
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._note(tensor, tensor.untyped_storage().nbytes())
        return out

    def _note(self, tensor: Tensor, size: int) -> None:
        """Count a storage that is not known yet as `size` bytes until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of a value, also inside tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
