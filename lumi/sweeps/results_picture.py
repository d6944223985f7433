"""The picture of a sweep: held-out bits per byte against each key that was searched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumi.sweeps.results import Row
from lumi.sweeps.settings import text_of
from lumi.sweeps.sweep_config import Value

MOST_NAMES = 10  # lines that a legend can still tell apart
_LOG_FROM = 3.0  # the ratio of the largest to the smallest value


def draw_results(rows: Sequence[Row], path: Path) -> None:
    """Draw the settings that have a finished trial: a panel for each key, a line for equal other keys.

    With contenders, the keys are those that vary within one, and each contender has a line.
    """
    import matplotlib.figure  # here: it takes longer to import than everything else

    shown = [row for row in rows if row.num_finished]
    keys = _varied(rows) or list(rows[0].values)
    size = (min(4.5 * len(keys) + 1, 24), 4.5)
    figure = matplotlib.figure.Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        present = [row for row in shown if key in row.values]
        groups = _groups(present, key)
        places = _places([row.values[key] for row in present])
        for name, group in groups.items():
            _draw_group(axes, key, group, places, name)
        _scale(axes, [row.values[key] for row in present], places)
        axes.set(xlabel=key)
        axes.grid(alpha=0.3)
        if 1 < len(groups) <= MOST_NAMES and any(len(group) > 1 for group in groups.values()):
            axes.legend(fontsize=7)
    panels[0].set_ylabel("held-out bits per byte")
    figure.savefig(path)


def _varied(rows: Sequence[Row]) -> list[str]:
    """The keys with several values in the sweep, or in one of its contenders."""
    seen: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for key, value in row.values.items():
            seen.setdefault(key, {}).setdefault(row.contender, set()).add(text_of(value))
    return [key for key, values in seen.items() if any(len(each) > 1 for each in values.values())]


def _groups(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """The rows that differ in one key only, by the name of what they share."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others = row.contender or " ".join(
            f"{name}={text_of(value)}" for name, value in row.values.items() if name != key
        )
        groups.setdefault(others, []).append(row)
    return groups


def _places(values: Sequence[Value]) -> Mapping[str, float]:
    """Where each value is on the axis: numbers where they are, others side by side."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {text_of(value): float(value) for value in values if value is not None}
    return {label: float(index) for index, label in enumerate(sorted({text_of(value) for value in values}))}


def _draw_group(axes: Any, key: str, rows: Sequence[Row], places: Mapping[str, float], name: str) -> None:
    points = sorted(
        (places[text_of(row.values[key])], row.bits_per_byte or 0.0, row.standard_error or 0.0)
        for row in rows
    )
    x, y, errors = zip(*points, strict=True)
    axes.errorbar(x, y, yerr=errors, fmt="o-" if len(points) > 1 else "o", capsize=3, label=name or None)


def _scale(axes: Any, values: Sequence[Value], places: Mapping[str, float]) -> None:
    numbers = list(places.values())
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        axes.set_xticks(numbers, list(places))
    elif min(numbers) > 0 and max(numbers) > _LOG_FROM * min(numbers):
        axes.set_xscale("log")
