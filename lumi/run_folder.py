"""The folder of one run: `config.json`, `metrics.jsonl`, `loss.png`, `checkpoints/`, `final/`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumi.checkpoint import Checkpoint, discard_checkpoint, list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint, step_of
from lumi.config import UserError
from lumi.storage import sweep_temporaries


class RunFolder:
    """Where a run keeps what it makes; one run to a folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "loss.png"
        self.final = self.path / "final"

    def claim(self, resume: str | None) -> list[str]:
        """Check that the folder is this run's to write to, and sweep what an interrupted one left half written.

        Args:
            resume: None, "auto", or the path of a checkpoint.

        Returns:
            What was swept, for a line in the log.

        Raises:
            UserError: the folder holds a run, and this is not its continuation.
        """
        for folder in (self.path, self.checkpoints):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--output-dir must be a folder, got a file: {folder}")
        used = bool(list_checkpoints(self.checkpoints)) or self.metrics.exists()
        if used and not (resume == "auto" or (resume is not None and self._owns(Path(resume)))):
            raise UserError(
                f"--output-dir must be new, got {self.path}, which holds a run; "
                f"go on with it by --resume-from-checkpoint auto, or choose another folder"
            )
        return [str(folder / name) for folder in (self.path, self.checkpoints) for name in sweep_temporaries(folder)]

    def find(self, resume: str | None, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
        """The checkpoint to go on from: that of a path, or for "auto" the newest whole one of this run; None where there is none.

        Args:
            say: is told of every newer checkpoint that is damaged.

        Raises:
            UserError: the checkpoint of a path, or every one of this run, is damaged.
        """
        if resume != "auto":
            return None if resume is None else (Path(resume), self.load(Path(resume)))
        faults: list[UserError] = []
        for path in reversed(list_checkpoints(self.checkpoints)):
            try:
                return path, self.load(path)
            except UserError as error:
                faults.append(error)
                say(f"{error}; trying the one before it")
        if faults:
            raise UserError(f"{self.checkpoints}: none of {len(faults)} checkpoints is whole; the newest: {faults[0]}") from faults[0]
        return None

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of `step`, whether or not there is one."""
        return self.checkpoints / f"step-{step:08d}"

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint; its best is forgotten where that is not here: of another run, or pruned since for a better one."""
        checkpoint = load_checkpoint(path)
        best = checkpoint.state["best"]
        if best is not None and not (self._owns(path) and self.has(best["step"])):
            checkpoint.state["best"] = None
        return checkpoint

    def abandon_after(self, step: int) -> list[str]:
        """Remove this run's checkpoints of later steps: it was resumed from before them and will write them anew."""
        later = [path for path in list_checkpoints(self.checkpoints) if step_of(path) > step]
        for path in later:
            discard_checkpoint(path)
        return [path.name for path in later]

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any], keep_last: int) -> Path:
        """Write a checkpoint and prune the old ones; `state["best"]["step"]`, where there is one, is kept."""
        path = save_checkpoint(self.checkpoints, step, Checkpoint(tensors, state))
        prune_checkpoints(self.checkpoints, keep_last, state["best"] and state["best"]["step"])
        return path

    def has(self, step: int) -> bool:
        """Whether a complete checkpoint of `step` is here."""
        return any(step_of(path) == step for path in list_checkpoints(self.checkpoints))

    def _owns(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.checkpoints.resolve()
