"""Loading: any box of any tensor, from whatever pieces it was saved in.

A request is cut into boxes, like the pieces were; what two boxes have in common is copied. Files are memory-mapped, and
only the blocks that a request touches are read, checked and then used.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megascale_moe.checkpoint.boxes import Box, Index, flat_range, intersect
from megascale_moe.checkpoint.files import BlockFile
from megascale_moe.checkpoint.manifest import DTYPES, MANIFEST, Manifest, check_range
from megascale_moe.config import ConfigError, require


class Checkpoint:
    """A complete checkpoint on the disk, a folder `step-N`; ranks open it independently of each other.

    Opening reads the manifest and looks at the sizes of the files. Raises ConfigError if the folder is no checkpoint,
    of another format version, damaged or incomplete. Data is checked when it is read; see `read`.

    Attributes:
        step, extra: as saved. world: ranks that wrote it. tensors: shapes of the global tensors. dtypes: as saved.
    """

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
        self._manifest = manifest

    def read(self, name: str, offset: Index, size: Index) -> Tensor:
        """Return a box of a tensor as a new tensor [*size] on the CPU, in the saved dtype.

        Raises ConfigError if there is no such tensor or box, or if a file is damaged where the box lies in it.
        """
        return self.read_flat(name, offset, size, 0, prod(size)).view(size)

    def read_flat(self, name: str, offset: Index, size: Index, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of the box flattened row by row, [length]; else like `read`."""
        require(name in self.tensors, f"{self.folder} has no tensor {name}")
        box = Box(tuple(offset), tuple(size))
        check_range(name, self.tensors[name], box, start, length)
        out = torch.empty(length, dtype=self.dtypes[name])
        boxes = self._boxes(name)
        end = 0
        for part in flat_range(box, start, length):
            begin, end = end, end + part.volume
            for stored, file, at in boxes:
                common = intersect(stored, part)
                if common:
                    values = self._files[file].values(at, stored, common, self.dtypes[name])
                    out[begin:end].view(part.size)[common.slices(part.offset)].copy_(values)
        return out

    def verify(self) -> None:
        """Check all bytes of all files; raises ConfigError naming the first damaged one.

        Reading checks what it reads; this is for whoever wants to know about the rest.
        """
        for file in self._files.values():
            file.check()

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError naming the first tensor that is missing, has another shape or is not expected."""
        other = f"{self.folder} is a checkpoint of another model:"
        for name, shape in expected.items():
            require(name in self.tensors, f"{other} it has no {name}")
            saved = self.tensors[name]
            require(saved == tuple(shape), f"{other} {name} is {[*saved]} there and {[*shape]} here")
        for name in self.tensors:
            require(name in expected, f"{other} it has {name}, which is not in this one")

    def _boxes(self, name: str) -> list[tuple[Box, str, int]]:
        """Return the boxes of a tensor whose elements are contiguous in a file, with the file and the first byte."""
        boxes = []
        for piece in self._manifest.tensors[name].pieces:
            at = piece.at
            for box in piece.boxes():
                boxes.append((box, piece.file, at))
                at += box.volume * self.dtypes[name].itemsize
        return boxes
