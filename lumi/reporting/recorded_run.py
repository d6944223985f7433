"""A run as its folder tells it, whatever state the folder is in."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.config import UserError, read_json
from lumi.training.metrics import final_figures, whole_records
from lumi.training.run_status import read_status

_LARGEST_STEP = 2**53  # what a float holds exactly


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What a run has left.

    Attributes:
        name: tells it from the other runs of the page.
        records: those of `metrics.jsonl`, by step.
        config: the resolved one; None where there is none that can be read.
        notes: what a reader must know, such as damage; each is a sentence.
    """

    name: str
    path: Path
    records: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] | None
    status: str
    notes: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What a loss is a mean over: "token" or "pair"."""
        return "pair" if any("pairs" in record for record in self.records[:3]) else "token"

    @property
    def figures(self) -> dict[str, float]:
        """As `lumi.training.metrics.final_figures`."""
        return final_figures(self.records)

    @property
    def steps(self) -> int:
        """The last step with a record."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run."""
        steps = (self.config or {}).get("num_steps")
        return steps if isinstance(steps, int) else None

    @property
    def kind(self) -> str:
        """How it learns, in words."""
        config = self.config or {}
        learns = "preference tuning (DPO)" if self.unit == "pair" or config.get("dpo") else "next token"
        return f"{learns}, LoRA" if config.get("lora") else learns


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """Read run folders. Raises UserError for a path that is none."""
    check_runs(paths)
    once = {path.resolve(): path for path in paths}
    clear = len({real.name for real in once}) == len(once)
    return [_read_run(path, real.name if clear else str(path)) for real, path in once.items()]


def check_runs(paths: Sequence[Path]) -> None:
    """Raises UserError for a path that is no run folder."""
    for path in paths:
        _check_is_run(path)


def _check_is_run(path: Path) -> None:
    records = path / "metrics.jsonl"
    if os.path.lexists(records) and not records.is_file():
        got = f"{path}, where metrics.jsonl is no file"
        raise UserError("RUN", "must be a run folder, with metrics.jsonl", got=got)
    if any((path / name).is_file() for name in ("metrics.jsonl", "status.json")):
        return
    inside = sorted(str(file.parent) for file in path.glob("*/metrics.jsonl"))
    raise UserError(
        "RUN",
        "must be a run folder, with metrics.jsonl",
        got=f"{path}, which {'has none' if path.is_dir() else 'is no folder'}",
        remedy=f"name its runs: {' '.join(inside)}" if inside else "",
    )


def _read_run(path: Path, name: str) -> RecordedRun:
    notes: list[str] = []
    records: list[dict[str, Any]] = []
    if (path / "metrics.jsonl").is_file():
        records, num_bad = whole_records(path / "metrics.jsonl")
        usable = [record for record in records if 0 <= record["step"] <= _LARGEST_STEP]
        num_bad += len(records) - len(usable)
        records = sorted(usable, key=lambda record: record["step"])
        if num_bad:
            notes.append(_dropped(num_bad, len(records)))
    if not (records or notes):
        notes.append("There are no records yet.")
    status = _status(path, notes)
    return RecordedRun(
        name=name, path=path, records=records, config=_config(path, notes), status=status, notes=tuple(notes)
    )


def _dropped(num_bad: int, num_good: int) -> str:
    """What a reader must know of the lines that are no records."""
    what = "line of metrics.jsonl is no record" if num_bad == 1 else "lines of metrics.jsonl are no records"
    if num_good == 0:
        which = "The only" if num_bad == 1 else f"All {num_bad:,}"
        return f"{which} {what}: there is nothing to draw."
    verb = "is" if num_bad == 1 else "are"
    return f"{num_bad:,} {what} and {verb} left out; a kill can cut the last line short."


def _config(path: Path, notes: list[str]) -> Mapping[str, Any] | None:
    try:
        config = read_json(path / "config.json")
    except UserError as error:
        notes.append(f"The config is unknown: {error}.")
        return None
    if not isinstance(config, dict):
        notes.append(f"The config is unknown: {path / 'config.json'} holds no object.")
        return None
    return config


def _status(path: Path, notes: list[str]) -> str:
    try:
        status = read_status(path)
    except UserError as error:
        notes.append(f"The status is unknown: {error}.")
        return "unknown"
    if status is None:
        return "unknown"
    if status["status"] == "running":
        notes.append("The run was in progress, or was killed: its curves end where its records did.")
    elif status["status"] == "preempted":
        notes.append(f"The run was stopped by {status.get('signal', 'a signal')}. It can go on.")
    elif status["status"] == "failed":
        notes.append(f"The run failed: {status.get('message', 'no message was kept')}.")
    return str(status["status"])
