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
        for text in filter(None, self._all(error)):
            raise ConfigError(text)
        return result  # type: ignore[return-value]

    def from_lead(self, work: Callable[[], str]) -> str:
        """Run `work` on rank 0 only and give its text to all."""
        return self._all(self.together(lambda: work() if self.leads else ""))[0]

    def on_each_node(self, work: Callable[[], str]) -> str:
        """Run `work` on the first rank of each node only, and give its text to that node's other ranks."""
        text, here = self.together(lambda: work() if self.local_rank == 0 else ""), os.uname().nodename
        texts = [value for node, value in self._all((here, text)) if node == here and value]
        return text or texts[0]

    def _all(self, value: Result) -> list[Result]:
        """Return the value of every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


def under_launcher() -> bool:
    """Return whether a launcher such as torchrun started this process as one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def number(name: str, default: int) -> int:
    """Return a number that a launcher left in the environment.

    Raises:
        ConfigError: the variable is set to something else.
    """
    text = os.environ.get(name, str(default))
    require(text.isascii() and text.isdigit(), f"environment variable {name} = {text!r}: must be a number")
    return int(text)


def local_rank_count(config: Config) -> int:
    """Return how many ranks to start here: as the config's mesh says, or one per GPU, or one."""
    parallel = config.parallel
    node = parallel.node or parallel.ep * parallel.etp
    if parallel.dp or node or max(parallel.pp, parallel.cp) > 1:
        return parallel.pp * max(parallel.dp, 1) * parallel.cp * max(node, 1)
    return max(torch.cuda.device_count(), 1) if config.train.device != "cpu" else 1


def join(config: Config, mesh: Mesh) -> Job:
    """Become a rank: choose the device, the CPU unless all ranks of the machine can have a GPU; join the process group
    if there are several ranks.

    Raises:
        ConfigError: the device does not exist, or the rendezvous address cannot be used.
    """
    rank, world, local_rank = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    local_world = number("LOCAL_WORLD_SIZE", local_rank + 1)
    check_device(config, local_world)
    device = torch.device("cpu")
    if config.train.device != "cpu" and torch.cuda.device_count() >= local_world:  # every rank here can have a GPU
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
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
