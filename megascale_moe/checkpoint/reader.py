"""Loading: any box of any tensor, from whatever pieces it was saved in.

A request is cut into boxes, like the pieces were; what two boxes have in common is copied. Files are memory-mapped, and
only the blocks that a request touches are read, checked and then used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale_moe.checkpoint.boxes import Box, Index, dot, flat_range, intersect, row_major
from megascale_moe.checkpoint.files import BlockFile
from megascale_moe.checkpoint.manifest import DTYPES, MANIFEST, Manifest, check_range
from megascale_moe.config import ConfigError, require


class _Stored(NamedTuple):
    """A box whose elements are contiguous in a file, from byte `at` on."""

    box: Box
    file: str
    at: int


class Checkpoint:
    """A complete checkpoint on the disk, a folder `step-N`; ranks open it independently of each other.

    Opening reads the manifest and looks at the sizes of the files. Raises ConfigError if the folder is no checkpoint,
    of another format version, damaged or incomplete. Data is checked when it is read; see `read`.
    """

    step: int
    world: int  # ranks that wrote it
    extra: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]  # shapes of the global tensors
    dtypes: dict[str, torch.dtype]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require((folder / MANIFEST).is_file(), f"{folder} is not a checkpoint: it has no {MANIFEST}")
        manifest = Manifest.read(folder / MANIFEST)
        try:
            manifest.check()
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None
        self.step, self.world, self.extra = manifest.step, manifest.world, manifest.extra
        self.tensors = {name: tensor.shape for name, tensor in manifest.tensors.items()}
        self.dtypes = {name: DTYPES[tensor.dtype] for name, tensor in manifest.tensors.items()}
        self._files = {name: BlockFile(folder / name, file) for name, file in manifest.files.items()}
        self._pieces = {name: tensor.pieces for name, tensor in manifest.tensors.items()}
        self._boxes: dict[str, list[_Stored]] = {}

    def read(self, name: str, offset: Index, size: Index, dtype: torch.dtype | None = None) -> Tensor:
        """The box of a tensor as a new tensor [*size] on the CPU, in the saved dtype or another.

        Raises ConfigError if there is no such tensor or box, or if a file is damaged where the box lies in it.
        """
        box = Box(tuple(offset), tuple(size))
        self._check_range(name, box, 0, box.volume)
        out = torch.empty(box.size, dtype=dtype or self.dtypes[name])
        self._fill(out, name, box)
        return out

    def read_flat(
        self, name: str, offset: Index, size: Index, start: int, length: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Elements `start` to `start + length` of the box flattened row by row, [length]; otherwise like `read`."""
        box = Box(tuple(offset), tuple(size))
        self._check_range(name, box, start, length)
        out = torch.empty(length, dtype=dtype or self.dtypes[name])
        end = 0
        for part in flat_range(box, start, length):
            begin, end = end, end + part.volume
            self._fill(out[begin:end].view(part.size), name, part)
        return out

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Check all bytes of some files (None: of all); raises ConfigError naming the first damaged one.

        Reading checks what it reads; this is for whoever wants to know about the rest.
        """
        for file in self._files if files is None else files:
            require(file in self._files, f"{self.folder} has no file {file!r}")
            self._files[file].check()

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError naming the first tensor that is missing, has another shape or is not expected."""
        other = f"{self.folder} is a checkpoint of another model:"
        for name, shape in expected.items():
            require(name in self.tensors, f"{other} it has no {name}")
            saved = self.tensors[name]
            require(saved == tuple(shape), f"{other} {name} is {[*saved]} there and {[*shape]} here")
        for name in self.tensors:
            require(name in expected, f"{other} it has {name}, which is not in this one")

    def _check_range(self, name: str, box: Box, start: int, length: int) -> None:
        require(name in self.tensors, f"{self.folder} has no tensor {name}")
        check_range(name, self.tensors[name], box, start, length)

    def _fill(self, out: Tensor, name: str, box: Box) -> None:
        """Copy the elements of the box, all of which are somewhere, into out [*box.size]."""
        for stored in self._stored(name):
            common = intersect(stored.box, box)
            if common:
                out[common.slices(box.offset)].copy_(self._values(stored, common, self.dtypes[name]))

    def _values(self, stored: _Stored, part: Box, dtype: torch.dtype) -> Tensor:
        """The elements of a part of a stored box, [*part.size]; only bytes from its first to its last are touched."""
        strides = row_major(stored.box.size)
        first = dot([a - b for a, b in zip(part.offset, stored.box.offset, strict=True)], strides)
        span = dot([extent - 1 for extent in part.size], strides) + 1
        values = self._files[stored.file].values(stored.at + first * dtype.itemsize, span, dtype)
        return values.as_strided(part.size, strides)

    def _stored(self, name: str) -> list[_Stored]:
        if name not in self._boxes:
            self._boxes[name] = list(self._contiguous(name))
        return self._boxes[name]

    def _contiguous(self, name: str) -> Iterator[_Stored]:
        for piece in self._pieces[name]:
            at = piece.at
            for box in piece.boxes():
                yield _Stored(box, piece.file, at)
                at += box.volume * self.dtypes[name].itemsize
