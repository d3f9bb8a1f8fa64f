"""Which element of which tensor is where: records of the manifest, `manifest.json`.

The manifest describes the checkpoint completely (shapes, pieces, sizes and checksums of files, step, `extra`), is
plain JSON, and has a CRC-32 of its own: a changed digit in a learning rate is found like a changed bit in a weight.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale_moe.checkpoint.boxes import Box, Index, first_fault, flat_range
from megascale_moe.config import ConfigError, require

MANIFEST = "manifest.json"
FORMAT = "megascale_moe.checkpoint"
VERSION = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that can be saved, under the names of safetensors."""

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPiece:
    """A rank's part of a saved tensor: a flat range of a box, `values` [length], 1-D, contiguous, on any device."""

    name: str  # of the global tensor: "parameters.layers.0.attention.qkv.weight", "exp_avg.layers...."
    shape: tuple[int, ...]  # of the global tensor
    offset: tuple[int, ...]  # of the box that this rank's copy covers
    size: tuple[int, ...]  # of that box
    start: int  # first element of `values` in the box flattened row by row
    values: Tensor

    def check(self) -> None:
        """Raise ConfigError if the piece contradicts itself or has a dtype that cannot be saved."""
        name, values = self.name, self.values
        flat = values.dim() == 1 and values.is_contiguous()
        require(flat, f"{name}: values {[*values.shape]} must be 1-D and contiguous")
        require(values.dtype in CODES, f"{name}: {values.dtype} cannot be saved")
        check_range(name, self.shape, Box(self.offset, self.size), self.start, values.numel())


@dataclass(frozen=True)
class StoredPiece:
    """A piece in a file: `at` bytes from its beginning, and by the name of `key` for the safetensors library."""

    file: str
    key: str
    at: int
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    length: int

    @property
    def box(self) -> Box:
        """The box of which this is a flat range."""
        return Box(self.offset, self.size)

    def boxes(self) -> list[Box]:
        """Return the elements that are here, in the order of the file."""
        return flat_range(self.box, self.start, self.length)


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and where its elements are."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES
    pieces: list[StoredPiece] = field(default_factory=list)


@dataclass(frozen=True)
class StoredFile:
    """A data file: its bytes, and the CRC-32 of each of its blocks (files.py)."""

    size: int
    blocks: list[int]


@dataclass(frozen=True)
class Manifest:
    """All there is to know about a checkpoint; while it is being saved, about one rank's share of it."""

    step: int
    world: int
    extra: dict[str, Any] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def add(self, name: str, shape: Index, dtype: str, pieces: Iterable[StoredPiece]) -> None:
        """Add pieces of a tensor; raises ConfigError if earlier ones belong to another shape or dtype."""
        known = self.tensors.setdefault(name, StoredTensor(shape, dtype))
        both = f"{known.dtype} {[*known.shape]} and {dtype} {[*shape]}"
        require((known.shape, known.dtype) == (shape, dtype), f"{name}: pieces of two tensors, {both}")
        known.pieces.extend(pieces)

    def merge(self, part: Manifest) -> None:
        """Add what another rank wrote; raises ConfigError where the two disagree about a tensor."""
        self.files.update(part.files)
        for name, tensor in part.tensors.items():
            self.add(name, tensor.shape, tensor.dtype, tensor.pieces)

    def check(self) -> None:
        """Raise ConfigError unless every piece is inside a file and every element of every tensor is there once."""
        for file in self.files:
            require(re.fullmatch(r"rank-\d+\.safetensors", file) is not None, f"unexpected file name {file!r}")
        for name, tensor in self.tensors.items():
            require(tensor.dtype in DTYPES, f"{name}: unknown dtype {tensor.dtype}")
            for piece in tensor.pieces:
                check_range(name, tensor.shape, piece.box, piece.start, piece.length)
                end = piece.at + piece.length * DTYPES[tensor.dtype].itemsize
                inside = piece.file in self.files and 0 <= piece.at <= end <= self.files[piece.file].size
                require(inside, f"{name}: a piece lies outside of {piece.file}")
            fault = first_fault(tensor.shape, [box for piece in tensor.pieces for box in piece.boxes()])
            if fault:
                raise ConfigError(f"{name}: {_describe_fault(name, tensor.shape, *fault)}")

    def write(self, path: Path) -> None:
        """Write as JSON, onto the disk; raises OSError, and TypeError if `extra` holds something that JSON cannot."""
        body = json.loads(json.dumps(vars(self), default=_record))  # as it will be read: lists, keys that are strings
        document = {"format": FORMAT, "version": VERSION, "crc32": _checksum(body), "body": body}
        with path.open("w") as stream:
            stream.write(json.dumps(document))
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read what `write` wrote; raises ConfigError for anything else, FileNotFoundError for nothing."""
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} is damaged: not JSON") from None
        ours = isinstance(document, dict) and document.get("format") == FORMAT
        require(ours, f'{path} is not the manifest of a checkpoint: "format" must be "{FORMAT}"')
        version, body = document.get("version"), document.get("body")
        require(version == VERSION, f"{path} has format version {version}, this program reads version {VERSION}")
        require(document.get("crc32") == _checksum(body), f"{path} is damaged: its checksum does not match")
        try:
            files = {name: StoredFile(**file) for name, file in body["files"].items()}
            manifest = cls(body["step"], body["world"], body["extra"], files)
            for name, tensor in body["tensors"].items():
                pieces = (
                    StoredPiece(**piece | {"offset": tuple(piece["offset"]), "size": tuple(piece["size"])})
                    for piece in tensor["pieces"]
                )
                manifest.add(name, tuple(tensor["shape"]), tensor["dtype"], pieces)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged: {error!r}") from None
        return manifest


def check_range(name: str, shape: Index, box: Box, start: int, length: int) -> None:
    """Raise ConfigError unless the box is inside a tensor of this shape and the flat range inside the box."""
    where = f"offset {[*box.offset]} and size {[*box.size]}"
    require(box.inside(shape), f"{name} {[*shape]}: no box inside has {where}")
    end = start + length
    require(0 <= start <= end <= box.volume, f"{name}: no elements {start} to {end} in the box with {where}")


def _record(value: object) -> dict[str, Any]:
    if isinstance(value, StoredTensor | StoredPiece | StoredFile):
        return vars(value)
    raise TypeError(f"extra holds a {type(value).__name__}, which JSON cannot")


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body).encode())


def _describe_fault(name: str, shape: Index, index: Index, count: int) -> str:
    """Return what is wrong with an element that is there `count` times."""
    what = "is missing" if count == 0 else f"is there {count} times"
    element = f"element {[*index]} of {[*shape]}"
    if "experts" in name.split(".") and len(shape) > 1:
        return f"expert {index[0]} {what} ({element})"
    return f"{element} {what}"
