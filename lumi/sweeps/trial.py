"""A trial: one setting with one seed. All that is known of it stands in its run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.config import UserError
from lumi.sweeps.settings import Setting
from lumi.training.metrics import is_number, whole_records
from lumi.training.run_status import read_status


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a trial has come.

    Attributes:
        status: "new", "begun", "finished" or "failed".
        step, tokens, seconds: of training so far; seconds without validations and saves.
        validations: held-out bits per byte by step.
        message: what failed; empty where nothing did.
    """

    status: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validations: dict[int, float]
    message: str = ""

    @property
    def result(self) -> float | None:
        """Held-out bits per byte at the end; None: it is not there yet."""
        return self.validations.get(self.step) if self.status == "finished" else None


@dataclass(frozen=True)
class Trial:
    """A run folder that is, or will be, one setting's training with one seed."""

    setting: Setting
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.folder / "train.log"

    def progress(self) -> Progress:
        """What the folder says. A run that ended without a held-out loss that is a number has failed."""
        status, message, records = _status(self.folder), "", _records(self.folder)
        train = [record for record in records if record["kind"] == "train"]
        validations = {
            record["step"]: float(record["bits_per_byte"])
            for record in records
            if record["kind"] == "validation" and is_number(record.get("bits_per_byte"))
        }
        step = max((record["step"] for record in train), default=0)
        state = "new" if status is None and not records else "begun"
        if status is not None and status["status"] in ("finished", "failed"):
            state, message = status["status"], str(status.get("message", ""))
        if state == "finished" and step not in validations:
            state, message = "failed", "its held-out loss is not a number"
        return Progress(
            status=state,
            step=step,
            tokens=max((record.get("tokens", 0) for record in train), default=0),
            seconds=sum(record.get("step_seconds", 0.0) for record in train),
            validations=validations,
            message=message,
        )


def _status(folder: Path) -> dict[str, Any] | None:
    try:
        return read_status(folder)
    except UserError as error:
        raise error.replace(remedy=f"remove {folder} to begin this trial anew") from error


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return whole_records(path)[0] if path.is_file() else []
