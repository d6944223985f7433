"""The stages of `lumi prepare` in their order, and how many tasks each can use."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lumi.corpus.scale.deciding import decide
from lumi.corpus.scale.keys import count_rows
from lumi.corpus.scale.reading import read_units
from lumi.corpus.scale.sharing import share_rows
from lumi.corpus.scale.writing import publish_corpus, write_shards


class Stage(NamedTuple):
    """A function (work, rank, number of tasks), and into how many tasks its work can be cut at most."""

    run: Callable[[Any, int, int], None]
    most_tasks: Callable[[Any], float]


STAGES = {
    "read": Stage(read_units, lambda work: len(work.units)),
    "share": Stage(share_rows, lambda work: count_rows(work.config.deduplication)),
    "decide": Stage(decide, lambda _: 1),
    "write": Stage(write_shards, lambda _: float("inf")),  # how many shards there are is not known before
    "publish": Stage(publish_corpus, lambda _: 1),
}


def tasks_of_stages(stages: Mapping[str, Stage], work: Any, num_tasks: int) -> dict[str, int]:
    """The tasks of each stage by its name, if there may be `num_tasks`; those without work are left out."""
    tasks = {name: int(min(num_tasks, stage.most_tasks(work))) for name, stage in stages.items()}
    return {name: count for name, count in tasks.items() if count}
