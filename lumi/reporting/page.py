"""`lumi report`: runs -> one HTML page that needs nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from lumi import __version__
from lumi.host.page import is_page, template, write_page
from lumi.host.storage import check_output_file
from lumi.reporting import charts
from lumi.reporting.evaluations import find_evaluations
from lumi.reporting.recorded_run import RecordedRun, check_runs, read_runs
from lumi.training.metrics import human

_UNKNOWN = "–"
_GENERATOR = "lumi report"
_ABSENT = object()


def write_report(runs: Sequence[Path], output: Path, evaluations: Sequence[Path] = ()) -> list[str]:
    """Write the page of some runs.

    Args:
        evaluations: folders of evaluations that belong on it, beside those that are found.

    Returns:
        what a reader must know of the runs, a line for each.

    Raises:
        UserError: a path is no run or no evaluation, or `output` cannot be written or is no page of ours.
        OSError: the disk is full.
    """
    check_runs(runs)
    check_output_file(
        output, "new, or a page that `lumi report` wrote", partial(is_page, generator=_GENERATOR)
    )
    recorded = read_runs(runs)
    found, faults = find_evaluations([run.path for run in recorded], evaluations)
    page = template(Path(__file__).with_name("report.html.jinja")).render(
        generator=_GENERATOR,
        title=f"Training report: {', '.join(run.name for run in recorded)}",
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Lumi {__version__}",
        runs=recorded,
        summary=list(_summary(recorded)),
        faults=faults,
        charts=charts.charts_of(recorded),
        area=charts,
        differences=_differences(recorded),
        configs=[json.dumps(run.config, indent=2, ensure_ascii=False) for run in recorded],
        evaluations=found,
    )
    write_page(output, page)
    return [f"{run.name}: {note}" for run in recorded for note in run.notes] + faults


def _summary(runs: Sequence[RecordedRun]) -> Iterator[tuple[str, list[str]]]:
    """The rows of the table of figures: a name, and a cell for each run."""
    yield "status", [run.status for run in runs]
    yield "learns", [run.kind for run in runs]
    yield "steps", [_steps(run) for run in runs]
    rows = (
        ("tokens", "tokens", human),
        ("last training loss", "loss", _four_digits),
        ("last validation loss", "validation_loss", _four_digits),
        ("lowest validation loss", "best_validation_loss", _four_digits),
        ("lowest at step", "best_validation_step", lambda step: f"{step:,.0f}"),
        ("bits per byte", "validation_bits_per_byte", _four_digits),
        ("accuracy", "validation_accuracy", lambda share: f"{share:.1%}"),
        ("tokens per second, median", "tokens_per_second", human),
        ("MFU, median", "mfu", lambda share: f"{share:.1%}"),
        ("skipped steps", "skipped_steps", lambda number: f"{number:,.0f}"),
    )
    figures = [run.figures for run in runs]
    for name, key, show in rows:
        if any(key in each for each in figures):
            yield name, [show(each[key]) if key in each else _UNKNOWN for each in figures]


def _steps(run: RecordedRun) -> str:
    return f"{run.steps:,}" + (f" of {run.planned_steps:,}" if run.planned_steps else "")


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def _differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """The config keys in which runs differ, with the value of each run."""
    if any(run.config is None for run in runs) or len(runs) < 2:
        return []
    return list(_differing([run.config for run in runs], ""))


def _differing(values: Sequence[Any], key: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of a key. Sections are compared key by key; one that a run does not have is one row."""
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            inside = [value.get(name, _ABSENT) for value in values]
            yield from _differing(inside, f"{key}.{name}" if key else name)
        return
    cells = [_UNKNOWN if value is _ABSENT else json.dumps(value, ensure_ascii=False) for value in values]
    if len(set(cells)) > 1:
        yield key, cells
