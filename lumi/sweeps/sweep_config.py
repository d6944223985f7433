"""What a sweep is told: where to search, with which seeds, at what cost, and when to give a setting up."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lumi.config import UserError

Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class GridSearch:
    """Every combination of the listed values."""

    kind: Literal["grid"] = "grid"
    # The values of each dotted key of the training config.
    values: dict[str, tuple[bool | int | float | str | None, ...]]

    def __post_init__(self) -> None:
        _check_keys(self.values)
        for key, values in self.values.items():
            _check_choices(f"values.{key}", values)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Each value as likely as the others."""

    kind: Literal["choice"] = "choice"
    # Those to choose from.
    values: tuple[bool | int | float | str | None, ...]

    def __post_init__(self) -> None:
        _check_choices("values", self.values)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A number between two."""

    kind: Literal["uniform"] = "uniform"
    # The lowest number.
    low: float
    # The highest number.
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError("high", f"must be above low = {self.low:g}", got=self.high)


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """A positive number between two; each factor is as likely as another, as suits a learning rate."""

    kind: Literal["log_uniform"] = "log_uniform"
    # The lowest number, above 0.
    low: float
    # The highest number.
    high: float

    def __post_init__(self) -> None:
        if not self.low > 0:
            raise UserError("low", "must be above 0", got=self.low)
        if not self.low < self.high:
            raise UserError("high", f"must be above low = {self.low:g}", got=self.high)


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Settings drawn at random. The first ones stay the same when the budget is raised."""

    kind: Literal["random"] = "random"
    # What each dotted key of the training config is drawn from.
    values: dict[str, Choice | Uniform | LogUniform]
    # Decides what is drawn.
    seed: int = 0

    def __post_init__(self) -> None:
        _check_keys(self.values)


@dataclass(frozen=True, kw_only=True)
class Contenders:
    """Recipes side by side, each tuned by a grid of its own.

    All settings are trained with the first seed, and the best of each contender with the other seeds.
    """

    kind: Literal["contenders"]
    # By each contender's name: the values of each dotted key of the training config.
    grids: dict[str, dict[str, tuple[bool | int | float | str | None, ...]]]

    def __post_init__(self) -> None:
        if not self.grids:
            raise UserError("grids", "must name at least one contender", got="none")
        for name, values in self.grids.items():
            _check_keys(values, f"grids.{name}")
            for key, choices in values.items():
                _check_choices(f"grids.{name}.{key}", choices)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sweep may cost. It may be changed when a sweep goes on."""

    # Runs, those of each seed counted; a grid that has more is tried in a random order as far as they reach;
    # null: the whole grid.
    trials: int | None = None
    # Minutes of one call; what has begun then is saved, and the next call goes on; null: no limit.
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise UserError("trials", "must be at least 1", got=self.trials)
        if self.minutes is not None and not self.minutes > 0:
            raise UserError("minutes", "must be above 0", got=self.minutes)


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving: at each rung only the settings with the lowest held-out loss go on.

    Jamieson & Talwalkar 2016, arXiv:1502.07943.
    """

    # Steps at which settings are compared, each one that validates, in ascending order.
    rungs: tuple[int, ...]
    # The share of the settings that goes on from a rung; at least one does.
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not self.rungs or self.rungs[0] < 1 or list(self.rungs) != sorted(set(self.rungs)):
            raise UserError("rungs", "must be ascending steps from 1 on", got=list(self.rungs))
        if not 0 < self.keep < 1:
            raise UserError("keep", "must be between 0 and 1", got=self.keep)

    def survivors(self, num_settings: int) -> int:
        """How many of these settings go on from a rung."""
        return max(1, math.ceil(self.keep * num_settings))


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search for the best settings of a training."""

    # The training config that every trial changes; a relative path begins at this file's folder.
    config: str
    # Which keys are changed, and to what.
    search: GridSearch | RandomSearch | Contenders
    # Each setting is trained with each of these seeds; with contenders, only the best of each is.
    seeds: tuple[int, ...] = (0,)
    # What it may cost.
    budget: Budget = field(default_factory=Budget)
    # When settings are given up; null: all are trained to the end.
    halving: Halving | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds", "must be one or more numbers, all different", got=list(self.seeds))
        trials = self.budget.trials
        if trials is None and isinstance(self.search, RandomSearch):
            raise UserError("budget.trials", "must say how many runs a random search may take", got="null")
        if trials is not None and trials < len(self.seeds):
            expectation = f"must be at least {len(self.seeds)}, one for each of the seeds"
            raise UserError("budget.trials", expectation, got=trials)
        if isinstance(self.search, Contenders):
            expectation = "must be null with contenders, which are all trained to the end"
            if trials is not None:
                raise UserError("budget.trials", expectation, got=trials)
            if self.halving is not None:
                raise UserError("halving", expectation, got="rungs")

    @property
    def num_settings(self) -> int | None:
        """How many settings the budget pays for; None: any number."""
        return None if self.budget.trials is None else self.budget.trials // len(self.seeds)


def _check_keys(values: Mapping[str, object], name: str = "values") -> None:
    if not values:
        raise UserError(name, "must name at least one key of the training config", got="none")
    if "seed" in values:
        raise UserError(f"{name}.seed", "must be left out", remedy="put the numbers into seeds")


def _check_choices(name: str, values: tuple[Value, ...]) -> None:
    if not values:
        raise UserError(name, "must list at least one value", got="none")
