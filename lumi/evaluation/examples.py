"""What an evaluation keeps of each question beside its results, so that two models can be compared."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumi.config import UserError
from lumi.evaluation.multiple_choice import Outcome
from lumi.evaluation.tasks import Question

EXAMPLES_FILE = "evaluation_examples.jsonl"
METRICS = {"bits_per_byte": "bits_per_byte", "margin": "margin", "acc": "right", "acc_norm": "right_norm"}

Row = Mapping[str, Any]


def example_rows(
    task: str, questions: Sequence[Question], outcomes: Sequence[Outcome]
) -> Iterator[dict[str, Any]]:
    """A row for each question: its place, a hash of its contexts, choices and answer, and the outcome."""
    for number, (question, outcome) in enumerate(zip(questions, outcomes, strict=True), start=1):
        text = json.dumps(question, ensure_ascii=False)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        yield {"task": task, "example": number, "question": fingerprint, **outcome._asdict()}


def write_examples(folder: Path, rows: Iterable[Row]) -> None:
    """Write the rows, one a line; no file without rows, so that none of an earlier evaluation stays."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if lines:
        (folder / EXAMPLES_FILE).write_text(lines, encoding="utf-8")
    else:
        (folder / EXAMPLES_FILE).unlink(missing_ok=True)


def read_examples(folder: Path) -> dict[str, list[Row]]:
    """The rows of each task of an evaluation.

    Raises:
        UserError: the folder holds none, or the file is damaged.
    """
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise UserError(str(folder), "must be a folder that `lumi evaluate` wrote", got=got)
    path = folder / EXAMPLES_FILE
    if not path.is_file():
        remedy = "evaluate the model on tasks with this version of Lumi"
        raise UserError(f"{folder}:", f"must hold {EXAMPLES_FILE}", got="no such file", remedy=remedy)
    tasks: dict[str, list[Row]] = {}
    needed = {"task", "example", "question", *METRICS.values()}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not needed <= row.keys():
                raise ValueError(f"a row has no {min(needed - row.keys())}")
            tasks.setdefault(row["task"], []).append(row)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}:", "must be as lumi evaluate wrote it", got=str(error)) from error
    return tasks
