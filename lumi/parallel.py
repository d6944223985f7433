"""The processes of a run: torch's process group (NCCL on CUDA, gloo on the CPU) and data parallelism (torch's DDP)."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lumi.config import UserError


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup  # on the CPU, without the time limit of a step: for what takes the main process hours

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes, as float64: exact for counts below 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something in the main process while the others wait, however long it takes.

        Raises:
            UserError: what `work` raised. The others then leave with exit code 2: one message is enough.
        """
        message: list[str | None] = [None]
        if self.is_main:
            try:
                work()
            except UserError as error:
                message = [str(error)]
        dist.broadcast_object_list(message, src=0, group=self.patient)
        if message[0] is not None:
            if self.is_main:
                raise UserError(message[0])
            raise SystemExit(2)

    def all_equal(self, value: int) -> bool:
        """Whether all processes hold the same integer."""
        total, squares = self.sum(value, value * value)
        return total * total == squares * self.size


def choose_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is CUDA where there is one. Raises UserError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('--device must be "cpu" or "auto" on this machine, got "cuda": torch sees no CUDA device')
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Join the group that torchrun describes in the environment, or make a group of one; leave it at the end.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one.

    Raises:
        UserError: if CUDA is asked for and absent, or a node starts more processes than it has GPUs.
    """
    device = choose_device(device)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc-per-node must be at most {torch.cuda.device_count()} (GPUs here), got {local_rank + 1}")
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield World(dist.get_rank(), dist.get_world_size(), torch.device(f"cuda:{local_rank}" if device == "cuda" else "cpu"), patient)
    finally:
        dist.destroy_process_group()


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """The model with gradients averaged over all processes; one process needs no wrapping."""
    return DistributedDataParallel(model) if world.size > 1 else model


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Reduce gradients in this micro-step's backward, or (`enabled=False`) leave it to a later one."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()
