"""The folder of one run: `config.json`, `status.json`, `metrics.jsonl`, `loss.png`, `checkpoints/`, `final/`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lumi.checkpoint import Checkpoint, discard_checkpoint, list_checkpoints, open_checkpoint, prune_checkpoints, step_of
from lumi.config import UserError
from lumi.parallel import World, attempt
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
        swept = [folder / name for folder in (self.path, self.checkpoints) for name in sweep_temporaries(folder)]
        for file in self.path.glob("*.json*.tmp*"):  # of `write_json` and the log
            file.unlink()
            swept.append(file)
        return [str(path) for path in swept]

    def find(self, resume: str | None, world: World, say: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to go on from: that of a path, or for "auto" the newest whole one of this run; None where there is none.

        All processes call this together, each checks its share of the bytes, and all get the same checkpoint.

        Args:
            say: is told of every newer checkpoint that is damaged.

        Raises:
            UserError: the checkpoint of a path, or every one of this run, is damaged. (SystemExit on other processes than the main one.)
        """
        if resume is None:
            return None
        paths = list(reversed(list_checkpoints(self.checkpoints))) if resume == "auto" else [Path(resume)]
        paths = world.from_main(paths)
        faults: list[str] = []
        for path in paths:
            checkpoint, fault = attempt(partial(self.load, path, world.rank, world.size))
            if (fault := world.first(fault)) is None:
                return checkpoint
            faults.append(fault)
            if resume == "auto":
                say(f"{fault}; trying the one before it")
        if faults:
            none_whole = f"{self.checkpoints}: none of {len(faults)} checkpoints is whole; the newest: {faults[0]}"
            world.refuse(none_whole if resume == "auto" else faults[0])
        return None

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of `step`, whether or not there is one."""
        return self.checkpoints / f"step-{step:08d}"

    def load(self, path: Path, part: int = 0, parts: int = 1) -> Checkpoint:
        """Open a checkpoint, and check this process's share of its bytes. Its best is forgotten where that is not here: of another run, or
        pruned since for a better one. Raises UserError where it is damaged."""
        checkpoint = open_checkpoint(path)
        checkpoint.verify(part, parts)
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

    def prune(self, keep_last: int, best: int | None) -> None:
        """Remove all checkpoints but the newest `keep_last` and that of step `best`."""
        prune_checkpoints(self.checkpoints, keep_last, best)

    def has(self, step: int) -> bool:
        """Whether a complete checkpoint of `step` is here."""
        return any(step_of(path) == step for path in list_checkpoints(self.checkpoints))

    def _owns(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.checkpoints.resolve()
