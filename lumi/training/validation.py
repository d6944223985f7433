"""The held-out loss of a run, as the loop asks for it."""

from collections.abc import Callable, Sequence

from lumi.data.token_store import Split
from lumi.evaluation import HeldOut, held_out_loss
from lumi.model.transformer import Transformer
from lumi.parallel.sharding import reshard
from lumi.parallel.watchdog import Watchdog
from lumi.parallel.world import World
from lumi.training.run_config import TrainConfig
from lumi.training.run_data import RunData


class Validation:
    """Measures the validation splits of a run's data."""

    def __init__(
        self, config: TrainConfig, data: RunData, model: Transformer, world: World, watchdog: Watchdog
    ):
        self.config, self.data, self.model, self.world, self.watchdog = config, data, model, world, watchdog

    def measure(self, step: int) -> HeldOut | None:
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
    ) -> HeldOut | None:
        token_bytes, batches = self.data.tokenizer.token_bytes, self.config.batches
        result = held_out_loss(self.model, splits, token_bytes, batches, self.world, max_tokens, stopping)
        reshard(self.model)
        return result
