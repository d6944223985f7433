"""A sweep's config -> its settings: which changes of the training config are tried."""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.config import UserError, differences, load_config, to_dict
from lumi.sweeps.sweep_config import (
    Choice,
    Contenders,
    GridSearch,
    Halving,
    LogUniform,
    RandomSearch,
    SweepConfig,
    Uniform,
    Value,
)
from lumi.training.run_config import TrainConfig

MOST_DRAWS = 1000  # in a row that bring nothing new: then there is nothing new to draw
# What must be equal for two held-out losses of the same step to be comparable.
_COMPARED = ("num_steps", "optimizer.schedule", "batches.batch_tokens", "validation_tokens")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One change of the training config.

    Attributes:
        index: its number in the sweep, from 0.
        values: by dotted key.
        config: the whole training config that they give.
        contender: whose setting it is; empty where the sweep has no contenders.
    """

    index: int
    values: Mapping[str, Value]
    config: TrainConfig
    contender: str = ""

    @property
    def overrides(self) -> list[str]:
        """The values, as the command line of a training takes them."""
        return [f"{key}={text_of(value)}" for key, value in self.values.items()]

    @property
    def name(self) -> str:
        """The contender and the values, for people."""
        return " ".join([*([f"{self.contender}:"] if self.contender else []), *self.overrides])


def make_settings(sweep: SweepConfig, base: Path) -> list[Setting]:
    """The settings that the budget pays for, in an order that a higher budget only continues.

    Args:
        base: the training config that is changed.

    Raises:
        UserError: a value that the training config does not take, two settings that are equal, too few that
            differ, or such as halving cannot compare.
    """
    search = sweep.search
    drawn = _draws(search) if isinstance(search, RandomSearch) else _listed(search)
    settings: list[Setting] = []
    seen: dict[str, str] = {}
    misses = 0
    for contender, values in drawn:
        if len(settings) == sweep.num_settings:
            break
        setting = _setting(len(settings), contender, values, base)
        content = json.dumps(to_dict(setting.config))
        if content not in seen:
            seen[content], misses = setting.name, 0
            settings.append(setting)
        elif not isinstance(search, RandomSearch):
            raise UserError(
                "search: settings", "must differ", got=f"{seen[content]} and {setting.name}, which are equal"
            )
        elif (misses := misses + 1) == MOST_DRAWS:
            most = len(settings) * len(sweep.seeds)
            expectation = f"must be at most {most}, as search has only {len(settings)} settings that differ"
            raise UserError("budget.trials", expectation, got=sweep.budget.trials)
    _check_trainable(settings[0].config, base)
    if sweep.halving is not None:
        _check_halving(sweep.halving, settings)
    return settings


def _listed(search: GridSearch | Contenders) -> list[tuple[str, dict[str, Value]]]:
    """All combinations: those of a grid in a random order that is always the same, contenders' as given."""
    if isinstance(search, Contenders):
        grids = search.grids.items()
        return [(name, values) for name, grid in grids for values in _combinations(grid)]
    settings = _combinations(search.values)
    random.Random(0).shuffle(settings)
    return [("", values) for values in settings]


def _combinations(grid: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _draws(search: RandomSearch) -> Iterator[tuple[str, dict[str, Value]]]:
    generator = random.Random(search.seed)
    while True:
        yield "", {key: _draw(source, generator) for key, source in search.values.items()}


def _draw(source: Choice | Uniform | LogUniform, generator: random.Random) -> Value:
    """A value. Four digits are enough, and can be read."""
    if isinstance(source, Choice):
        return generator.choice(source.values)
    if isinstance(source, Uniform):
        return float(f"{generator.uniform(source.low, source.high):.4g}")
    return float(f"{math.exp(generator.uniform(math.log(source.low), math.log(source.high))):.4g}")


def _setting(index: int, contender: str, values: Mapping[str, Value], base: Path) -> Setting:
    overrides = [f"{key}={text_of(value)}" for key, value in values.items()]
    try:
        config = load_config(TrainConfig, base, overrides)
    except UserError as error:
        raise error.within(f"search: {' '.join(overrides)}") from error
    return Setting(index=index, values=values, config=config, contender=contender)


def text_of(value: Value) -> str:
    """A value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _check_trainable(config: TrainConfig, base: Path) -> None:
    if config.model is None or config.lora is not None or config.dpo is not None:
        got = "no model" if config.model is None else "lora" if config.lora is not None else "dpo"
        expectation = "must be one of pre-training, with a model and without lora and dpo"
        raise UserError(f"{base}:", expectation, got=got)


def _check_halving(halving: Halving, settings: Sequence[Setting]) -> None:
    """Raises UserError for a rung that measures nothing, and for settings that a rung cannot compare."""
    first = _compared(settings[0].config)
    for setting in settings:
        if changed := differences(first, _compared(setting.config)):
            expectation = f"must be null where settings differ in {' or '.join(_COMPARED)}"
            remedy = "losses of the same step say nothing then"
            got = f"{setting.name}: {changed[0]}"
            raise UserError("halving", expectation, got=got, remedy=remedy)
        config = setting.config
        for rung in halving.rungs:
            if rung >= config.num_steps:
                expectation = f"must be below num_steps = {config.num_steps}"
                raise UserError("halving.rungs", expectation, got=rung)
            if rung % config.validate_every and rung % config.save_every:
                expectation = f"must be multiples of validate_every = {config.validate_every}"
                raise UserError("halving.rungs", expectation, got=rung)


def _compared(config: TrainConfig) -> dict[str, Any]:
    return {
        "num_steps": config.num_steps,
        "optimizer": {"schedule": to_dict(config.optimizer.schedule)},
        "batches": {"batch_tokens": config.batches.batch_tokens},
        "validation_tokens": config.validation_tokens,
    }
