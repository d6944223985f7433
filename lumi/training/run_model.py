"""The model of a run: what it begins with, and what it leaves in `final/`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.config import UserError, to_dict
from lumi.formats.adapter_format import is_adapter, save_adapter, weights_fingerprint
from lumi.formats.hf_format import load_model, read_shape, save_model_tensors
from lumi.formats.pretrained import locate
from lumi.kernels.bundle import Ops
from lumi.model.lora import add_lora
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.training.run_config import TrainConfig

FINAL_SHARD_BYTES = (
    5 * 10**9
)  # of one weights file in final/, which is all that is in memory of a model while it is written


def resolve(config: TrainConfig, model_path: Path | None) -> tuple[TrainConfig, ModelConfig, Path | None]:
    """The config with its `model` filled in, that model, and the folder of the weights that it begins with.

    Raises:
        UserError: there is neither a model in the config nor a `model_path`, or both and they differ; LoRA without a `model_path`.
    """
    if model_path is None:
        if config.model is None:
            raise UserError(
                "config.model must give the shape of the model where --model-path gives no model, got null"
            )
        if config.lora is not None:
            raise UserError("config.lora needs a model to adapt: pass --model-path, or take lora out")
        return config, config.model, None
    folder = locate(model_path)
    if is_adapter(folder):
        raise UserError(
            f"--model-path must be a whole model to train, got the adapter {folder}; `lumi merge` makes one of it and its base"
        )
    shape = read_shape(folder)
    if config.model is not None and (ours := to_dict(config.model)) != (theirs := to_dict(shape)):
        key = next(key for key in theirs if ours[key] != theirs[key])
        raise UserError(
            f"config.model must be null, or that of --model-path {folder}: {key} must be {theirs[key]}, got {ours[key]}"
        )
    try:
        return dataclasses.replace(config, model=shape), shape, folder
    except ValueError as error:
        raise UserError(f"--model-path {folder}: {error}") from error


def build(
    config: TrainConfig, shape: ModelConfig, start: Path | None, tokenizer: Tokenizer, ops: Ops
) -> Transformer:
    """The model: with the weights of `start`, frozen under adapters where the config has `lora`, on the CPU; or on the "meta" device, for
    random ones.

    Raises:
        UserError: the vocabulary is too small for the tokenizer; and what `load_model` and `add_lora` raise.
    """
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size} pieces, got {shape.vocab_size}"
        )
    dtype = getattr(torch, config.dtype)
    if start is None:
        with torch.device("meta"):
            model = Transformer(shape, ops, compute_dtype=dtype)
    else:
        model = load_model(start, ops, dtype, tokenizer)
        if config.lora is not None:
            add_lora(model, config.lora, config.seed, _token_ids(config.lora.tokens, tokenizer))
    model.gradient_checkpointing = config.gradient_checkpointing
    return model.train()


def _token_ids(pieces: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    if unknown := [piece for piece in pieces if piece not in tokenizer.control_ids]:
        known = ", ".join(tokenizer.control_ids)
        raise UserError(f"lora.tokens must be control pieces of the tokenizer ({known}), got {unknown[0]!r}")
    return sorted({tokenizer.control_ids[piece] for piece in pieces})


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
) -> None:
    """Write `final/` from a checkpoint: the model, or its adapter, which names the weights `start` that had this fingerprint when the run
    began. `model` says what the tensors are; its own values, of which this process may have a part only, are not read."""
    if config.lora is None:
        save_model_tensors(
            folder, model.config, checkpoint.tensors("model"), tokenizer, max_shard_bytes=FINAL_SHARD_BYTES
        )
    else:
        assert start is not None
        assert fingerprint is not None
        save_adapter(folder, model, config.lora, tokenizer, start, fingerprint, checkpoint.tensors("model"))
