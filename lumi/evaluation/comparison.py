"""`lumi compare`: is one model better than another on the same questions, or is it luck?

The questions decide much of a figure, and both models were asked the same ones. So the test is on the
differences, question by question: their mean, its standard error, and the p-value of a sign-flip test (Fisher
1935). If the models were equally good, each difference could as well have the other sign. The p-value is the
share of such flips whose mean is at least as far from 0.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lumi.config import UserError
from lumi.evaluation.examples import METRICS, Row, read_examples
from lumi.evaluation.multiple_choice import mean
from lumi.evaluation.report import columns

_FLIPS = 9999
_NUMBERS = 4_000_000  # signs at once: 32 MB


class Difference(NamedTuple):
    """A metric of a task in evaluations A and B, and the mean of B - A over the examples."""

    task: str
    metric: str
    a: float
    b: float
    difference: float
    stderr: float | None
    p_value: float
    examples: int


def compare(a: Path, b: Path) -> tuple[list[Difference], list[str]]:
    """Every metric of the tasks that both evaluations have, and a note for each task that one alone has.

    Raises:
        UserError: both are one folder, a folder holds no examples, no task is in both, or a task has other
            questions in A than in B.
    """
    if a.resolve() == b.resolve():
        raise UserError("EVALUATION_B", "must be another folder than EVALUATION_A", got=str(b))
    rows_a, rows_b = read_examples(a), read_examples(b)
    common = [task for task in rows_a if task in rows_b]
    if not common:
        got = f"{', '.join(rows_a)} and {', '.join(rows_b)}"
        raise UserError("the evaluations", "must have a task of one name", got=got)
    notes = [f"{task} is in {a} alone" for task in rows_a if task not in rows_b]
    notes += [f"{task} is in {b} alone" for task in rows_b if task not in rows_a]
    for task in common:
        _check_same(task, rows_a[task], rows_b[task])
    return [found for task in common for found in _differences(task, rows_a[task], rows_b[task])], notes


def format_differences(differences: Sequence[Difference]) -> str:
    """Columns for a terminal."""
    rows = [("", "metric", "A", "B", "B - A", "p", "of")]
    for found in differences:
        error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
        values = (f"{found.a:.4f}", f"{found.b:.4f}", f"{found.difference:+.4f}{error}")
        metric = found.metric.replace("_per_", " per ")
        rows.append((found.task, metric, *values, f"{found.p_value:.4f}", f"{found.examples:,}"))
    return columns(rows)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean of 0, by 9,999 random flips of all signs, always the same ones.

    The differences as they are count as one flip more, so the least p-value is 0.0001.
    """
    found = np.array([each for each in differences if each], dtype=np.float64)  # 0 has no sign
    if not len(found):
        return 1.0
    rng, reached = np.random.default_rng(0), 0
    least = abs(found.sum()) * (1 - 1e-12)  # the same sum in another order counts as equal
    rows = max(1, _NUMBERS // len(found))
    for start in range(0, _FLIPS, rows):
        shape = (min(rows, _FLIPS - start), len(found))
        signs = rng.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1
        reached += int((np.abs(signs @ found) >= least).sum())
    return (reached + 1) / (_FLIPS + 1)


def _check_same(task: str, a: Sequence[Row], b: Sequence[Row]) -> None:
    remedy = "evaluate both with the same config and --limit"
    if len(a) != len(b):
        got = f"{len(a):,} in A and {len(b):,} in B"
        raise UserError(f"task {task!r}", "must have the same questions in both", got=got, remedy=remedy)
    for row_a, row_b in zip(a, b, strict=True):
        if row_a["question"] != row_b["question"]:
            got = f"another example {row_a['example']:,} in B than in A"
            raise UserError(f"task {task!r}", "must have the same questions in both", got=got, remedy=remedy)


def _differences(task: str, a: Sequence[Row], b: Sequence[Row]) -> Iterator[Difference]:
    for metric, key in METRICS.items():
        values_a, values_b = ([row[key] for row in rows] for rows in (a, b))
        if None in values_a or None in values_b:  # the task has no such metric
            continue
        changes = [float(new) - float(old) for old, new in zip(values_a, values_b, strict=True)]
        change, stderr = mean(changes)
        sums = math.fsum(values_a) / len(a), math.fsum(values_b) / len(b)
        yield Difference(task, metric, *sums, change, stderr, sign_flip_p_value(changes), len(a))
