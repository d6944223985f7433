"""Curves as SVG geometry: which charts a page has, their lines, scales and ticks. The template draws them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumi.reporting.recorded_run import RecordedRun
from lumi.training.metrics import is_number, smoothed

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 472, 10, 234  # of the area that the lines are in
INSET = 4  # between its edges and the values, so that dots and lines there are seen whole
_BUCKETS = RIGHT - LEFT  # one for each column of the picture
_SMOOTHED_FROM = 40  # fewer points show their middle by themselves
_LOG_FROM = 100.0  # the ratio of the largest to the smallest value


@dataclass(frozen=True)
class Line:
    """One line of a chart. `points` are all of them, in (step, value).

    `style`: "thin" for values of single steps behind a "thick" smoothed line; "dots" for validations.
    """

    run: int
    label: str
    style: str
    points: np.ndarray

    @property
    def figures(self) -> tuple[str, ...]:
        """First, lowest, highest and last value."""
        values = self.points[:, 1]
        return tuple(f"{value:.4g}" for value in (values[0], values.min(), values.max(), values[-1]))


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, in the coordinates of an SVG of WIDTH x HEIGHT.

    Attributes:
        traces: for each line its points as text, reduced to what can be seen.
    """

    title: str
    unit: str
    is_log: bool
    lines: tuple[Line, ...]
    traces: tuple[str, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def description(self) -> str:
        """What the lines show, in words."""
        parts = [
            f"{line.label}: {first} at step {line.points[0, 0]:.0f}, "
            f"{last} at step {line.points[-1, 0]:.0f}, between {low} and {high}."
            for line in self.lines
            if line.style != "thin"
            for first, low, high, last in [line.figures]
        ]
        return " ".join(parts)


def charts_of(runs: Sequence[RecordedRun]) -> list[Chart]:
    """The charts for which any run has values. All show the same steps: from 0 to the last of any run."""
    made: list[Chart] = []
    last = max([1, *(run.steps for run in runs)])

    def add(title: str, unit: str, field: str, only: str | None = None, factor: float = 1.0) -> None:
        lines = []
        for index, run in enumerate(runs):
            if only in (None, run.unit):
                lines += _lines(run, index, field, factor)
        if lines:
            made.append(_chart(title, unit, lines, last))

    add("Loss", "nats per token", "loss", only="token")
    add("Loss of pairs", "nats per pair", "loss", only="pair")
    add("Bits per byte", "bits per byte of text", "bits_per_byte")
    add("Accuracy", "% of pairs in which the chosen answer is preferred", "accuracy", factor=100)
    add("Reward margin", "nats, chosen less rejected", "reward_margin")
    add("Divergence", "nats per token, from the model it began with", "divergence")
    add("Learning rate", "", "lr")
    add("Gradient norm", "before clipping", "gradient_norm")
    add("Speed", "tokens per second", "tokens_per_second")
    add("Model FLOPs utilization", "% of the devices' peak", "mfu", factor=100)
    if any(_points(run.records, "train", "skipped_steps").size for run in runs):
        skipped = [_skipped(run, index) for index, run in enumerate(runs)]
        made.append(_chart("Skipped steps", "so far", skipped, last))
    return made


def _lines(run: RecordedRun, index: int, field: str, factor: float) -> list[Line]:
    lines = []
    train = _points(run.records, "train", field) * [1, factor]
    if len(train) >= _SMOOTHED_FROM and field != "lr":
        middle = np.column_stack([train[:, 0], smoothed(train[:, 1])])
        lines += [Line(index, f"{run.name}, each step", "thin", train)]
        lines += [Line(index, f"{run.name}, training, smoothed", "thick", middle)]
    elif len(train):
        lines.append(Line(index, f"{run.name}, training", "thick", train))
    validation = _points(run.records, "validation", field) * [1, factor]
    if len(validation):
        lines.append(Line(index, f"{run.name}, validation", "dots", validation))
    return lines


def _skipped(run: RecordedRun, index: int) -> Line:
    """Records hold the number from the first skipped step on."""
    numbers = [
        (record["step"], record.get("skipped_steps", 0))
        for record in run.records
        if record["kind"] == "train" and is_number(record.get("skipped_steps", 0))
    ]
    return Line(index, f"{run.name}, skipped", "thick", np.array(numbers or [(0, 0)], dtype=np.float64))


def _points(records: Sequence[Mapping[str, Any]], kind: str, field: str) -> np.ndarray:
    """(points, 2): steps and values of a field, where it is a finite number."""
    found = [
        (record["step"], float(value))
        for record in records
        if record["kind"] == kind and is_number(value := record.get(field))
    ]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def _chart(title: str, unit: str, lines: Sequence[Line], last_step: int) -> Chart:
    values = np.concatenate([line.points[:, 1] for line in lines])
    low, high = values.min(), values.max()
    is_log = bool(low > 0 and high > _LOG_FROM * low)
    x, x_ticks = _scale(0, last_step, LEFT + INSET, RIGHT - INSET, False)
    y, y_ticks = _scale(low, high, BOTTOM - INSET, TOP + INSET, is_log)
    traces = []
    for line in lines:
        places = reduced(np.column_stack([x(line.points[:, 0]), y(line.points[:, 1])]))
        traces.append(" ".join(f"{a:.1f},{b:.1f}" for a, b in places))
    whole = [tick for tick in x_ticks if float(tick.label.replace(",", "")).is_integer()]  # no half steps
    return Chart(
        title=title,
        unit=unit,
        is_log=is_log,
        lines=tuple(lines),
        traces=tuple(traces),
        x_ticks=tuple(whole),
        y_ticks=tuple(y_ticks),
    )


def reduced(points: np.ndarray, buckets: int = _BUCKETS) -> np.ndarray:
    """What can be seen of a line of (points, 2): the lowest and the highest point of each column.

    No spike is lost. At most four points remain of a column: its first and last ones keep the line together.
    """
    if len(points) <= 4 * buckets:
        return points
    x = points[:, 0]
    column = np.minimum((x - x[0]) / max(x[-1] - x[0], 1e-9) * buckets, buckets - 1).astype(np.int64)
    order = np.lexsort((points[:, 1], column))
    first = np.flatnonzero(np.diff(column, prepend=-1))
    last = np.append(first[1:], len(points)) - 1
    return points[np.unique(np.concatenate([first, last, order[first], order[last]]))]


def _scale(
    low: float, high: float, start: int, end: int, is_log: bool
) -> tuple[Callable[[np.ndarray], np.ndarray], list[Tick]]:
    """A function from values to places between `start` and `end`, and some ticks."""
    import matplotlib.ticker  # here: it takes longer to import than the rest

    if high <= low:
        low, high = low - max(abs(low) * 0.05, 1e-9), high + max(abs(high) * 0.05, 1e-9)
    change = np.log10 if is_log else np.asarray
    bottom, top = float(change(low)), float(change(high))

    def place(values: np.ndarray) -> np.ndarray:
        return start + (change(values) - bottom) / (top - bottom) * (end - start)

    locator = matplotlib.ticker.LogLocator(numticks=6) if is_log else matplotlib.ticker.MaxNLocator(5)
    values = [float(v) for v in locator.tick_values(low, high) if low <= v <= high]
    if len(values) < 2:
        values = [low, high]
    labels = [f"{value:g}" for value in values] if is_log else _labels(values)
    ticks = [Tick(float(place(np.array(v))), label) for v, label in zip(values, labels, strict=True)]
    return place, ticks


def _labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, all in one manner. `values` ascend."""
    if not 0.01 <= max(abs(value) for value in values) < 1e7:
        return ["0" if value == 0 else re.sub("e([+-])0", r"e\1", f"{value:.1e}") for value in values]
    decimals = max(0, 1 - math.floor(math.log10(min(np.diff(values)))))
    texts = [f"{value:,.{min(decimals, 6)}f}" for value in values]
    return [text.rstrip("0").rstrip(".") if "." in text else text for text in texts]
