"""What the host does for a micro-batch before its turn, in the thread that reads."""

from dataclasses import replace

import torch

from lumi.data.batches import Batch
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import Transformer
from lumi.training.pending_outcome import runs_behind


def prepared(batch: Batch, model: Transformer, device: torch.device) -> Batch:
    """The batch as the device takes it.

    A device that the host works ahead of gets it with its attention plans, in memory that it can read by
    itself. The reference's plan is a mask, larger than all the rest: the model makes it where it needs it.
    For a CPU the batch stays as it is: a second team of threads there slows the step's own.
    """
    if not runs_behind(device):
        return batch
    if model.ops is not REFERENCE:
        rows, length = batch.tokens.shape
        batch = replace(batch, plans=model.attention_plans(batch.cu_seqlens, rows, length, "cpu"))
    return batch.pinned()
