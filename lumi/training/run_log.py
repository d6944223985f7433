"""What a run says while it is at work: `metrics.jsonl`, `loss.png`, the progress line and lines for people, by its main process alone.

A disk without room for them ends no step half done: the fault is kept, and the run ends with it where all processes agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

from lumi.host.progress import progress_bar
from lumi.parallel.world import attempt
from lumi.training.metrics import Meter, MetricsLog, draw_loss, human
from lumi.training.run_folder import RunFolder


class RunLog:
    """The log of one run in its folder. Other processes than the main one may call it too, and nothing is said.

    `fault` is why something could not be written, None as long as all could; `meter` measures steps.
    """

    def __init__(self, folder: RunFolder, is_main: bool):
        self.folder, self.is_main = folder, is_main
        self.fault: str | None = None
        self.metrics: MetricsLog | None = None
        self.meter = Meter()

    def begin(self, step: int) -> None:
        """Go on with `metrics.jsonl` after `step`; of the main process. Raises UserError or OSError where it cannot be written."""
        self.metrics = MetricsLog(self.folder.metrics, step)

    @contextmanager
    def progress(self, step: int, num_steps: int) -> Iterator[None]:
        """Show the progress from `step` to `num_steps` as long as the block lasts; `metrics.jsonl` is closed at its end."""
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
        """A record of `metrics.jsonl`."""
        if self.metrics is not None:
            self._try(partial(self.metrics.write, step, kind, **values))

    def step(
        self, step: int, tokens: int, loss: float, values: dict[str, Any], flops_share: float | None
    ) -> None:
        """The record of a training step, and the progress.

        Args:
            tokens: of one step.
            values: to stand beside `loss` and the times.
            flops_share: of the devices' peak, for each token in a second; None where it is not known.
        """
        self.meter.add(tokens)
        seconds, waited, rate = self.meter.read()
        times = {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(seconds, 4),
            "data_wait_seconds": round(waited, 4),
        }
        mfu = {} if flops_share is None else {"mfu": rate * flops_share}
        self.write(step, "train", loss=loss, **values, **times, **mfu, tokens=step * tokens)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {human(rate)} tokens/s", refresh=False)
        self.bar.update()

    def draw(self) -> None:
        """The picture of the losses so far."""
        if self.is_main:
            self._try(
                lambda: draw_loss(self.folder.metrics, self.folder.picture, f"{self.folder.path.name}: loss")
            )

    def _try(self, work: Callable[[], None]) -> None:
        _, fault = attempt(work)
        self.fault = self.fault or fault
