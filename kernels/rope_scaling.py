"""Slower rotary frequencies, for texts longer than those of pre-training.

    f_i = theta^(-2i / K)   in radians per token, i = 0 ... K/2 - 1
    linear    f_i / s
    llama3    f_i / s for low frequencies, f_i for high ones, a mean of both between them
    yarn      the same with another mean; cosines and sines are multiplied by a factor m as well

Linear: Chen et al. 2023, https://arxiv.org/abs/2306.15595; llama3: Llama team 2024,
https://arxiv.org/abs/2407.21783; yarn: Peng et al. 2023, https://arxiv.org/abs/2309.00071.

Shape letters: K head dim.
Precision: float32, rounded in the order of operations of transformers' rope types of these names.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency is slower by one factor.

    Args:
        factor: how many times slower all frequencies turn; at least 1.
    """

    kind: Literal["linear"] = "linear"
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, periods: Tensor, theta: float) -> Tensor:
        """The frequencies (K/2,), in radians per token, in place of 1 / `periods`."""
        return 1.0 / periods / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's slowing of low frequencies.

    Args:
        factor: how many times slower the lowest frequencies turn; at least 1.
        low_freq_factor: frequencies that turn fewer times than this in `original_max_positions` tokens are
            slowed by all of `factor`; > 0.
        high_freq_factor: frequencies that turn more often than this stay as they are; those between the two
            are interpolated. Above `low_freq_factor`.
        original_max_positions: tokens that the model was pre-trained on.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_order("low_freq_factor", self.low_freq_factor, "high_freq_factor", self.high_freq_factor)
        _check_positions(self.original_max_positions)

    def frequencies(self, periods: Tensor, theta: float) -> Tensor:
        """As `LinearScaling.frequencies`."""
        frequencies, known = 1.0 / periods, self.original_max_positions
        wavelengths = 2 * math.pi / frequencies
        weight = (known / wavelengths - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - weight) * frequencies / self.factor + weight * frequencies
        is_low, is_high = (
            wavelengths > known / self.low_freq_factor,
            wavelengths < known / self.high_freq_factor,
        )
        return torch.where(is_high, frequencies, torch.where(is_low, frequencies / self.factor, between))


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's slowing of low frequencies.

    Args:
        factor: how many times slower the lowest frequencies turn; at least 1.
        original_max_positions: tokens that the model was pre-trained on.
        beta_fast: frequencies that turn more often than this in `original_max_positions` tokens stay as they
            are.
        beta_slow: frequencies that turn fewer times than this are slowed by all of `factor`; those between
            the two are interpolated. Positive and below `beta_fast`.
        attention_factor: cosines and sines are multiplied by it; positive. null: 0.1 ln(factor) + 1.
        truncate: begin and end the interpolation at a frequency, not between two.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = cast(float, None)
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_order("beta_slow", self.beta_slow, "beta_fast", self.beta_fast)
        _check_positions(self.original_max_positions)
        if self.attention_factor is None:
            object.__setattr__(self, "attention_factor", 0.1 * math.log(self.factor) + 1.0)
        if not 0 < self.attention_factor < math.inf:
            raise ValueError(f"attention_factor must be positive, got {self.attention_factor}")

    def frequencies(self, periods: Tensor, theta: float) -> Tensor:
        """As `LinearScaling.frequencies`; theta above 1."""
        dim = 2 * len(periods)

        def index(turns: float) -> float:  # i of the frequency that turns so often
            ratio = self.original_max_positions / (turns * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # as transformers: no division by zero
        steps = torch.arange(len(periods), dtype=torch.float32, device=periods.device)
        kept = 1 - ((steps - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor must be at least 1, got {factor}")


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"{low_name} must be positive and below {high_name} = {high}, got {low}")


def _check_positions(positions: int) -> None:
    if positions < 1:
        raise ValueError(f"original_max_positions must be at least 1, got {positions}")
