"""Loading: any box of any tensor, from whatever pieces it was saved in.

A request is cut into boxes, like the pieces were; what both have in common is copied. Files are memory-mapped and only
the blocks that a request touches are read, checked and then used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale_moe.config import ConfigError, require
from megascale_moe.train.checkpoint.boxes import Box, Index, intersect
from megascale_moe.train.checkpoint.files import BlockFile
from megascale_moe.train.checkpoint.manifest import DTYPES, MANIFEST, Manifest, StoredPiece, check_range


class Checkpoint:
    """A complete checkpoint on the disk, a folder `step-N`.

    Opening it reads the manifest and the sizes of the files; raises ConfigError if the folder is no checkpoint, of
    another format version, damaged or incomplete. Whatever is read later is checked first: a ConfigError names the
    damaged file. Ranks open it independently of each other.
    """

    step: int
    extra: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]  # name of every global tensor -> shape

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest_file = folder / MANIFEST
        require(manifest_file.is_file(), f"{folder} is not a checkpoint: there is no {MANIFEST} in it")
        manifest = Manifest.read(manifest_file)
