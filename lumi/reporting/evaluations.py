"""The evaluations that belong to runs: found beside them, and made into tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.config import UserError, read_json
from lumi.evaluation.report import Figure, figures
from lumi.formats.gguf_file import GGUF
from lumi.provenance.artifacts import KINDS
from lumi.provenance.run_facts import WEIGHTS

RESULTS = "evaluation_results.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation.

    Attributes:
        runs: names of those runs of the page that the model was made from.
        answers: prompt, answer, and the checks that failed, of its smoke tests.
    """

    path: Path
    title: str
    protocol: str
    runs: tuple[str, ...]
    figures: tuple[Figure, ...]
    answers: tuple[tuple[str, str, str], ...]


def find_evaluations(runs: Sequence[Path], given: Sequence[Path]) -> tuple[list[Evaluation], list[str]]:
    """Evaluations, and a note for each that cannot be shown.

    They are in the runs' folders, in a folder beside a run if what was evaluated was made from that run, and
    where `given` says.

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
        beside = [file for file in sorted(run.parent.glob(f"*/{RESULTS}")) if _is_made_from(file, run)]
        files |= {file.resolve(): file for file in [*inside, *beside] if file.is_file()}
    evaluations, notes = [], []
    for file in files.values():
        try:
            names = [run.resolve().name for run in runs if _is_made_from(file, run)]
            evaluations.append(_evaluation(file, read_json(file), names))
        except UserError as error:
            notes.append(f"{error}.")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            notes.append(
                f"{file}: is not as this version of Lumi writes it ({type(error).__name__}: {error})."
            )
    return evaluations, notes


def _is_made_from(file: Path, run: Path) -> bool:
    """Whether what was evaluated is of a run, or was made from what is, by names and records alone."""
    try:
        results = read_json(file)
        named = [Path(path) for path in (results["model"], results["adapter"]) if path]
    except (UserError, KeyError, TypeError):
        return False  # whose it is cannot be told
    return any(
        path.resolve().is_relative_to(run.resolve()) for path in [*named, *_behind("evaluation", file.parent)]
    )


def _behind(kind: str, path: Path) -> Iterator[Path]:
    """Where the weights are, or were, that something was made from. No weights are read."""
    try:
        parents = KINDS[kind].record(path).parents or ()
    except (UserError, OSError):
        return  # damaged or gone: what is behind it cannot be told
    for parent in parents:
        if parent.kind in (*WEIGHTS, GGUF):
            yield parent.path
            yield from _behind(parent.kind, parent.path)


def _evaluation(file: Path, results: Mapping[str, Any], runs: Sequence[str]) -> Evaluation:
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
        runs=tuple(runs),
        figures=tuple(figures(results)),
        answers=tuple(_answers(results)),
    )


def _answers(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for answer in (results["smoke_tests"] or {}).get("answers", ()):
        failed = ", ".join(name for name, met in answer["checks"].items() if not met)
        yield str(answer["prompt"]), str(answer["answer"]), failed
