"""The tensors' bytes: one safetensors file per rank, written with checksums and read with checks.

A file has a CRC-32 per block of 4 MiB, and whoever reads a range first checks the blocks it lies in: a rank that reads
a tenth of a checkpoint checks a tenth, and nobody can forget to. CRC-32 because the enemy is a broken disk or copy,
not a person: it finds every error of up to 32 neighbouring bits and all but one in 4e9 of the others, at 4 GB/s on a
core where blake2b makes 0.9 and SHA-256 1.8 (0.4 on processors without an instruction for it).

The safetensors header is written here, in a dozen lines, and not by the library: so checksums are taken of bytes on
their way from memory to the file, rather than of what came back from the disk, and tensors leave the GPU one by one.
The library reads these files by the keys in the manifest.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale_moe.checkpoint.boxes import Box
from megascale_moe.checkpoint.manifest import CODES, Manifest, StoredFile, StoredPiece, TensorPiece
from megascale_moe.config import ConfigError, require

BLOCK = 1 << 22


class Checksums:
    """CRC-32 of every block of BLOCK bytes (the last may be shorter) of what `add` is given."""

    def __init__(self) -> None:
        self.size = 0
        self.blocks: list[int] = []

    def add(self, data: memoryview) -> None:
        """Append bytes."""
        while len(data):
            if self.size % BLOCK == 0:
                self.blocks.append(0)
            head = data[: BLOCK - self.size % BLOCK]
            self.blocks[-1] = zlib.crc32(head, self.blocks[-1])
            self.size += len(head)
            data = data[len(head) :]


def write_pieces(path: Path, pieces: Iterable[TensorPiece], part: Manifest) -> None:
    """Write a file, force it to the disk and record it in `part`; raises ConfigError, OSError."""
    pieces = sorted(pieces, key=lambda piece: -piece.values.dtype.itemsize)  # each element aligned to its size
    for piece in pieces:
        piece.check()
    # The header of a safetensors file: its length, then JSON padded to 8 bytes.
    entries: dict[str, dict[str, Any]] = {}
    repeats: Counter[str] = Counter()
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.values.nbytes
        key = f"{piece.name}#{repeats[piece.name]}" if repeats[piece.name] else piece.name
        repeats[piece.name] += 1
        dtype, shape = CODES[piece.values.dtype], [piece.values.numel()]
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    for piece, (key, entry) in zip(pieces, entries.items(), strict=True):
        at, offset, size = len(header) + entry["data_offsets"][0], tuple(piece.offset), tuple(piece.size)
        stored = StoredPiece(path.name, key, at, offset, size, piece.start, piece.values.numel())
        part.add(piece.name, tuple(piece.shape), entry["dtype"], [stored])
    part.files[path.name] = _write(path, header, pieces)


def _write(path: Path, header: bytes, pieces: Iterable[TensorPiece]) -> StoredFile:
    sums = Checksums()
    values = (piece.values.detach().cpu().view(torch.uint8).numpy().data for piece in pieces)
    with path.open("wb") as stream:
        for data in chain([memoryview(header)], values):
            sums.add(data)
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(sums.size, sums.blocks)


class BlockFile:
    """A data file opened for reading: memory-mapped, each block checked before its first use."""

    def __init__(self, path: Path, stored: StoredFile) -> None:
        """Look at the size only; raises ConfigError if the file is missing, truncated or too long."""
        self._path, self._stored = path, stored
        self._checked: set[int] = set()
        require(path.is_file(), f"{path} is missing: the checkpoint is incomplete")
        size, wanted = path.stat().st_size, stored.size
        require(size == wanted, f"{path} has {size:,} bytes instead of {wanted:,}: the checkpoint is incomplete")

    @cached_property
    def _bytes(self) -> Tensor:
        return torch.from_file(str(self._path), shared=False, size=self._stored.size, dtype=torch.uint8)

    def values(self, at: int, stored: Box, part: Box, dtype: torch.dtype) -> Tensor:
        """Return a part of the box that is stored from byte `at` on, [*part.size], as a view of the mapped file.

        Only bytes from its first to its last are touched; raises ConfigError if they are damaged.
        """
        whole = self._bytes[at : at + stored.volume * dtype.itemsize].view(dtype).view(stored.size)
        values = whole[part.slices(stored.offset)]
        span = 1 + sum((extent - 1) * stride for extent, stride in zip(values.shape, values.stride(), strict=True))
        begin = int(values.storage_offset())
        self.check(begin * dtype.itemsize, (begin + span) * dtype.itemsize)
        return values

    def check(self, begin: int = 0, end: int | None = None) -> None:
        """Raise ConfigError unless the blocks that contain bytes `begin` to `end` are what was written."""
        end = self._stored.size if end is None else end
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            if block not in self._checked:
                data = self._bytes[block * BLOCK : (block + 1) * BLOCK]
                if zlib.crc32(data.numpy().data) != self._stored.blocks[block]:
                    raise ConfigError(f"{self._path} is damaged: wrong checksum after byte {block * BLOCK:,}")
                self._checked.add(block)
