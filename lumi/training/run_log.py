"""What a run says while it works: `metrics.jsonl`, `loss.png`, trackers, progress, and lines for people.

Only the main process writes. A full disk ends no step half done: the log keeps the fault, and `check` raises
it where all processes can end together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lumi.config import UserError
from lumi.host.progress import progress_bar
from lumi.training.metrics import Meter, MetricsLog, draw_loss, final_figures, human, whole_records
from lumi.training.run_folder import RunFolder
from lumi.training.trackers import tracked_run
from lumi.training.tracking import Tracking
from lumi.training.train_state import StepOutcome


class RunLog:
    """The log of one run in its folder. All processes may call it; only the main one says anything.

    `meter` measures steps. `unit`: what a loss is a mean over, "token" or "pair".
    """

    def __init__(self, folder: RunFolder, is_main: bool, unit: str = "token"):
        self.folder, self.is_main, self.unit = folder, is_main, unit
        self._fault: UserError | OSError | None = None
        self.metrics: MetricsLog | None = None
        self.tracking: Tracking | None = None
        self.meter = Meter()

    def begin(self, step: int, trackers: Sequence[str] = (), config: Mapping[str, Any] | None = None) -> None:
        """Go on with `metrics.jsonl` and the trackers after `step`, on the main process.

        Args:
            trackers: the names of those that get every record, too.
            config: what they are told of the run.

        Raises:
            UserError or OSError: `metrics.jsonl` cannot be written.
        """
        self.metrics = MetricsLog(self.folder.metrics, step)
        if trackers:
            earlier, _ = whole_records(self.folder.metrics)
            run = tracked_run(self.folder.path, config or {}, step)
            self.tracking = Tracking(trackers, run, self.say, earlier)

    @contextmanager
    def progress(self, step: int, num_steps: int) -> Iterator[None]:
        """Show the progress from `step` to `num_steps`; close `metrics.jsonl` at the end."""
        try:
            with progress_bar(
                "train", "step", total=num_steps, initial=step, disable=not self.is_main
            ) as self.bar:
                yield
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def say(self, line: str) -> None:
        """A line for people."""
        if self.is_main:
            tqdm.write(line)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """A record of `metrics.jsonl`; trackers get it when it stands there."""
        metrics, tracking = self.metrics, self.tracking
        if metrics is None:
            return

        def write() -> None:
            record = metrics.write(step, kind, **values)
            if tracking is not None:
                tracking.record(record)

        self._try(write)

    def step(
        self,
        outcome: StepOutcome,
        skipped_steps: int,
        mix: Sequence[float] | None,
        tokens: int,
        flops_share: float | None,
    ) -> None:
        """The record of a training step, and the progress.

        Args:
            skipped_steps: of the whole run.
            mix: each data folder's share of the rows so far; None where there is one folder.
            tokens: of one step.
            flops_share: of the devices' peak that one token a second takes; None where the peak is not known.
        """
        values: dict[str, Any] = {
            "loss": outcome.loss,
            "gradient_norm": outcome.gradient_norm,
            "lr": outcome.lr,
            **outcome.measures,
            "targets" if self.unit == "token" else "pairs": outcome.num_targets,
            "skipped": not outcome.accepted,
        }
        values |= {"skipped_steps": skipped_steps} if skipped_steps else {}
        values |= {"mix": [round(share, 6) for share in mix]} if mix is not None else {}
        self.meter.add(tokens)
        seconds, waited, rate = self.meter.read()
        times = {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(seconds, 4),
            "data_wait_seconds": round(waited, 4),
        }
        mfu = {} if flops_share is None else {"mfu": rate * flops_share}
        self.write(outcome.step, "train", **values, **times, **mfu, tokens=outcome.step * tokens)
        accuracy = f", accuracy {outcome.measures['accuracy']:.2f}" if "accuracy" in outcome.measures else ""
        shown = f"loss {outcome.loss:.3f}{accuracy}, {human(rate)} tokens/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def draw(self) -> None:
        """The picture of the losses so far."""
        if self.is_main:
            title = f"{self.folder.path.name}: loss"
            self._try(lambda: draw_loss(self.folder.metrics, self.folder.picture, title, self.unit))

    def finish_tracking(self) -> None:
        """Give the trackers the final figures and the picture.

        They may need a network: call it when everything else is done.
        """
        if self.tracking is not None:
            records, _ = whole_records(self.folder.metrics)
            step = max((record["step"] for record in records), default=0)
            self.tracking.finish(step, final_figures(records), self.folder.picture)

    def check(self) -> None:
        """Raise the first error of writing, if there was one."""
        if self._fault is not None:
            raise self._fault

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (UserError, OSError) as error:
            self._fault = self._fault or error
