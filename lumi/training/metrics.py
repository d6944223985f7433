"""What a run says of itself: `metrics.jsonl` and `loss.png`."""

import contextlib
import errno
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from lumi.config import UserError


def human(value: float, unit: str = "") -> str:
    """1234567 -> '1.23M'; three digits and a decimal prefix."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # would be rounded up to 1000 of the smaller unit
            return f"{value / size:.3g} {prefix}{unit}" if unit else f"{value / size:.3g}{prefix}"
    return f"{value:.3g} {unit}".rstrip()


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line. Its `kind` is "train", "validation" or "checkpoint"."""

    def __init__(self, path: Path, resume_step: int = 0):
        """
        Args:
            resume_step: records up to this step stay; later steps are done again. Lines that are no records
                are dropped: a run does not fail for its log.
        """
        self.path = path
        if path.exists():
            records, _ = whole_records(path) if resume_step else ([], 0)
            kept = [record for record in records if record["step"] <= resume_step]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, path)
        self.file = path.open("ab", buffering=0)  # closing the file must not write a failed line again

    def write(self, step: int, kind: str, **values: Any) -> dict[str, Any]:
        """Append a record, and return it.

        Floats that are not finite become null: JSON has none. Raises UserError if it cannot be written.
        """
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        record = {"step": step, "kind": kind, **finite}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        start = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):  # the disk took only the beginning
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # The next line must not begin in the middle of this one. If that fails too, half a line stays,
            # and a resumed run drops it.
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), start)
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}",
                remedy="make room, and go on with --resume-from-checkpoint auto",
            ) from error
        return record

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a last line that a kill cut short.

    Raises UserError for any other bad line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
    return records


def whole_records(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a `metrics.jsonl`, and how many of its lines are none."""
    lines = [line for line in Path(path).read_bytes().split(b"\n") if line]
    records = [record for line in lines if (record := _record(line)) is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where there is none."""
    try:
        record = json.loads(line.decode())
    except ValueError:
        return None
    return (
        record
        if isinstance(record, dict)
        and type(record.get("step")) is int
        and isinstance(record.get("kind"), str)
        else None
    )


class Meter:
    """The time between two readings, what of it was waiting for data, and tokens per second."""

    def __init__(self) -> None:
        self.start, self.tokens, self.waited = time.perf_counter(), 0, 0.0

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self.tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self) -> tuple[float, float, float]:
        """Seconds since the last call, seconds of waiting in them, and tokens per second; and begin anew."""
        now = time.perf_counter()
        seconds, waited, rate = now - self.start, self.waited, self.tokens / max(now - self.start, 1e-9)
        self.start, self.tokens, self.waited = now, 0, 0.0
        return seconds, waited, rate


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """A curve through the middle of noisy values, as long as they are: at each point the local straight line.

    The line is fitted to as many values before the point as after it, so the curve has no lag. At most 20 or
    2% of all values lie on a side, and never more than a quarter of those before the point: the start of a
    run, where a loss falls fastest, is followed closely. Near the end fewer come after, and so fewer before:
    but ten, else the curve would end in the noise of the last value.
    """
    y = np.asarray(values, dtype=np.float64)
    index = np.arange(len(y))
    half = np.minimum(index // 4, max(20, len(y) // 50))
    after = np.minimum(half, len(y) - 1 - index)
    first, stop = index - np.minimum(half, np.maximum(after, 10)), index + after + 1

    def window_sums(terms: np.ndarray) -> np.ndarray:
        totals = np.concatenate([[0.0], np.cumsum(terms)])
        return totals[stop] - totals[first]

    number = stop - first
    mean, center = window_sums(y) / number, (first + stop - 1) / 2
    spread = number * (number**2 - 1) / 12  # of whole numbers around their mean
    slope = (window_sums(index * y) - number * center * mean) / np.maximum(spread, 1)
    return mean + slope * (index - center)


def final_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run came to, by name.

    Of steps: the last `loss`, `tokens` and `skipped_steps`, and the medians of `tokens_per_second` and `mfu`.
    Of validations: every figure of the last one as `validation_NAME`, and the lowest loss as
    `best_validation_loss`, at `best_validation_step`. What the records lack is not in it.
    """
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    figures: dict[str, float] = {}
    for name in ("loss", "tokens", "skipped_steps"):
        if values := _numbers(train, name):
            figures[name] = values[-1]
    for name in ("tokens_per_second", "mfu"):
        if values := _numbers(train, name):
            figures[name] = statistics.median(values)
    for name, value in validation[-1].items() if validation else ():
        if name != "step" and is_number(value):
            figures[f"validation_{name}"] = value
    judged = [record for record in validation if is_number(record.get("loss"))]
    if judged:
        best = min(judged, key=lambda record: record["loss"])
        figures |= {"best_validation_loss": best["loss"], "best_validation_step": best["step"]}
    return figures


def _numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if is_number(record.get(name))]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number that can be shown: not true or false, not NaN, and not huge."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def draw_loss(metrics: str | Path, picture: str | Path, title: str, unit: str) -> None:
    """`metrics.jsonl` -> a PNG of training loss (thin: every step; thick: smoothed) and validation loss."""
    import matplotlib.figure  # here: it takes longer to import than everything else

    records = read_metrics(metrics)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    validation = [
        (r["step"], r["loss"]) for r in records if r["kind"] == "validation" and r["loss"] is not None
    ]
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training")
        axes.plot(steps, smoothed(losses), color="#2171b5", linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#d94801", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})", title=title)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    figure.savefig(picture)
