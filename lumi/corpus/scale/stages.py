"""The stages in their order, and how many tasks each can use."""

from collections.abc import Callable
from typing import NamedTuple

from lumi.corpus.scale.deciding import decide
from lumi.corpus.scale.keys import count_rows
from lumi.corpus.scale.reading import read_units
from lumi.corpus.scale.sharing import share_rows
from lumi.corpus.scale.work import Work
from lumi.corpus.scale.writing import publish_corpus, write_shards


class Stage(NamedTuple):
    """A function (work, rank, number of tasks), and into how many tasks its work can be cut at most."""

    run: Callable[[Work, int, int], None]
    most_tasks: Callable[[Work], float]


STAGES = {
    "read": Stage(read_units, lambda work: len(work.units)),
    "share": Stage(share_rows, lambda work: count_rows(work.config.deduplication)),
    "decide": Stage(decide, lambda _: 1),
    "write": Stage(write_shards, lambda _: float("inf")),  # how many shards there are is not known before
    "publish": Stage(publish_corpus, lambda _: 1),
}


def tasks_of_stages(work: Work, num_tasks: int) -> dict[str, int]:
    """The tasks of each stage by its name, if there may be `num_tasks`; those without work are left out."""
    tasks = {name: int(min(num_tasks, stage.most_tasks(work))) for name, stage in STAGES.items()}
    return {name: count for name, count in tasks.items() if count}
