"""What the host does for a micro-batch before its turn, in the thread that reads."""

from dataclasses import replace

import torch

from lumi.data.batches import Batch
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import Transformer


def prepared(batch: Batch, model: Transformer, device: torch.device) -> Batch:
    """The batch with its attention plans, in memory that the device can read by itself.

    The reference's plan is a mask, larger than all the rest: the model makes it where it needs it.
    """
    if model.ops is not REFERENCE:
        rows, length = batch.tokens.shape
        batch = replace(batch, plans=model.attention_plans(batch.cu_seqlens, rows, length, "cpu"))
    return batch.pinned() if device.type == "cuda" else batch
