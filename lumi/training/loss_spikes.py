"""Loss spikes: the mark of a bad batch, or of a run that is about to diverge.

Chowdhery et al. (2022, arXiv:2204.02311, section 5.1) skip the batches of spikes after the fact; Lumi skips
the step as it happens. A loss is a spike beyond median + k standard deviations of the last losses. A falling
loss widens the deviation and keeps the median above the newest loss, so the test rather misses a spike than
invents one.
"""

import math
import statistics
from collections.abc import Sequence

_LEAST_DEVIATION = 1e-3  # as a share of the median: among nearly equal losses rounding is no spike


class LossSpikes:
    """Recognises spikes by the losses of the last `window` steps. Processes with equal losses get equal
    answers.

    A spike is recorded as the limit itself. So each spike raises the limit a little: a loss that
    has risen for good, or one step in ten of harder data, is soon no spike any more.

    Args:
        max_sigmas: standard deviations above the median from which a loss is a spike; above 0. None: no loss
            is one.
        window: steps, at least 2. Nothing is a spike before that many are recorded.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, max_sigmas: float | None, window: int = 128):
        if max_sigmas is not None and not 0 < max_sigmas < math.inf:
            raise ValueError(f"max_sigmas must be above 0, or null for no limit, got {max_sigmas}")
        if window < 2:
            raise ValueError(f"window must be at least 2 steps, got {window}")
        self.max_sigmas, self.window = max_sigmas, window
        self._losses: list[float] = []

    @property
    def limit(self) -> float:
        """The highest loss of the next step that is no spike, in nats; infinite before `window` steps."""
        if self.max_sigmas is None or len(self._losses) < self.window:
            return math.inf
        median = statistics.median(self._losses)
        mean = math.fsum(self._losses) / self.window
        variance = math.fsum((loss - mean) ** 2 for loss in self._losses) / (self.window - 1)
        return median + self.max_sigmas * max(math.sqrt(variance), _LEAST_DEVIATION * abs(median))

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of the next step, in nats, is a spike. A loss that is not finite is none."""
        return loss > self.limit

    def record(self, loss: float) -> None:
        """Take in the finite loss of a step, skipped as a spike or not."""
        if not math.isfinite(loss):
            raise ValueError(f"loss must be finite, got {loss}")
        if self.max_sigmas is not None:
            self._losses = [*self._losses, min(loss, self.limit)][-self.window :]

    def state(self) -> list[float]:
        """What `load` needs to go on exactly from here, as JSON values."""
        return list(self._losses)

    def load(self, state: Sequence[float]) -> None:
        """Go on from a `state`."""
        self._losses = list(state)[-self.window :]
