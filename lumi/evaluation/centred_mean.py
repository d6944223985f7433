"""One figure for many tasks: the mean of their accuracies, each centred on guessing.

(acc - chance) / (1 - chance) is 0 for guessing and 1 for a model that is always right. DataComp-LM's CORE (Li
et al. 2024, arXiv:2406.11794) is the mean of that over its own 22 tasks, with prompts and examples of its
own. Here it is the mean over the tasks of one evaluation: it compares with the same tasks alone.
"""

import math
from collections.abc import Mapping
from typing import Any


def centred_mean(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean over tasks as an evaluation writes them; None: there are fewer than two.

    Returns:
        `value`; `stderr`, of independent tasks (None: a task has one example); `tasks`, by name.
    """
    if len(tasks) < 2:
        return None
    parts = [
        ((task["acc"] - task["chance"]) / (1 - task["chance"]), task["acc_stderr"], 1 - task["chance"])
        for task in tasks.values()
    ]
    errors = [stderr / room for _, stderr, room in parts if stderr is not None]
    whole = len(errors) == len(parts)
    return {
        "value": math.fsum(value for value, *_ in parts) / len(parts),
        "stderr": math.hypot(*errors) / len(parts) if whole else None,
        "tasks": list(tasks),
    }
