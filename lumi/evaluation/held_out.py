"""Held-out loss: nats per token and bits per byte.

Protocol: the documents of a split in order, in windows of `sequence_length` tokens that do not overlap. A
document that a window's edge cuts goes on without context. Every target counts, each document's EOS
included. The bytes are those of the text that the targets stand for, so the figure does not depend on the
tokenizer and compares with a compressor's output over the same bytes. In conversations the targets are the
answers and the tokens that end them. Their rows are those of `lumi.data.rows.ConversationRows`: whole
conversations; one longer than a row ends at an earlier answer or is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from lumi.data.batches import IGNORE, Batch, BatchConfig, validation_batches
from lumi.data.token_store import Split
from lumi.model.transformer import Transformer
from lumi.parallel.world import World


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per token, `bits_per_byte`, and how many tokens and bytes they rest on."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def describe(self) -> str:
        """The figures for people."""
        return f"{self.loss:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    splits: Sequence[Split],
    token_bytes: np.ndarray,
    config: BatchConfig,
    world: World,
    max_tokens: int | None = None,
    stopping: Callable[[], bool] | None = None,
) -> HeldOut | None:
    """Loss over whole splits, shared among the processes, which call this together.

    Args:
        token_bytes: (V,) int, the UTF-8 bytes that each token stands for.
        max_tokens: of each split; None: all.
        stopping: asked before each batch by all processes together; they must get the same answer. None:
            nothing cuts it short.

    Returns:
        None if `stopping` ended it.

    Raises:
        UserError: a split has nothing to predict, or a process cannot read its data; as
            `World.fail_together`.
    """
    bytes_V = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64)).to(world.device)
    nats, tokens, num_bytes = 0.0, 0, 0
    with evaluating(model):
        for split in splits:
            for batch in held_out_batches(split, config, world, max_tokens, stopping):
                if batch is None:
                    return None
                nats += model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens).item()
                targets = batch.targets[batch.targets != IGNORE]
                tokens += targets.numel()
                num_bytes += int(bytes_V[targets].sum())
    total_nats, total_tokens, total_bytes = world.sum(
        nats, tokens / world.layout.tensor, num_bytes / world.layout.tensor
    )
    return HeldOut(
        loss=total_nats / total_tokens,
        bits_per_byte=total_nats / math.log(2) / max(total_bytes, 1),
        tokens=round(total_tokens),
        bytes=round(total_bytes),
    )


def held_out_batches(
    split: Split,
    config: BatchConfig,
    world: World,
    max_tokens: int | None,
    stopping: Callable[[], bool] | None,
) -> Iterator[Batch | None]:
    """This process's batches of a split, on its device; arguments and errors as `held_out_loss`.

    Where `stopping` ends them, the last one is None.
    """
    batches = validation_batches(split, config, world.data_rank, world.layout.data, max_tokens)
    while True:
        with world.fail_together():
            batch = next(batches, None)
        if stopping is not None and stopping():
            yield None
            return
        if batch is None:
            return
        yield batch.to(world.device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
