"""Before step 1: the micro-batch that fits into memory, the time that the run will take, and a rehearsal of evaluating and saving.

What would fail after an hour or a night, for want of memory or of room on the disk, fails here, at once.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lumi.config import UserError
from lumi.host.storage import REHEARSAL
from lumi.parallel.world import World
from lumi.training.memory import memory_of
from lumi.training.run_config import TrainConfig

USABLE = (
    0.9  # of the memory that is free: the estimate knows nothing of torch's own, fragments and peaks between
)
_CGROUPS = (  # folder, limit, use, and what of it are pages of files, which make way: in the two generations of control groups
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that one process may take: free on its GPU, or its share of what is free on this machine or left to its container; None
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: list[int] = []
    with contextlib.suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for folder, limit, use, pages in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            held = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            cached = sum(int(held.get(kind, 0)) for kind in pages)
            free.append(int(Path(folder, limit).read_text()) - int(Path(folder, use).read_text()) + cached)
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if free else None


def choose_micro_batch(
    config: TrainConfig,
    world: World,
    kernels: str,
    free: int | None,
    num_trained: int | None,
    before: int | None = None,
) -> TrainConfig:
    """The config with the largest micro-batch that fits into every process's free memory, where it asks for "auto". The batch stays as it
    is: more rows at a time are fewer micro-steps.

    Args:
        kernels: the name of the operators in use.
        free: `free_memory` before the model was built.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.
        before: the micro-batch that the run had until now, which it keeps where that fits: another would round otherwise.

    Raises:
        UserError: `batch_tokens` does not come out even, the system does not say what is free, or not even one row fits.
    """
    if config.batches.micro_batch_size != "auto":
        return config
    sized = [with_micro_batch(config, 1)]
    rows = sized[0].batches.micro_steps(world.layout.data)  # of one process in a step
    sizes = [size for size in (before or 0, *range(rows, 0, -1)) if size and rows % size == 0]
    sized = [with_micro_batch(config, size) for size in sizes]
    free = int(world.least(free or 0))
    if not free:
        raise UserError(
            'batches.micro_batch_size must be a number on this system, which does not say how much memory is free, got "auto"'
        )
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
    """What was measured: seconds of a micro-step, of the last one of a step, of a batch of validation (None: there is none), of a save, and
    that the loop waits for it; bytes at the peak so far."""

    micro_step: float
    last_micro_step: float
    validation: float | None
    save: float
    stall: float
    peak_bytes: int

    def describe(self, micro_steps: int, num_steps: int) -> str:
        """One line for people; the optimizer's time is not in the step's."""
        step = self.micro_step * (micro_steps - 1) + self.last_micro_step
        parts = [
            f"a step takes about {_duration(step)}",
            f"{num_steps:,} steps {_duration(step * num_steps)}",
        ]
        parts += [] if self.validation is None else [f"a batch of validation {_duration(self.validation)}"]
        parts += [
            f"a save {_duration(self.save)} (the loop waits {_duration(self.stall)})",
            f"peak memory {self.peak_bytes / 2**20:,.0f} MiB",
        ]
        return "preflight: " + ", ".join(parts)


def rehearse(
    micro_step: Callable[[bool], None],
    validate: Callable[[], None] | None,
    save: Callable[[Path], float],
    folder: Path,
    world: World,
) -> Rehearsal:
    """Run the parts of a run once, on all processes together.

    Args:
        micro_step: forward and backward of one micro-batch; True: of the last one of a step, after which gradients are exchanged.
        validate: an evaluation of one batch; None where there is nothing to evaluate.
        save: saves a whole checkpoint into a folder, and returns the seconds that the loop would wait.
        folder: where checkpoints will be; what is saved there is removed again.

    Raises:
        UserError: what one of them raises, such as for a full disk.
    """
    inner, last = (_seconds(partial(micro_step, is_last), world) for is_last in (False, True))
    validation = None if validate is None else _seconds(validate, world)
    place = folder / REHEARSAL
    stalls: list[float] = []
    try:
        saving = _seconds(lambda: stalls.append(save(place)), world)
    finally:
        if world.is_main:
            shutil.rmtree(place, ignore_errors=True)
    return Rehearsal(inner, last, validation, saving, stalls[0], _peak_bytes(world.device))


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
