"""Adapters as PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, beside the tokenizer's files.

The safetensors' metadata say which base and tokenizer an adapter belongs to; PEFT does not look at them.
"""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumi.checkpoint import load_tensors, save_tensors
from lumi.config import UserError, from_dict, read_json, write_json
from lumi.hf_format import hf_name
from lumi.lora import LoraConfig, adapters, token_matrices, trained_rows, wrap
from lumi.model import Transformer
from lumi.storage import atomic_folder, sha256_file
from lumi.tokenizer import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "lora_magnitude"}  # theirs -> ours
_TOKENS = "token_adapter.trainable_tokens_delta"
_TOKEN_INDICES = "trainable_token_indices"
_UNSUPPORTED = ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters")


def save_adapter(folder: str | Path, model: Transformer, config: LoraConfig, tokenizer: Tokenizer, base: str | Path) -> None:
    """Write the adapters of a model and its tokenizer; replaces an older folder atomically.

    Args:
        base: the folder of the model that they were put on; its path and the hash of its weights go into the adapter.
    """
    tensors = {
        f"{_PREFIX}{hf_name(f'{name}.')}{theirs}": tensor
        for name, module in adapters(model)
        for theirs, ours in _PARTS.items()
        if (tensor := getattr(module, ours)) is not None
    }
    freed = {hf_name(f"{name}."): rows for name, module in token_matrices(model).items() if (rows := trained_rows(module)) is not None}
    tensors |= {f"{_PREFIX}{name}{_TOKENS}": rows.rows for name, rows in freed.items()}
    indices = {name.split(".")[-2]: rows.ids.tolist() for name, rows in freed.items()} or None
    metadata = {"base_fingerprint": weights_fingerprint(base), "tokenizer_fingerprint": tokenizer.fingerprint}
    with atomic_folder(folder, replace=True) as temporary:
        tokenizer.save(temporary)
        targets = sorted({name.rpartition(".")[2] for name, _ in adapters(model)})
        write_json(temporary / CONFIG, peft_config(config, targets, base) | {_TOKEN_INDICES: indices})
        save_tensors(temporary / WEIGHTS, tensors, metadata)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> Path:
    """The folder of the model that an adapter was made for. Raises UserError where there is none any more."""
    data = read_json(Path(folder) / CONFIG)
    base = Path(str(data.get("base_model_name_or_path")))
    if not (base / "config.json").is_file():
        raise UserError(
            f"{folder}: is an adapter for {base}, where there is no model now; pass the model by --model-path and this by --adapter-path"
        )
    return base


def load_adapter(folder: str | Path, model: Transformer, base: str | Path, tokenizer: Tokenizer | None = None) -> LoraConfig:
    """Put an adapter, ours or PEFT's, on a model, in place.

    Args:
        base: the folder that `model` was loaded from; refused where the adapter carries the hash of other weights.
        tokenizer: likewise refused where the adapter carries another one's fingerprint.

    Returns:
        The adapter's config.

    Raises:
        UserError: the folder holds no adapter, one of a kind that is not supported, or one that does not fit the model.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise UserError(f"{folder}: must be an adapter folder with {CONFIG}, and has none")
    data = read_json(folder / CONFIG)
    config, token_ids = _lora_config(data, str(folder / CONFIG)), _token_ids(data, model, str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: is missing; only safetensors weights are read (no pickle)")
    metadata = _metadata(folder / WEIGHTS)
    fingerprints = {"base": weights_fingerprint(base)} | ({"tokenizer": tokenizer.fingerprint} if tokenizer else {})
    for what, got in fingerprints.items():
        if (expected := metadata.get(f"{what}_fingerprint", got)) != got:
            raise UserError(f"{folder}: the {what} must be the one that it was trained with, of fingerprint {expected}, got {got}")
    tensors = load_tensors(folder / WEIGHTS)
    rows = {name: tensors.pop(f"{_PREFIX}{hf_name(f'{name}.')}{_TOKENS}", None) for name in token_matrices(model)}
    ours = {hf_name(f"{name}."): name for name, _ in model.named_modules()}
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        part = next((part for part in _PARTS if key.endswith(f".{part}")), None)
        module = ours.get(key.removeprefix(_PREFIX).removesuffix(part)) if part else None
        if part is None or module is None:
            raise UserError(f"{folder / WEIGHTS}: holds a weight that this model has no place for: {key}")
        found.setdefault(module, {})[_PARTS[part]] = tensor
    wrap(model, sorted(found), config, token_ids)
    for name, module in adapters(model):
        for part in _PARTS.values():
            if (parameter := getattr(module, part)) is not None:
                _fill(parameter, found[name].get(part), f"{folder / WEIGHTS}: {name}.{part}")
    for name, matrix in token_matrices(model).items():
        if (freed := trained_rows(matrix)) is not None:
            _fill(freed.rows, rows[name], f"{folder / WEIGHTS}: the trained rows of {name}")
    return config


def _fill(parameter: Tensor, value: Tensor | None, what: str) -> None:
    got = "nothing" if value is None else tuple(value.shape)
    if value is None or got != tuple(parameter.shape):
        raise UserError(f"{what} must have shape {tuple(parameter.shape)}, got {got}")
    parameter.data = value.float().to(parameter.device)


def _token_ids(data: dict[str, Any], model: Transformer, where: str) -> list[int]:
    """The tokens whose rows an adapter brings; PEFT lists them for the embedding, or for each matrix."""
    listed = data.get(_TOKEN_INDICES) or []
    per_matrix = list(listed.values()) if isinstance(listed, dict) else [listed]
    expected = len(token_matrices(model)) if listed else len(per_matrix)
    ids = per_matrix[0]
    if len(per_matrix) != expected or any(other != ids for other in per_matrix):
        raise UserError(f"{where}: {_TOKEN_INDICES} must be the same for the embedding and an lm_head of its own, got {listed}")
    if any(type(token) is not int or not 0 <= token < model.config.vocab_size for token in ids):
        raise UserError(f"{where}: {_TOKEN_INDICES} must be ids below {model.config.vocab_size}, got {listed}")
    return ids


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the safetensors files of a model folder, in the order of their names."""
    digests = "".join(sha256_file(path) for path in sorted(Path(folder).glob("*.safetensors")))
    return hashlib.sha256(digests.encode()).hexdigest()


def peft_config(config: LoraConfig, targets: list[str], base: str | Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _lora_config(data: dict[str, Any], where: str) -> LoraConfig:
    """Our config from PEFT's; the targets are taken from the weights."""
    fixed = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False} | dict.fromkeys(_UNSUPPORTED)
    for key, allowed in fixed.items():
        if (value := data.get(key, allowed)) != allowed and value not in ({}, []):
            raise UserError(f"{where}: {key} must be {allowed!r}, got {value!r}: this adapter cannot be read")
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"}
    return from_dict(LoraConfig, {ours: data[theirs] for theirs, ours in names.items() if theirs in data}, where)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: must be a safetensors file: {error}") from error
