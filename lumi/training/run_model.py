"""The model of a run: what it begins with, and what it leaves in `final/`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.config import UserError
from lumi.formats.adapter_format import save_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hf_format import load_model, save_model_tensors
from lumi.host.provenance import Parent
from lumi.kernels.bundle import Ops
from lumi.model.lora import add_lora
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.training.run_config import TrainConfig

# of one weights file in final/. While final/ is written, memory holds one such file.
FINAL_SHARD_BYTES = 5 * 10**9


def build(
    config: TrainConfig, shape: ModelConfig, start: Path | None, tokenizer: Tokenizer, ops: Ops
) -> Transformer:
    """The model to train.

    With a `start`: its weights on the CPU, frozen under adapters if the config has `lora`. Without one: on
        the "meta"
    device, which holds no values; `parallelize` fills in random weights.

    Raises:
        UserError: the vocabulary is too small for the tokenizer; and what `load_model` and `add_lora` raise.
    """
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size} pieces, "
            f"got {shape.vocab_size}"
        )
    dtype = getattr(torch, config.dtype)
    if start is None:
        with torch.device("meta"):
            model = Transformer(shape, ops, compute_dtype=dtype)
    else:
        model = load_model(start, ops, dtype, tokenizer)
        if config.lora is not None:
            add_lora(model, config.lora, config.seed, config.lora.token_ids(tokenizer.control_ids))
    model.gradient_checkpointing, model.z_loss = config.gradient_checkpointing, config.z_loss
    return model.train()


def start_fingerprint(start: Path | None) -> str | None:
    """What identifies the weights that a run begins with; None where they follow from the seed."""
    return None if start is None else weights_fingerprint(start)


def save_final(
    folder: Path,
    model: Transformer,
    checkpoint: Checkpoint,
    config: TrainConfig,
    start: Path | None,
    fingerprint: str | None,
    tokenizer: Tokenizer,
    parents: Sequence[Parent],
) -> None:
    """Write `final/` from a checkpoint: the model or its adapter, or the average of either.

    An adapter names the weights `start`, and the fingerprint that they had when the run began. `model` tells
    what the tensors are; its values are not read, because this process may hold only a part of them.
    `parents` are those of the run: the checkpoint may go.
    """
    values = checkpoint.tensors("average" if config.final == "ema" else "model")
    if config.lora is None:
        save_model_tensors(
            folder,
            model.config,
            values,
            tokenizer,
            max_shard_bytes=FINAL_SHARD_BYTES,
            parents=parents,
        )
    else:
        assert start is not None
        assert fingerprint is not None
        save_adapter(folder, model, config.lora, tokenizer, start, fingerprint, values, parents)
