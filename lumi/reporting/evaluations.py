"""The evaluations that belong to runs: found beside them, and made into tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.config import UserError, read_json
from lumi.evaluation.report import Figure, figures

RESULTS = "evaluation_results.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation. `answers`: prompt, answer, and the checks that failed, of its smoke tests."""

    path: Path
    title: str
    protocol: str
    figures: tuple[Figure, ...]
    answers: tuple[tuple[str, str, str], ...]


def find_evaluations(runs: Sequence[Path], given: Sequence[Path]) -> tuple[list[Evaluation], list[str]]:
    """Evaluations, and a note for each that cannot be shown.

    They are in the runs' folders, in a folder beside a run whose model they name, and where `given` says.

    Raises:
        UserError: a given path is not the folder of an evaluation.
    """
    files: dict[Path, Path] = {}
    for path in given:
        file = path if path.is_file() else path / RESULTS
        if not file.is_file():
            raise UserError("--evaluations", f"must be folders with {RESULTS}", got=path)
        files[file.resolve()] = file
    for run in runs:
        inside = [run / RESULTS, *sorted(run.glob(f"*/{RESULTS}"))]
        beside = [file for file in sorted(run.parent.glob(f"*/{RESULTS}")) if _names(file, run)]
        files |= {file.resolve(): file for file in [*inside, *beside] if file.is_file()}
    evaluations, notes = [], []
    for file in files.values():
        try:
            evaluations.append(_evaluation(file, read_json(file)))
        except UserError as error:
            notes.append(f"{error}.")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            notes.append(
                f"{file}: is not as this version of Lumi writes it ({type(error).__name__}: {error})."
            )
    return evaluations, notes


def _names(file: Path, run: Path) -> bool:
    """Whether an evaluation is of the run's model, or of its adapter."""
    try:
        results = read_json(file)
        named = [results["model"], results["adapter"]]
        return any(Path(path).resolve().is_relative_to(run.resolve()) for path in named if path)
    except (UserError, KeyError, TypeError, OSError):
        return False  # whose it is cannot be told


def _evaluation(file: Path, results: Mapping[str, Any]) -> Evaluation:
    adapter = f" with the adapter {results['adapter']}" if results["adapter"] else ""
    limit = "" if results["limit"] is None else f" Only the first {results['limit']:,} of each (--limit)."
    unfinished = (
        "" if results["finished"] else " Not finished: it was stopped before it had measured everything."
    )
    return Evaluation(
        path=file,
        title=f"{results['model']}{adapter}",
        protocol=f"{results['parameters']:,} parameters, {results['dtype']} on {results['device']}, "
        f"{results['date']}.{limit}{unfinished}",
        figures=tuple(figures(results)),
        answers=tuple(_answers(results)),
    )


def _answers(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for answer in (results["smoke_tests"] or {}).get("answers", ()):
        failed = ", ".join(name for name, met in answer["checks"].items() if not met)
        yield str(answer["prompt"]), str(answer["answer"]), failed
