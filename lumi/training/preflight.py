"""A rehearsal before step 1: a micro-step, a validation, a save.

What would fail after a night, for want of memory or of room on the disk, fails at once.
"""

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lumi.host.storage import REHEARSAL
from lumi.parallel.world import World


class Rehearsal(NamedTuple):
    """What was measured.

    Attributes:
        micro_step, last_micro_step: seconds; the last one of a step exchanges gradients.
        validation: seconds of one batch; None: there is nothing to validate.
        save, stall: seconds of a save, and those that the loop waits for it.
        peak_bytes: of memory, so far; None where the system does not count it.
    """

    micro_step: float
    last_micro_step: float
    validation: float | None
    save: float
    stall: float
    peak_bytes: int | None

    def describe(self, micro_steps: int, num_steps: int) -> str:
        """One line for people. The step's time is without the optimizer's."""
        step = self.micro_step * (micro_steps - 1) + self.last_micro_step
        parts = [
            f"a step takes about {_duration(step)}",
            f"{num_steps:,} steps {_duration(step * num_steps)}",
        ]
        parts += [] if self.validation is None else [f"a batch of validation {_duration(self.validation)}"]
        parts.append(f"a save {_duration(self.save)} (the loop waits {_duration(self.stall)})")
        parts += [] if self.peak_bytes is None else [f"peak memory {self.peak_bytes / 2**20:,.0f} MiB"]
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
        micro_step: forward and backward of one micro-batch; True: of the last one of a step.
        validate: validates one batch; None where there is nothing to validate.
        save: saves a whole checkpoint into a folder, and returns the seconds that the loop would wait.
        folder: where checkpoints will be. What the rehearsal saves there is deleted.

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
    _wait(world)
    start = time.perf_counter()
    work()
    _wait(world)
    return time.perf_counter() - start


def _wait(world: World) -> None:
    """Wait for this process's GPU, and then for all processes."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.sum(0)


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes


def _duration(seconds: float) -> str:
    """0.0123 -> '12.3 ms', 5000 -> '1 h 23 min'."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
