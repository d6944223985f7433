"""The checkpoints of a run: saved behind the loop, gone on from, and made into `final/`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.checkpoint.saver import Saver
from lumi.config import to_dict
from lumi.formats.checkpoint_folder import state_of_start
from lumi.formats.model_parent import model_parent
from lumi.host.provenance import Parent, to_plain
from lumi.model.lora import trained_tensors
from lumi.model.transformer import Transformer
from lumi.parallel.world import World
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.training.optimizer import Optimizer
from lumi.training.resolved_run import ResolvedRun
from lumi.training.resume import check_resumable
from lumi.training.run_folder import RunFolder
from lumi.training.run_log import RunLog
from lumi.training.run_model import save_final
from lumi.training.train_state import TrainState
from lumi.training.weight_average import WeightAverage


class RunCheckpoints:
    """Saves and restores model, optimizer and state of one run. As a context: no save is lost at its end.

    Attributes:
        saver: writes in a thread; `lumi.parallel.watchdog` asks it for progress.
        saved_step: the step of the newest checkpoint of this run; None: it has saved nothing.
    """

    def __init__(
        self,
        run: ResolvedRun,
        world: World,
        folder: RunFolder,
        log: RunLog,
        model: Transformer,
        optimizer: Optimizer,
        average: WeightAverage | None,
        identity: dict[str, Any],
        data: Sequence[Parent],
    ):
        self.run, self.world, self.folder, self.log = run, world, folder, log
        self.model, self.optimizer, self.average, self.identity = model, optimizer, average, identity
        self.saver = Saver(folder.checkpoints, world.rank, world.size, world.saving)
        self.saved_step: int | None = None
        start = [] if run.start is None else [model_parent(run.start, identity["start"])]
        self.parents = [*data, *start]

    def __enter__(self) -> "RunCheckpoints":
        self.saver.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.saver.__exit__(*exception)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by group and name."""
        groups = {"model": trained_tensors(self.model), "optimizer": self.optimizer.state_tensors()}
        return groups if self.average is None else groups | {"average": self.average.values}

    def restore(self, found: Checkpoint | None, state: TrainState) -> None:
        """Weights, optimizer states and `state` from a checkpoint. None: the run begins at step 0."""
        if found is None:
            if self.run.paths.resume:
                self.log.say(f"no checkpoint in {self.folder.checkpoints}: starting at step 0")
            return
        with self.world.fail_together():
            check_resumable(found, self.identity, self.run.config, self.run.start, self.log.say)
            tensors = self.tensors()
            for group in tensors:
                found.fill(group, tensors[group])
            state.load_json(found.state)
            if self.average is not None:
                self.average.num_updates.fill_(state.step - state.skipped_steps)
            if self.folder.has(state.step):
                self.saved_step = state.step
        with self.world.fail_together(interruptible=True):
            for name in self.folder.abandon_after(state.step) if self.world.is_main else ():
                self.log.say(
                    f"set aside {name}: this run goes on from before it; "
                    f"it is deleted when the next save is whole"
                )
        self.log.say(f"resumed from {found.path} at step {state.step}")

    def save(self, state: TrainState) -> float | None:
        """Begin a checkpoint of now.

        Returns the seconds that the loop was stalled; None: there is one already.
        """
        step = state.step
        if self.saved_step == step:
            return None  # a signal came in a step that saved; the next step asks for the same save again
        self.saved_step = step
        state.note_best(step)
        values = state.to_json() | {"identity": self.identity, "config": to_dict(self.run.config)}
        values |= state_of_start(self.run.start)
        values["parents"] = to_plain(self.parents, self.folder.checkpoint(step))
        best = state.best.step if state.best else None

        def finish(path: Path) -> None:
            self.log.say(f"step {step}: saved {path}")
            for line in self.folder.prune(self.run.config.keep_last, best):
                self.log.say(line)

        with self.world.fail_together():
            return self.saver.begin(step, self.tensors(), values, finish)

    def finish(self) -> None:
        """Wait for the running save. Raises UserError if it failed."""
        with self.world.fail_together():
            self.saver.wait()

    def check(self) -> None:
        """Raises UserError if the last save has failed. Some processes may know it before others."""
        if self.saver.failed:
            self.saver.wait()

    def write_final(self, state: TrainState, tokenizer: Tokenizer) -> None:
        """Write `final/` from the checkpoint of the last step, or of the best, one file at a time."""
        config, best, step = self.run.config, state.best, state.step
        with self.world.fail_together(interruptible=True):
            if not self.world.is_main:
                return
            if config.final == "best" and best is not None and best.step != step:
                step = best.step
                self.log.say(
                    f"final is the checkpoint of step {step}, of the lowest validation loss: {best.loss:.4f}"
                )
            checkpoint, start = self.folder.load(self.folder.checkpoint(step)), self.run.start
            began_with = self.identity["start"]
            if config.final == "ema":
                self.log.say(
                    f"final is the moving average of the weights, with a decay of {config.ema_decay}"
                )
            target, made_from = self.folder.final, self.parents
            save_final(target, self.model, checkpoint, config, start, began_with, tokenizer, made_from)
            self.log.say(f"final model: {self.folder.final}")
