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
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megascale_moe.config import ConfigError
from megascale_moe.train.checkpoint.manifest import CODES, Manifest, Piece, StoredFile, StoredPiece

BLOCK = 1 << 22


def write_pieces(path: Path, pieces: Iterable[Piece], part: Manifest) -> None:
    """Write a file, force it to the disk and record it in `part`; raises ConfigError, OSError."""
    aligned = sorted(pieces, key=lambda piece: -piece.values.dtype.itemsize)
    header = _lay_out(path.name, aligned, part)
    with path.open("wb") as stream:
        blocks = [zlib.crc32(b"")]
        size = 0
        for data in _contents(header, aligned):
            stream.write(data)
            while data:
                data = _checksum_into(blocks, size, data)
