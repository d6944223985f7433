"""`lumi report`: runs -> one HTML page that needs nothing else. The template escapes all text of runs."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from lumi import __version__
from lumi.host.storage import TEMPORARY_PREFIX, check_output_file
from lumi.reporting import charts
from lumi.reporting.evaluations import find_evaluations
from lumi.reporting.recorded_run import RecordedRun, check_runs, read_runs
from lumi.training.metrics import human

_UNKNOWN = "–"
_MARK = '<meta name="generator" content="lumi report">'  # as in the template
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
    check_output_file(output, "new, or a page that `lumi report` wrote", _is_page)
    recorded = read_runs(runs)
    found, faults = find_evaluations([run.path for run in recorded], evaluations)
    template = _environment().get_template("report.html.jinja")
    page = template.render(
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
    real = Path(os.path.realpath(output))  # a link stays one
    temporary = real.with_name(f"{TEMPORARY_PREFIX}report-{os.getpid()}")
    try:
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, real)
    finally:
        temporary.unlink(missing_ok=True)
    return [f"{run.name}: {note}" for run in recorded for note in run.notes] + faults


def _is_page(file: Path) -> bool:
    """Whether a file is a page of ours, by how it begins. What people wrote is not replaced."""
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        head = opened.read(512)
    return head.startswith(b"<!DOCTYPE html>") and _MARK.encode() in head


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
