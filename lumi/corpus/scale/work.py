"""What all tasks know of a run: its config, its pieces of input, and where each stage leaves its results.

Results are whole or absent, so a task that was killed does again only what is not there yet.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lumi.config import from_dict, read_json, to_dict, write_json
from lumi.corpus.cache import SourceCache
from lumi.corpus.evaluation_sets import EvaluationSet
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.processing import RecordRules
from lumi.corpus.scale.units import Unit, list_units
from lumi.corpus.source_outcomes import inputs_key, open_cache, rules_of, source_key


class Work:
    """A run in a corpus folder.

    Args:
        output: the corpus folder.
        config: what to prepare.
        inputs_key: identifies config and inputs.
        units: the pieces of the input, each with the key of its cache.
    """

    def __init__(
        self, output: Path, config: PrepareConfig, inputs_key: str, units: list[tuple[Unit, str]]
    ) -> None:
        self.output, self.config, self.inputs_key, self._units = output, config, inputs_key, units
        self.units = [unit for unit, _ in units]
        self.folder = output / ".cache" / f"tasks-{inputs_key}"
        self.logs = output / ".cache" / "logs"
        self.decisions, self.shards = self.folder / "decisions", self.folder / "shards"

    @property
    def caches(self) -> list[SourceCache]:
        """The caches of all units."""
        return [self.cache(number) for number in range(len(self.units))]

    def save(self, sets: Sequence[EvaluationSet] = ()) -> None:
        """Write the plan, which `load_work` reads in every task, and the evaluation sets."""
        self.folder.mkdir(parents=True, exist_ok=True)
        units = [[unit.source_index, unit.path, key] for unit, key in self._units]
        plan = {"config": to_dict(self.config), "inputs_key": self.inputs_key, "units": units}
        write_json(self.folder / "evaluation_sets.json", sets)
        write_json(self.folder / "plan.json", plan)

    @functools.cached_property
    def sets(self) -> list[EvaluationSet]:
        """The evaluation sets, as the call read them that began the run."""
        return [EvaluationSet(*values) for values in read_json(self.folder / "evaluation_sets.json")]

    @functools.cached_property
    def rules(self) -> RecordRules:
        """The rules for a single record."""
        return rules_of(self.config, self.sets)

    def cache(self, number: int) -> SourceCache:
        """The outcomes of a unit, with the documents."""
        unit, key = self._units[number]
        return open_cache(self.output, unit.source(self.config.sources), key, writable=True)

    def index(self, number: int) -> Path:
        """The folder of what stage 1 leaves of a unit."""
        return self.folder / "index" / f"{number:06d}"

    def shared(self, row: int) -> Path:
        """The file of a row of keys that stage 2 leaves."""
        return self.folder / "shared" / f"{row:04d}.npy"

    def facts(self, number: int) -> dict[str, Any]:
        """What stage 1 says of a unit: `facts` of its source, and the documents in each part of its cache."""
        return read_json(self.index(number) / "unit.json")

    @functools.cached_property
    def offsets(self) -> "npt.NDArray[np.int64]":
        """(units + 1,) the number of the first document of each unit, and at the end that of all documents.

        Only documents that passed the filters have a number.
        """
        counts = [sum(self.facts(number)["parts"]) for number in range(len(self.units))]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def plan_work(
    output: Path, config: PrepareConfig, keys: dict[str, str], sets: Sequence[EvaluationSet] = ()
) -> Work:
    """Cut the input into pieces. `keys`: of all sources, by name. Raises UserError as `list_units` does."""
    found = list_units(config.sources)
    units = [(unit, source_key(unit.source(config.sources), config, sets)) for unit in found]
    return Work(output, config, inputs_key(config, keys), units)


def load_work(folder: str) -> Work:
    """The run whose plan lies in `folder`."""
    plan = read_json(Path(folder) / "plan.json")
    units = [(Unit(index, path), key) for index, path, key in plan["units"]]
    return Work(Path(folder).parents[1], from_dict(PrepareConfig, plan["config"]), plan["inputs_key"], units)
