"""Adapters as PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, beside the tokenizer's files.

The safetensors' metadata say which base and tokenizer an adapter belongs to; PEFT does not look at them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lumi.config import UserError, from_dict, read_json, write_json
from lumi.formats.hf_format import DTYPES, hf_name, open_tensors
from lumi.host.storage import atomic_folder, sha256_file
from lumi.host.tensor_files import load_tensors, save_tensors
from lumi.model.lora import ALL_LINEAR, LoraConfig, adapters, find_targets, token_matrices, trained_rows, wrap
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}  # theirs -> ours
_ROWS = "token_adapter.trainable_tokens_delta"
_ROW_IDS = "trainable_token_indices"
_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
}  # theirs -> ours
# PEFT's keys that do not change what an adapter computes: the weights say which linears it is for. Any other that is set does.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode layers_pattern
    layers_to_transform loftq_config megatron_config megatron_core peft_version qalora_group_size revision target_modules task_type
""".split()


def save_adapter(
    folder: str | Path,
    model: Transformer,
    config: LoraConfig,
    tokenizer: Tokenizer,
    base: str | Path,
    base_fingerprint: str,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters of a model and its tokenizer; replaces an older folder atomically.

    Args:
        base: the folder of the model that they were put on.
        base_fingerprint: `weights_fingerprint` of it when it was loaded.
        values: of the adapters' parameters, by the model's names for them; None: those that the model holds.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adapter = _parameters(model)
    tensors = {
        f"{_PREFIX}{key}": values[names[id(own)]] if values is not None else own
        for key, own in adapter.items()
    }
    freed = {
        name: rows.ids.tolist()
        for name, matrix in token_matrices(model).items()
        if (rows := trained_rows(matrix)) is not None
    }
    row_ids = {hf_name(f"{name}.").split(".")[-2]: ids for name, ids in freed.items()} or None
    metadata = {"base_fingerprint": base_fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    with atomic_folder(folder, replace=True) as temporary:
        tokenizer.save(temporary)
        write_json(temporary / CONFIG, peft_config(config, _targets(model), base) | {_ROW_IDS: row_ids})
        save_tensors(temporary / WEIGHTS, tensors, metadata)


def _targets(model: Transformer) -> list[str]:
    """The adapted linears as PEFT looks them up: the end of the name where every layer's is adapted, otherwise the whole name."""
    adapted = {name for name, _ in adapters(model)}
    short = {name.rpartition(".")[2] for name in adapted}
    everywhere = {end for end in short if set(find_targets(model, [end])) <= adapted}
    return sorted(
        everywhere | {hf_name(name) for name in adapted if name.rpartition(".")[2] not in everywhere}
    )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> Path:
    """The folder of the model that an adapter was made for. Raises UserError where there is none any more."""
    base = _read_config(Path(folder)).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
        named = f"names {base}, where there is no model now" if base else "does not name its base"
        raise UserError(
            f"{folder}: the adapter {named}; pass both: the base by --model-path, this by --adapter-path (merge: --base-path, --model-path)"
        )
    return Path(base)


def load_adapter(
    folder: str | Path, model: Transformer, base: str | Path, tokenizer: Tokenizer | None = None
) -> LoraConfig:
    """Put an adapter, ours or PEFT's, on a model, in place.

    Args:
        base: the folder that `model` was loaded from; refused where the adapter carries the hash of other weights.
        tokenizer: likewise refused where the adapter carries another one's fingerprint.

    Returns:
        The adapter's config.

    Raises:
        UserError: the folder holds no adapter, one of a kind that computes something else, or one that does not fit the model.
    """
    folder = Path(folder)
    data = _read_config(folder)
    config, token_ids = (
        _lora_config(data, str(folder / CONFIG)),
        _token_ids(data, model, str(folder / CONFIG)),
    )
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: is missing; only safetensors weights are read (no pickle)")
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {}
    fingerprints = {"base": weights_fingerprint(base)} | (
        {"tokenizer": tokenizer.fingerprint} if tokenizer else {}
    )
    for what, got in fingerprints.items():
        if (expected := metadata.get(f"{what}_fingerprint", got)) != got:
            raise UserError(
                f"{folder}: the {what} must be the one that it was trained with, of fingerprint {expected}, got {got}"
            )
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in load_tensors(file).items()}
    if broken := [
        key
        for key, tensor in tensors.items()
        if not (tensor.dtype in DTYPES.values() and tensor.isfinite().all())
    ]:
        raise UserError(
            f"{file}: {broken[0]} must hold finite {', '.join(DTYPES)}; it is damaged, or quantised, which is not supported"
        )
    linears = {
        f"{hf_name(f'{name}.')}{part}": name for name in find_targets(model, ALL_LINEAR) for part in _PARTS
    }
    adapted = sorted({linears[key] for key in tensors if key in linears})
    if not adapted:
        raise UserError(f"{file}: must hold adapters of the model's linears, got none")
    wrap(model, adapted, config, token_ids)
    parameters = _parameters(model)
    for key in parameters | tensors:
        expected_shape, got_shape = (
            tuple(group[key].shape) if key in group else "nothing" for group in (parameters, tensors)
        )
        if expected_shape != got_shape:
            hint = " (the loss is fused with lm_head)" if key.startswith("lm_head.") else ""
            raise UserError(
                f"{file}: {key} must have shape {expected_shape} by {CONFIG} and the model, got {got_shape}{hint}"
            )
    for key, parameter in parameters.items():
        parameter.data = tensors[key].float().to(parameter.device)
    return config


def _parameters(model: Transformer) -> dict[str, Tensor]:
    """What an adapter consists of, by PEFT's names without its prefix."""
    found = {
        f"{hf_name(f'{name}.')}{theirs}": getattr(module, ours)
        for name, module in adapters(model)
        for theirs, ours in _PARTS.items()
    }
    for name, matrix in token_matrices(model).items():
        rows = trained_rows(matrix)
        found[f"{hf_name(f'{name}.')}{_ROWS}"] = None if rows is None else rows.rows
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _read_config(folder: Path) -> dict[str, Any]:
    if not is_adapter(folder):
        raise UserError(f"{folder}: must be an adapter folder with {CONFIG}, and has none")
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        raise UserError(
            f"{folder / CONFIG}: must hold an object, got {str(data)[:60]}; copy the adapter again"
        )
    return data


def _token_ids(data: dict[str, Any], model: Transformer, where: str) -> list[int]:
    """The tokens whose rows an adapter brings; PEFT lists them for the embedding, or for each matrix."""
    listed = data.get(_ROW_IDS) or []
    per_matrix = list(listed.values()) if isinstance(listed, dict) else [listed]
    if listed and (
        len(per_matrix) != len(token_matrices(model)) or any(ids != per_matrix[0] for ids in per_matrix)
    ):
        raise UserError(
            f"{where}: {_ROW_IDS} must be the same for the embedding and an lm_head of its own, got {listed}"
        )
    ids = per_matrix[0]
    if not isinstance(ids, list) or any(
        type(token) is not int or not 0 <= token < model.config.vocab_size for token in ids
    ):
        raise UserError(f"{where}: {_ROW_IDS} must be ids below {model.config.vocab_size}, got {listed}")
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
    allowed = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": (
            True,
            False,
            "gaussian",
            "eva",
            "orthogonal",
        ),  # the others change the base as well
    }
    for key, value in data.items():
        if key in allowed and value not in allowed[key]:
            raise UserError(
                f"{where}: {key} must be {' or '.join(map(repr, allowed[key]))}, got {value!r}: this adapter cannot be read"
            )
        if value and key not in [*allowed, *_NAMES, *_HARMLESS, _ROW_IDS]:
            raise UserError(
                f"{where}: {key} must not be set, got {str(value)[:60]}: this adapter computes what Lumi does not"
            )
    if missing := [key for key in ("r", "lora_alpha") if key not in data]:
        raise UserError(f"{where}: {missing[0]} is missing; copy the adapter again")
    return from_dict(
        LoraConfig, {ours: data[theirs] for theirs, ours in _NAMES.items() if theirs in data}, where
    )
