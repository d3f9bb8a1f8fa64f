"""What surrounds the ranks of a job: starting them, joining them, agreeing on errors.

`megascale train` alone forks its own local ranks; under torchrun (or any launcher that sets RANK and WORLD_SIZE) the
process is one rank of a job that may span nodes. Errors a user can cause are found before ranks exist where possible;
where one rank finds one (a corpus that does not read), all ranks learn of it and end with the same status.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megascale_moe.comm.axis import Axes, connect, single
from megascale_moe.comm.lost import waiting
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, require

TIMEOUT = timedelta(minutes=30)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """This rank's place in a running job."""

    rank: int
    world: int
    local_rank: int
    axes: Axes
    device: torch.device

    @property
    def leads(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with waiting(self.axes["world"]):
                dist.barrier()

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; if it fails with a ConfigError on one, raise that error on all."""
        result, error = None, ""
        try:
            result = work()
        except ConfigError as problem:
            error = str(problem)
        errors = self._all_errors(error)
        if errors:
            raise ConfigError(errors[0])
        return result  # type: ignore[return-value]

    def from_lead(self, work: Callable[[], str]) -> str:
        """Run `work` on rank 0 only and give its text to all."""
        texts = [self.together(lambda: work() if self.leads else "")]
        if self.world > 1:
            dist.broadcast_object_list(texts, src=0)
        return texts[0]

    def on_each_node(self, work: Callable[[], str]) -> str:
        """Run `work` on the first rank of each node only, and give its text to that node's other ranks."""
        text = self.together(lambda: work() if self.local_rank == 0 else "")
        if self.world == 1:
            return text
        texts: list[tuple[str, str]] = [("", "")] * self.world
        dist.all_gather_object(texts, (os.uname().nodename, text))
        return text or next(value for node, value in texts if node == os.uname().nodename and value)

    def _all_errors(self, error: str) -> list[str]:
        if self.world == 1:
            return [error] if error else []
        errors = [""] * self.world
        dist.all_gather_object(errors, error)
        return [text for text in errors if text]


def under_launcher() -> bool:
    """True if a launcher such as torchrun started this process as one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def number(name: str, default: int) -> int:
    """A number that a launcher left in the environment."""
    text = os.environ.get(name, str(default))
    require(text.isascii() and text.isdigit(), f"environment variable {name} = {text!r}: must be a number")
    return int(text)


def local_rank_count(config: Config) -> int:
    """How many ranks to start here: as the config's mesh says, or one per GPU, or one."""
    p = config.parallel
    node = p.node or p.ep * p.etp
    if p.dp or node or p.pp > 1:
        return p.pp * max(p.dp, 1) * max(node, 1)
    return max(torch.cuda.device_count(), 1) if config.train.device != "cpu" else 1


def join(config: Config, mesh: Mesh) -> Job:
    """Become a rank: choose the device, join the process group if there are several ranks.

    Raises:
        ConfigError: the device does not exist, or the rendezvous address cannot be used.
    """
    rank, world, local_rank = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    device = _device(config, local_rank, number("LOCAL_WORLD_SIZE", local_rank + 1))
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (dist.DistError, ValueError, OSError) as error:
            address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"rank {rank}: rendezvous at {address} failed: {reason}; MASTER_ADDR and MASTER_PORT must name a free "
                "port on the machine of rank 0"
            ) from error
    axes = connect(mesh) if world > 1 else single()
    return Job(rank, world, local_rank, axes, device)


def check_device(config: Config, local_world: int) -> None:
    """Refuse train.device = 'cuda' where not every rank of this machine can have a GPU."""
    count = torch.cuda.device_count()
    require(
        config.train.device != "cuda" or count >= local_world,
        f"train.device = 'cuda': {local_world} ranks here, {count} GPUs visible; start fewer ranks or use 'cpu'",
    )


def _device(config: Config, local_rank: int, local_world: int) -> torch.device:
    """This rank's GPU if every rank of the machine can have one, else the CPU for all."""
    check_device(config, local_world)
    if config.train.device == "cpu" or torch.cuda.device_count() < local_world:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
