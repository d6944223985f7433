"""Solved examples before each question, drawn and joined as lm-evaluation-harness does it.

The harness draws anew for each question, in the order of the records, from one generator (seed 1234). Where
the examples may hold the question itself, it leaves that one out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lumi.config import UserError
from lumi.corpus.raw_records import Fields
from lumi.corpus.sources import HubDataset, JsonFiles, JsonlFiles

DELIMITER = "\n\n"  # between examples
_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Solved examples before each question."""

    # How many before each question.
    num_fewshot: int
    # The records that become examples: the harness takes the dataset's training split.
    source: HubDataset | JsonlFiles | JsonFiles
    # "random": others for each question; "first_n": the first ones of `source`.
    sampler: Literal["random", "first_n"] = "random"

    def __post_init__(self) -> None:
        if self.num_fewshot < 1:
            raise ValueError(f"num_fewshot must be at least 1, got {self.num_fewshot}")


def draw(
    config: FewShotConfig, pool: Sequence[Fields], records: Sequence[Fields], leave_out_itself: bool
) -> list[list[int]]:
    """For each of `records` the places of its examples in `pool`.

    Args:
        leave_out_itself: no record equal to the question becomes its example. The harness then draws one
            more than it needs.

    Raises:
        UserError: `pool` has too few records.
    """
    number = config.num_fewshot
    needed = number + 1 if leave_out_itself else number
    if len(pool) < needed:
        raise UserError("few_shot.source", f"must hold at least {needed} records", got=len(pool))
    places, rng = range(len(pool)), random.Random(_SEED)
    drawn = []
    for record in records:
        excluded = record if leave_out_itself else None
        if config.sampler == "first_n":
            chosen = _others(places, pool, excluded, number)
        else:
            chosen = _others(rng.sample(places, needed), pool, excluded, number)
            if len(chosen) < number:  # the question stands in the pool more than once
                others = _others(places, pool, excluded)
                chosen = rng.sample(others, number) if len(others) >= number else others
        if len(chosen) < number:
            expectation = f"must hold at least {number} records that differ from each question"
            raise UserError("few_shot.source", expectation, got=len(chosen))
        drawn.append(chosen)
    return drawn


def _others(
    places: Sequence[int], pool: Sequence[Fields], excluded: Fields | None, most: int | None = None
) -> list[int]:
    """The first `most` places whose record is not the excluded one."""
    return list(islice((place for place in places if pool[place] != excluded), most))
