"""Before step 1: the micro-batch that fits into memory, the time that the run will take, and a rehearsal of evaluating and saving.

What would fail after an hour or a night, for want of memory or of room on the disk, fails here, at once.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lumi.config import UserError
from lumi.parallel import World
from lumi.plan import memory_of
from lumi.run_config import TrainConfig
from lumi.storage import TEMPORARY_PREFIX

USABLE = 0.9  # of the memory that is free: the estimate knows nothing of torch's own, fragments and peaks between
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def free_memory(device: torch.device) -> int | None:
    """Bytes that one process may take: free on its GPU, or its share of what is free on this machine or left to its container; None
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: list[int] = []
    with contextlib.suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, use in zip(_CGROUP_LIMITS, _CGROUP_USES, strict=True):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            free.append(int(Path(limit).read_text()) - int(Path(use).read_text()))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if free else None


def choose_micro_batch(config: TrainConfig, world: World, kernels: str, free: int | None, num_trained: int | None) -> TrainConfig:
    """The config with the largest micro-batch that fits into every process's free memory, where it asks for "auto". The batch stays as it
    is: more rows at a time are fewer micro-steps.

    Args:
        kernels: the name of the operators in use.
        free: `free_memory` before the model was built.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.

    Raises:
        UserError: `batch_tokens` does not come out even, the system does not say what is free, or not even one row fits.
    """
    if config.batches.micro_batch_size != "auto":
        return config
    sized = [with_micro_batch(config, 1)]
    rows = sized[0].batches.micro_steps(world.layout.data)  # of one process in a step
    sized = [with_micro_batch(config, size) for size in range(rows, 0, -1) if rows % size == 0]
    free = int(world.least(free or 0))
    if not free:
        raise UserError('batches.micro_batch_size must be a number on this system, which does not say how much memory is free, got "auto"')
    for candidate in sized:
        needed = memory_of(candidate, world.layout, world.device.type, kernels, num_trained)["total"]
        if needed <= USABLE * free:
            return candidate
    raise UserError(
        f"a process needs about {needed / 2**20:,.0f} MiB for micro-batches of one row, and has {USABLE * free / 2**20:,.0f} MiB "
        f"({USABLE:.0%} of what is free); set gradient_checkpointing, a larger parallel.shard, or a smaller model"
    )


def with_micro_batch(config: TrainConfig, size: int) -> TrainConfig:
    """The config with a micro-batch of `size` rows."""
    return dataclasses.replace(config, batches=dataclasses.replace(config.batches, micro_batch_size=size))


class Rehearsal(NamedTuple):
    """What was measured: seconds of a micro-step, of a batch of validation (None: there is none), of a save, and that the loop waits for
    it; bytes at the peak so far."""

    micro_step: float
    validation: float | None
    save: float
    stall: float
    peak_bytes: int

    def describe(self, micro_steps: int, num_steps: int) -> str:
        """One line for people; the step is that of its micro-steps, without optimizer and communication."""
        step = self.micro_step * micro_steps
        parts = [f"a step takes about {_duration(step)}", f"{num_steps:,} steps {_duration(step * num_steps)}"]
        parts += [] if self.validation is None else [f"a batch of validation {_duration(self.validation)}"]
        parts += [
            f"a save {_duration(self.save)} (the loop waits {_duration(self.stall)})",
            f"peak memory {self.peak_bytes / 2**20:,.0f} MiB",
        ]
        return "preflight: " + ", ".join(parts)


def rehearse(
    micro_step: Callable[[], None], validate: Callable[[], None] | None, save: Callable[[Path], float], folder: Path, world: World
) -> Rehearsal:
    """Run the parts of a run once, on all processes together.

    Args:
        micro_step: forward and backward of one micro-batch.
        validate: an evaluation of one batch; None where there is nothing to evaluate.
        save: saves a whole checkpoint into a folder, and returns the seconds that the loop would wait.
        folder: where checkpoints will be; what is saved there is removed again.

    Raises:
        UserError: what one of them raises, such as for a full disk.
    """
    micro_step()  # the first one compiles, and allocates
    seconds = _seconds(micro_step, world)
    validation = None if validate is None else _seconds(validate, world)
    place = folder / f"{TEMPORARY_PREFIX}rehearsal"
    stalls: list[float] = []
    try:
        saving = _seconds(lambda: stalls.append(save(place)), world)
    finally:
        if world.is_main:
            shutil.rmtree(place, ignore_errors=True)
    return Rehearsal(seconds, validation, saving, stalls[0], _peak_bytes(world.device))


def _seconds(work: Callable[[], None], world: World) -> float:
    """Seconds until the slowest process has done it."""
    world.sum(0)
    start = time.perf_counter()
    work()
    world.sum(0)  # waits for all, and for the GPU
    return time.perf_counter() - start


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    """0.0123 -> '12.3 ms', 5000 -> '1 h 23 min'."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
