"""The folder of one run.

config.json  status.json  metrics.jsonl  loss.png     what was asked, how it stands, what it measured
tracking.json  tensorboard/  wandb/                   of trackers: the run's id, and their files
tokenizer/                                            that of the data, with the template of its conversations
reference-*.safetensors                               of pairs: the answers' log-probabilities at the start
checkpoints/ final/                                   what it saved
.lock                                                 records the owning process
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumi.checkpoint.checkpoint import (
    Checkpoint,
    list_checkpoints,
    open_checkpoint,
    prune_checkpoints,
    step_of,
)
from lumi.checkpoint.manifest import REMEDY
from lumi.config import UserError
from lumi.host.locks import lock_file
from lumi.host.storage import (
    DamagedError,
    check_output,
    discard_folders,
    make_folder,
    sweep_temporaries,
)
from lumi.parallel.world import World

LOCK_WAIT_SECONDS = 30  # the processes of a killed run may need a moment to end
# What `write_json` and the log leave behind when they are killed.
_OUR_TEMPORARY = re.compile(r"(config|status|tracking)\.json\.tmp-\d+|metrics\.jsonl\.tmp|reference\.tmp")
# A folder for checkpoints that are set aside. It gets the second name when all of them are inside.
_ABANDONING, _ABANDONED = ".abandoning-after-step-", ".abandoned-after-step-"
_STEP = "[0-9]" * 8  # a glob pattern


class RunFolder:
    """Where a run keeps what it makes.

    One folder holds one run. The context releases a claimed folder at its end.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "loss.png"
        self.final = self.path / "final"
        self.tokenizer = self.path / "tokenizer"
        self._lock: int | None = None  # descriptor

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def claim(self, resume: str | None, say: Callable[[str], None] = print) -> list[str]:
        """Check that this run may write to the folder, lock it, and sweep what an interrupted run left half
        written.

        Args:
            resume: None, "auto", or the path of a checkpoint.
            say: hears of a wait for another process, and of checkpoints that are put back.

        Returns:
            What was swept, for a line in the log.

        Raises:
            UserError: the folder holds another run, or another process is at work there.
        """
        for folder in (self.path, self.checkpoints):
            check_output(folder, renamed=False)
        make_folder(self.path)
        try:
            self._lock = lock_file(self.path / ".lock", LOCK_WAIT_SECONDS, say)
        except BlockingIOError as error:
            raise UserError(
                f"--output-dir must be a folder that no run is at work in, got {self.path}, "
                f"which {error.strerror} is writing to; end that one, or choose another folder"
            ) from error
        try:
            self._refuse_foreign(resume)
            make_folder(self.checkpoints)
            for name in self._put_back():
                say(f"{name}: put back; an interrupted run had set it aside")
            return self._sweep()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Unlock a claimed folder. The end of the process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_foreign(self, resume: str | None) -> None:
        used = bool(list_checkpoints(self.checkpoints)) or self.metrics.exists()
        if used and not (resume == "auto" or (resume is not None and self._owns(Path(resume)))):
            raise UserError(
                f"--output-dir must be new, got {self.path}, which holds a run; "
                f"go on with it by --resume-from-checkpoint auto, or choose another folder"
            )

    def _sweep(self) -> list[str]:
        swept = [
            folder / name for folder in (self.path, self.checkpoints) for name in sweep_temporaries(folder)
        ]
        for file in sorted(file for file in self.path.iterdir() if _OUR_TEMPORARY.fullmatch(file.name)):
            file.unlink()
            swept.append(file)
        return [str(path) for path in swept]

    def find(self, resume: str | None, world: World, say: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to go on from: that of a path, or for "auto" the newest whole one of this run.

        All processes call this together. Each checks its share of the bytes, and all get the same checkpoint.

        Args:
            resume: None, "auto", or the path of a checkpoint.
            say: is told of every newer checkpoint that is damaged.

        Returns:
            None where there is nothing to go on from.

        Raises:
            UserError: the checkpoint of a path, or every one of this run, is damaged; or one cannot be read
                now, or
                not by this version of Lumi: then an older one is no answer. As `World.fail_together`.
        """
        if resume is None:
            return None
        listed: list[Path] = []
        with world.fail_together():
            if world.is_main:
                newest_first = reversed(list_checkpoints(self.checkpoints))
                listed = list(newest_first) if resume == "auto" else [Path(resume)]
        damages: list[UserError] = []
        for path in world.gather(listed)[0]:
            with world.fail_together():
                checkpoint, damage = self._examine(path, world)
            damage = next(filter(None, world.gather(damage)), None)
            if damage is None:
                return checkpoint
            if resume != "auto":
                with world.fail_together():
                    raise damage
            damages.append(damage.replace(remedy=""))
            say(f"{damages[-1]}; trying the checkpoint before it")
        with world.fail_together():
            if damages:
                none_is_whole = f"{self.checkpoints}: none of {len(damages)} checkpoints is whole"
                raise UserError(f"{none_is_whole}; the newest: {damages[0]}", remedy="restore one")
        return None

    def _examine(self, path: Path, world: World) -> tuple[Checkpoint | None, UserError | None]:
        """A checkpoint, or what is damaged in it. Raises UserError where that cannot be told."""
        try:
            return self.load(path, world.rank, world.size), None
        except DamagedError as error:
            return None, error
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: cannot be read: {error.strerror}; "
                f"mend that and start again, nothing was changed"
            ) from error

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of `step`, whether or not there is one."""
        return self.checkpoints / f"step-{step:08d}"

    def load(self, path: Path, part: int = 0, parts: int = 1) -> Checkpoint:
        """Open a checkpoint, and check this process's share of its bytes.

        Its best is forgotten if that checkpoint is not here: it belongs to another run, or a better one
            replaced it.
        Raises as `open_checkpoint`, and UserError where step or best cannot be a run's.
        """
        checkpoint = open_checkpoint(path)
        checkpoint.verify(part, parts)
        _check_state(checkpoint)
        best = checkpoint.state["best"]
        if best is not None and not (self._owns(path) and self.has(best["step"])):
            checkpoint.state["best"] = None
        return checkpoint

    def abandon_after(self, step: int) -> list[str]:
        """Set the checkpoints of later steps aside: the run resumes from before them and writes them anew.

        `prune` deletes them when the first new one is whole. If the run ends before that, the next `claim`
        puts them back. Returns their names.
        """
        later = [path for path in list_checkpoints(self.checkpoints) if step_of(path) > step]
        if later:
            unfinished = self.checkpoints / f"{_ABANDONING}{step:08d}"
            unfinished.mkdir()
            for path in later:
                os.rename(path, unfinished / path.name)
            os.rename(unfinished, self.checkpoints / f"{_ABANDONED}{step:08d}")
        return [path.name for path in later]

    def _put_back(self) -> list[str]:
        """Undo `abandon_after` of a run that has saved nothing since.

        Returns the names of the checkpoints.
        """
        for folder in self.checkpoints.glob(_ABANDONED + _STEP):
            step = folder.name.removeprefix(_ABANDONED)
            newer = [path for path in list_checkpoints(self.checkpoints) if step_of(path) > int(step)]
            if newer:  # the run saved, and died before it pruned
                discard_folders(self.checkpoints, [folder.name])
            else:
                os.rename(folder, folder.with_name(f"{_ABANDONING}{step}"))
        names = []
        for folder in self.checkpoints.glob(_ABANDONING + _STEP):
            for path in sorted(folder.iterdir()):
                os.rename(path, self.checkpoints / path.name)
                names.append(path.name)
            folder.rmdir()
        return names

    def prune(self, keep_last: int, best: int | None) -> list[str]:
        """Delete old checkpoints, and those that were set aside. Call it when a new one is whole.

        Args:
            keep_last: how many of the newest stay.
            best: the step of one that stays too.

        Returns:
            a line for everything that could not be deleted; the next call tries again.
        """
        try:
            faults = discard_folders(
                self.checkpoints, [path.name for path in self.checkpoints.glob(_ABANDONED + _STEP)]
            )
            faults += prune_checkpoints(self.checkpoints, keep_last, best)
            return list(dict.fromkeys(faults))
        except OSError as error:
            return [f"{self.checkpoints}: old checkpoints cannot be removed: {error.strerror}"]

    def has(self, step: int) -> bool:
        """Whether a complete checkpoint of `step` is here."""
        return any(step_of(path) == step for path in list_checkpoints(self.checkpoints))

    def _owns(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.checkpoints.resolve()


def _check_state(checkpoint: Checkpoint) -> None:
    """Raises UserError unless the state has the folder's step, and as its best null or a step and a loss."""
    state, path = checkpoint.state, checkpoint.path
    step = state.get("step") if isinstance(state, dict) else None
    if not _is_step(step):
        raise UserError(
            f"{path / 'state.json'}:", "step must be a whole number from 0", got=repr(step), remedy=REMEDY
        )
    named = re.fullmatch(r"step-(\d+)", path.name)
    if named and int(named[1]) != step:
        expectation = f"step must be {int(named[1])}, as the folder's name says"
        raise UserError(f"{path / 'state.json'}:", expectation, got=step, remedy=REMEDY)
    best = state.get("best", "nothing")
    if best is not None and not (
        isinstance(best, dict)
        and best.keys() == {"step", "loss"}
        and _is_step(best["step"])
        and isinstance(best["loss"], float)
        and math.isfinite(best["loss"])
    ):
        expectation = "best must be null, or a step and a loss"
        raise UserError(f"{path / 'state.json'}:", expectation, got=repr(best), remedy=REMEDY)


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0
