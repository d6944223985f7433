"""The table of a sweep, as JSON and as Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lumi.config import write_json, write_text
from lumi.sweeps.sweep_config import Value
from lumi.sweeps.trial import Progress, Trial


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial. `bits_per_byte` is held out and stands at the end of training; None: it is not there yet."""

    folder: str
    seed: int
    status: str
    step: int
    tokens: int
    seconds: float
    bits_per_byte: float | None
    message: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting.

    Attributes:
        state: what became of it, in words.
        bits_per_byte: held out, the mean of the seeds that are finished, or of all of them at the rung that
            gave it up; None: there is none.
        standard_error: of that mean; None: of fewer than two seeds.
        num_finished: seeds that are finished.
        tokens, seconds: of training, the mean of a trial.
    """

    setting: str
    contender: str
    values: Mapping[str, Value]
    state: str
    bits_per_byte: float | None
    standard_error: float | None
    num_finished: int
    tokens: float
    seconds: float
    trials: tuple[TrialRow, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every seed is finished."""
        return self.num_finished == len(self.trials)


def make_rows(settings: Iterable[Sequence[Trial]], given_up: Mapping[int, int]) -> list[Row]:
    """The rows: first whole settings from best to worst, then the others, the furthest first.

    Args:
        settings: the trials of each setting.
        given_up: the rung that gave a setting up, by the setting's index.
    """
    rows = [_row(trials, given_up.get(trials[0].setting.index)) for trials in settings]
    return sorted(
        rows,
        key=lambda row: (
            not row.is_whole,
            -row.num_finished,
            0 if row.is_whole else -row.tokens,
            math.inf if row.bits_per_byte is None else row.bits_per_byte,
        ),
    )


def _row(trials: Sequence[Trial], rung: int | None) -> Row:
    progress = [trial.progress() for trial in trials]
    results = [each.result for each in progress if each.result is not None]
    failed = [each for each in progress if each.status == "failed"]
    values = results
    if not results and rung is not None and not failed:
        values = [each.validations[rung] for each in progress if rung in each.validations]
    return Row(
        setting=trials[0].setting.name,
        contender=trials[0].setting.contender,
        values=trials[0].setting.values,
        state=_state(progress, len(results), len(failed), rung),
        bits_per_byte=statistics.fmean(values) if values else None,
        standard_error=standard_error(values),
        num_finished=len(results),
        tokens=statistics.fmean(each.tokens for each in progress),
        seconds=statistics.fmean(each.seconds for each in progress),
        trials=tuple(_trial_row(*pair) for pair in zip(trials, progress, strict=True)),
    )


def _state(progress: Sequence[Progress], num_finished: int, num_failed: int, rung: int | None) -> str:
    if num_failed:
        return f"{num_failed} of {len(progress)} failed"
    if num_finished == len(progress):
        return "finished"
    if rung is not None:
        return f"given up at step {rung}"
    return "in progress" if any(each.step for each in progress) else "not begun"


def _trial_row(trial: Trial, progress: Progress) -> TrialRow:
    return TrialRow(
        folder=f"trials/{trial.folder.name}",
        seed=trial.seed,
        status=progress.status,
        step=progress.step,
        tokens=progress.tokens,
        seconds=round(progress.seconds, 3),
        bits_per_byte=progress.result,
        message=progress.message,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def describe(rows: Sequence[Row]) -> str:
    """The table as Markdown, and a line for each trial that failed."""
    lines = ["| setting | seeds | bits per byte | standard error | tokens | seconds | state |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        error = "" if row.standard_error is None else f"{row.standard_error:.4f}"
        seeds = f"{row.num_finished} of {len(row.trials)}"
        setting = row.setting.replace("|", "\\|")
        cells = (f"`{setting}`", seeds, bits, error, f"{row.tokens:,.0f}", f"{row.seconds:,.1f}", row.state)
        lines.append(f"| {' | '.join(cells)} |")
    failed = [trial for row in rows for trial in row.trials if trial.status == "failed"]
    if failed:
        lines += ["", "Failed; a folder that is removed is tried again:", ""]
        lines += [f"- `{trial.folder}`, step {trial.step}: {trial.message}" for trial in failed]
    return "\n".join(lines)


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Write `results.json` and `results.md`. A reader sees the old file or the new one."""
    write_json(folder / "results.json", [asdict(row) for row in rows])
    write_text(folder / "results.md", describe(rows))
