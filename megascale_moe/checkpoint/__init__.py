"""Checkpoints that a crash, a full disk or another layout cannot ruin. Read in this order:

    boxes      N-dimensional intervals: what a rank holds, what a rank wants, is every element there once
    manifest   which element of which tensor is where, as JSON
    files      the tensors' bytes: safetensors written with checksums, read with checks
    steps      folders `step-N`: publish, recover, prune, find the latest
    writer     `save`, called by every rank
    reader     `Checkpoint`, any box of any tensor from any pieces

    save(folder, step, pieces, extra, rank=rank, world=world, barrier=barrier, keep=2)   # on every rank
    checkpoint = Checkpoint(latest(folder))
    checkpoint.require({"parameters.norm.weight": (256,), ...})                          # another model? one line
    weight = checkpoint.read("parameters.layers.3.ffn.experts.w13", offset=(4, 0, 0), size=(4, 1024, 256))

Tensors are keyed by global name and global location, never by rank or local index, so a checkpoint has no layout:
experts saved by 8 ranks load on 2, optimizer state cut in flat ranges loads in other ranges.

Why not torch.distributed.checkpoint: its `.metadata` is a pickle, which executes what it contains; it keeps no
checksums, so a flipped byte loads silently; saving onto an existing step overwrites it in place, so a disk that fills
up destroys the old checkpoint with the new one. Here everything is safetensors and JSON, every byte read is checked,
and a step appears under its name by one rename after all of it is on the disk.

`save` copies and writes while training waits; the folder must be one that all ranks see.
"""

from megascale_moe.checkpoint.manifest import TensorPiece
from megascale_moe.checkpoint.reader import Checkpoint
from megascale_moe.checkpoint.steps import latest
from megascale_moe.checkpoint.writer import SaveError, save

__all__ = ["Checkpoint", "SaveError", "TensorPiece", "latest", "save"]
