"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to `final_lr_ratio` of the peak.

    Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    kind: Literal["cosine"] = "cosine"
    # Steps of linear warm-up. The last one of them has the peak rate.
    warmup_steps: int = 100
    # The last rate, as a share of the peak.
    final_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_schedule(self.warmup_steps, self.final_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, then linear decay over the last `decay_fraction` of the steps.

    Hu et al. 2024, arXiv:2404.06395.
    """

    kind: Literal["wsd"] = "wsd"
    # Steps of linear warm-up. The last one of them has the peak rate.
    warmup_steps: int = 100
    # The share of all steps in which the rate falls, at the end.
    decay_fraction: float = 0.2
    # The last rate, as a share of the peak.
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup_steps, self.final_lr_ratio)
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")


def lr_at(step: int, num_steps: int, peak_lr: float, schedule: CosineSchedule | WarmupStableDecay) -> float:
    """The learning rate of step `step`, counted from 1 to `num_steps`."""
    warmup = min(schedule.warmup_steps, num_steps)
    if step <= warmup:
        return peak_lr * step / warmup
    if isinstance(schedule, CosineSchedule):
        progress = (step - warmup) / max(1, num_steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1, min(round(num_steps * schedule.decay_fraction), num_steps - warmup))
        shape = min(1.0, (num_steps - step) / decay_steps)
    return peak_lr * (schedule.final_lr_ratio + (1 - schedule.final_lr_ratio) * shape)


def _check_schedule(warmup_steps: int, final_lr_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if not 0 <= final_lr_ratio <= 1:
        raise ValueError(f"final_lr_ratio must be in [0, 1], got {final_lr_ratio}")
