"""The held-out loss of a run, as the loop asks for it."""

from collections.abc import Callable, Sequence

from lumi.data.token_store import Split
from lumi.evaluation import HeldOut
from lumi.model.transformer import Transformer
from lumi.parallel.sharding import reshard
from lumi.parallel.watchdog import Watchdog
from lumi.parallel.world import World
from lumi.training.objective import HeldOutPairs, Objective
from lumi.training.run_config import TrainConfig
from lumi.training.run_data import RunData


class Validation:
    """Measures the validation splits of a run's data."""

    def __init__(
        self,
        config: TrainConfig,
        data: RunData,
        model: Transformer,
        objective: Objective,
        world: World,
        watchdog: Watchdog,
    ):
        self.config, self.data, self.model, self.objective = config, data, model, objective
        self.world, self.watchdog = world, watchdog

    def measure(self, step: int) -> HeldOut | HeldOutPairs | None:
        """The loss over `validation_tokens` of each split; None: a signal cut it short."""

        def stopping() -> bool:
            self.watchdog.mark(step, "validation")
            return self.world.sum(self.world.stop.received)[0] > 0

        return self._loss(self.data.validation, self.config.validation_tokens, stopping)

    def rehearse(self) -> None:
        """Measure one batch, for its time and its memory."""
        batches = self.config.batches
        one_batch = self.world.layout.data * batches.micro_batch_rows * batches.sequence_length
        self._loss(self.data.validation[:1], max(one_batch, 2))  # of one token nothing is predicted

    def _loss(
        self, splits: Sequence[Split], max_tokens: int | None, stopping: Callable[[], bool] | None = None
    ) -> HeldOut | HeldOutPairs | None:
        result = self.objective.held_out(self.model, splits, max_tokens, stopping)
        reshard(self.model)
        return result
