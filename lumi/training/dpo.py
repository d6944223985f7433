"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    r(y) = beta * (log p(y | x) - log p_ref(y | x))      the reward of answer y to prompt x
    loss = -(1 - e) log sigmoid(r(chosen) - r(rejected)) - e log sigmoid(r(rejected) - r(chosen))

p_ref is the model that the run begins with. e is `label_smoothing`: the share of pairs that are taken to be
the wrong way round (Mitchell 2023, "A note on DPO with noisy preferences").

Shape letters: B rows of T tokens, S conversations of S/2 pairs, P pairs.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.config import UserError
from lumi.data.batches import IGNORE, Batch
from lumi.kernels.wide_float import wide_float

# What is measured beside the loss, each a mean over pairs.
MEASURES: tuple[str, ...] = ("chosen_reward", "rejected_reward", "reward_margin", "accuracy", "divergence")


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Learning from pairs of answers which of two is preferred."""

    # How strongly the model is held to the one that it begins with.
    beta: float = 0.1
    # The share of pairs that may be the wrong way round, 0 to below 0.5 (conservative DPO).
    label_smoothing: float = 0.0
    # Divide an answer's log-probability by its tokens, so that long answers weigh no more than short ones.
    length_normalized: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError("beta", "must be positive", got=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError("label_smoothing", "must be in [0, 0.5)", got=self.label_smoothing)


def answer_log_probabilities(losses_BT: Tensor, batch: Batch) -> Tensor:
    """(S,) float64: the log-probability of each answer of a batch, in nats.

    Args:
        losses_BT: the loss of each token, 0 where it is not trained.
        batch: of pairs.
    """
    return -_sum_of_answers(losses_BT.to(wide_float(losses_BT.device)), batch)


def pair_losses(log_ratios_S: Tensor, batch: Batch, config: DpoConfig) -> tuple[Tensor, Tensor]:
    """The loss of a batch, summed over its pairs, and the sums of `MEASURES`.

    Args:
        log_ratios_S: float64; for each answer log p - log p_ref, the chosen one of a pair first.
        batch: that they are of.

    Returns:
        scalar, differentiable; and (5,) in the order of `MEASURES`. "divergence" is |log p - log p_ref| in
        nats per token, over both answers: how far the model has gone from the one that it began with.
    """
    num_tokens_S = _sum_of_answers((batch.targets != IGNORE).to(log_ratios_S.dtype), batch)
    rewards_S = config.beta * log_ratios_S
    if config.length_normalized:
        rewards_S = rewards_S / num_tokens_S
    chosen_P, rejected_P = rewards_S.view(-1, 2).unbind(dim=1)
    margin_P, smoothing = chosen_P - rejected_P, config.label_smoothing
    losses_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
    divergence_P = log_ratios_S.abs().view(-1, 2).sum(dim=1) / num_tokens_S.view(-1, 2).sum(dim=1)
    measures = (chosen_P, rejected_P, margin_P, (margin_P > 0).to(margin_P.dtype), divergence_P)
    return losses_P.sum(), torch.stack([measure.detach().sum() for measure in measures])


def _sum_of_answers(values_BT: Tensor, batch: Batch) -> Tensor:
    """(S,) sums over the tokens of each conversation."""
    assert batch.pairs is not None
    spans = torch.segment_reduce(values_BT.flatten(), "sum", offsets=batch.cu_seqlens.long())
    return spans[batch.pairs.segments]
