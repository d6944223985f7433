"""What a run makes smaller, as the loop asks for it: the loss of next tokens, or of pairs of answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lumi.data.batches import Batch
from lumi.data.token_store import Split
from lumi.evaluation import HeldOut, evaluating, held_out_batches, held_out_loss
from lumi.model.transformer import Transformer
from lumi.parallel.world import World
from lumi.training.dpo import MEASURES, answer_log_probabilities, pair_losses
from lumi.training.reference import reference_log_probabilities
from lumi.training.resolved_run import ResolvedRun
from lumi.training.run_config import TrainConfig
from lumi.training.run_data import RunData
from lumi.training.run_folder import RunFolder
from lumi.training.run_log import RunLog

Stopping = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class HeldOutPairs:
    """Means over held-out pairs: `loss` in nats, the measures of `lumi.training.dpo`; and how many pairs."""

    loss: float
    chosen_reward: float
    rejected_reward: float
    reward_margin: float
    accuracy: float
    divergence: float
    pairs: int

    def describe(self) -> str:
        """The figures for people."""
        judged = f"accuracy {self.accuracy:.1%}, reward margin {self.reward_margin:.4f}"
        return f"{self.loss:.4f} nats/pair, {judged}, divergence {self.divergence:.4f} nats/token"


class Objective(Protocol):
    """A loss that is a mean over a step's targets, or pairs.

    Attributes:
        unit: what the mean is over: "token" or "pair".
        measures: the names of other means, which are logged.
    """

    unit: str
    measures: tuple[str, ...]

    def __call__(self, model: nn.Module, batch: Batch, dloss: float) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch, differentiable, and (1 + measures,) sums: the loss's comes first.

        The sums over all processes are those of the step. `dloss` is the gradient that the loss will get.
        """
        ...

    def held_out(
        self, model: Transformer, splits: Sequence[Split], max_tokens: int | None, stopping: Stopping | None
    ) -> HeldOut | HeldOutPairs | None:
        """The means over validation splits; arguments and result as `lumi.evaluation.held_out_loss`."""
        ...


class NextToken:
    """The cross-entropy of the next token."""

    unit: str = "token"
    measures: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, data: RunData, world: World):
        self.batches, self.token_bytes, self.world = config.batches, data.tokenizer.token_bytes, world

    def __call__(self, model: nn.Module, batch: Batch, dloss: float) -> tuple[Tensor, Tensor]:
        loss = model(batch.tokens, batch.targets, batch.positions, batch.documents, dloss)
        return loss, loss.detach()[None]

    def held_out(
        self, model: Transformer, splits: Sequence[Split], max_tokens: int | None, stopping: Stopping | None
    ) -> HeldOut | None:
        return held_out_loss(model, splits, self.token_bytes, self.batches, self.world, max_tokens, stopping)


class Preference:
    """The loss of pairs (`lumi.training.dpo`).

    Args:
        reference: the answers' log-probabilities, by `reference_log_probabilities`: of each training split,
            then of each validation split.
    """

    unit: str = "pair"
    measures: tuple[str, ...] = MEASURES

    def __init__(self, config: TrainConfig, data: RunData, world: World, reference: Sequence[Tensor]):
        assert config.dpo is not None
        self.dpo, self.batches, self.world = config.dpo, config.batches, world
        num_stores = len(data.stores)
        self.train_reference = torch.cat(list(reference[:num_stores]))
        self.validation_references = reference[num_stores:]

    def __call__(self, model: nn.Module, batch: Batch, dloss: float) -> tuple[Tensor, Tensor]:
        return self._losses(model, batch, self.train_reference)

    @torch.no_grad()
    def held_out(
        self, model: Transformer, splits: Sequence[Split], max_tokens: int | None, stopping: Stopping | None
    ) -> HeldOutPairs | None:
        sums, num_pairs = torch.zeros(1 + len(MEASURES), dtype=torch.float64), 0
        with evaluating(model):
            # A rehearsal takes the first split only.
            for split, reference in zip(splits, self.validation_references, strict=False):
                for batch in held_out_batches(split, self.batches, self.world, max_tokens, stopping):
                    if batch is None:
                        return None
                    sums += self._losses(model, batch, reference)[1].cpu()
                    num_pairs += batch.num_targets
        total_pairs, *totals = self.world.sum(num_pairs / self.world.layout.tensor, *sums.tolist())
        loss, *means = (total / max(total_pairs, 1) for total in totals)
        return HeldOutPairs(loss=loss, **dict(zip(MEASURES, means, strict=True)), pairs=round(total_pairs))

    def _losses(self, model: nn.Module, batch: Batch, reference: Tensor) -> tuple[Tensor, Tensor]:
        assert batch.pairs is not None
        losses_BT = model(batch.tokens, batch.targets, batch.positions, batch.documents, 1.0, True)
        log_ratios_S = answer_log_probabilities(losses_BT, batch) - reference[batch.pairs.documents]
        loss, measures = pair_losses(log_ratios_S, batch, self.dpo)
        # The processes of one tensor-parallel group compute the same.
        return loss, torch.cat([loss.detach()[None], measures]) / self.world.layout.tensor


def make_objective(
    run: ResolvedRun,
    start: str | None,
    data: RunData,
    model: Transformer,
    world: World,
    folder: RunFolder,
    log: RunLog,
) -> Objective:
    """The run's objective. The model must be as the run begins: no checkpoint is restored yet.

    Args:
        start: the fingerprint of the weights that the run begins with.

    Raises as `reference_log_probabilities`.
    """
    config = run.config
    if config.dpo is None:
        return NextToken(config, data, world)
    splits = [store.split("train") for store in data.stores] + data.validation
    files = [
        {name: file.sha256 for split in store.manifest.splits.values() for name, file in split.files.items()}
        for store in data.stores
    ]
    decisive = [start, files, config.batches.sequence_length, config.dtype, run.ops.name]
    reference = reference_log_probabilities(
        model, splits, config.batches, world, folder.path, decisive, log.say
    )
    return Preference(config, data, world, reference)
