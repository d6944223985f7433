"""Adapters as PEFT's folders: `adapter_config.json`, `adapter_model.safetensors` and the tokenizer's files.

The metadata of the safetensors file name the adapter's base and tokenizer. PEFT ignores them.
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
_PARTS = {  # theirs -> ours
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
_ROWS = "token_adapter.trainable_tokens_delta"
_ROW_IDS = "trainable_token_indices"
_NAMES = {  # theirs -> ours
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
# PEFT's keys that do not change what an adapter computes: the weights themselves name the linears. Every
# other key changes it when it is set.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode layers_pattern layers_to_transform loftq_config megatron_config megatron_core peft_version
    qalora_group_size revision target_modules task_type
""".split()
_ALLOWED = {  # keys of which these values alone compute what our adapters compute
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base as well
}


def save_adapter(
    folder: str | Path,
    model: Transformer,
    config: LoraConfig,
    tokenizer: Tokenizer,
    base: str | Path,
    base_fingerprint: str,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters of a model, and its tokenizer. Replaces an older folder atomically.

    Args:
        base: the folder of the model under the adapters.
        base_fingerprint: `weights_fingerprint` of that folder when the model was loaded.
        values: the values of the adapters' parameters, by the model's names; None: those in the model.
    """
    tensors = _parameters(model)
    if values is not None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors = {key: values[names[id(parameter)]] for key, parameter in tensors.items()}
    tensors = {f"{_PREFIX}{key}": tensor for key, tensor in tensors.items()}
    row_ids = {}
    for name, matrix in token_matrices(model).items():
        if (rows := trained_rows(matrix)) is not None:
            row_ids[hf_name(f"{name}.").split(".")[-2]] = rows.ids.tolist()
    metadata = {"base_fingerprint": base_fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    with atomic_folder(folder, replace=True) as temporary:
        tokenizer.save(temporary)
        write_json(
            temporary / CONFIG, peft_config(config, _targets(model), base) | {_ROW_IDS: row_ids or None}
        )
        save_tensors(temporary / WEIGHTS, tensors, metadata)


def _targets(model: Transformer) -> list[str]:
    """The adapted linears as PEFT finds them: `q_proj` if every layer's is adapted, else the whole name."""
    adapted = {name: name.rpartition(".")[2] for name, _ in adapters(model)}
    everywhere = {end for end in adapted.values() if adapted.keys() >= set(find_targets(model, [end]))}
    return sorted(everywhere | {hf_name(name) for name, end in adapted.items() if end not in everywhere})


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> Path:
    """The folder of an adapter's base model. Raises UserError if the adapter names none, or it has gone."""
    base = _read_config(Path(folder)).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
        named = f"names {base}, where there is no model now" if base else "does not name its base"
        both = "the base by --model-path, this by --adapter-path (merge: --base-path, --model-path)"
        raise UserError(f"{folder}: the adapter {named}", remedy=f"pass both: {both}")
    return Path(base)


def load_adapter(
    folder: str | Path, model: Transformer, base: str | Path, tokenizer: Tokenizer | None = None
) -> LoraConfig:
    """Put an adapter, ours or PEFT's, on a model, in place.

    Args:
        base: the folder that `model` was loaded from. Refused where the adapter was trained on other weights.
        tokenizer: refused where the adapter was trained with another one.

    Returns:
        The adapter's config.

    Raises:
        UserError: the folder holds no adapter, one that computes what ours do not, or one that does not fit
            the model.
    """
    folder = Path(folder)
    data, where = _read_config(folder), str(folder / CONFIG)
    config, token_ids = _lora_config(data, where), _token_ids(data, model, where)
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: is missing; only safetensors weights are read (no pickle)")
    _check_fingerprints(folder, base, tokenizer)
    tensors = _read_tensors(file)
    linears = {
        f"{hf_name(f'{name}.')}{part}": name for name in find_targets(model, ALL_LINEAR) for part in _PARTS
    }
    adapted = sorted({linears[key] for key in tensors if key in linears})
    if not adapted:
        raise UserError(f"{file}:", "must hold adapters of the model's linears", got="none")
    wrap(model, adapted, config, token_ids)
    parameters = _parameters(model)
    for key in parameters | tensors:
        expected, got = (
            tuple(group[key].shape) if key in group else "nothing" for group in (parameters, tensors)
        )
        if expected != got:
            hint = " (the loss is fused with lm_head)" if key.startswith("lm_head.") else ""
            expectation = f"must have shape {expected} by {CONFIG} and the model"
            raise UserError(f"{file}: {key}", expectation, got=f"{got}{hint}")
    for key, parameter in parameters.items():
        parameter.data = tensors[key].float().to(parameter.device)
    return config


def _check_fingerprints(folder: Path, base: str | Path, tokenizer: Tokenizer | None) -> None:
    """Raises UserError where the adapter's file names another base or tokenizer."""
    with open_tensors(folder / WEIGHTS) as opened:
        metadata = opened.metadata() or {}
    fingerprints = {"base": weights_fingerprint(base)}
    if tokenizer is not None:
        fingerprints["tokenizer"] = tokenizer.fingerprint
    for what, got in fingerprints.items():
        if (expected := metadata.get(f"{what}_fingerprint", got)) != got:
            expectation = f"must be the one that it was trained with, of fingerprint {expected}"
            raise UserError(f"{folder}: the {what}", expectation, got=got)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """An adapter's tensors, by PEFT's names without its prefix. Raises UserError if one is not finite."""
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in load_tensors(file).items()}
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() or not tensor.isfinite().all():
            fault = "it is damaged, or quantised, which is not supported"
            raise UserError(f"{file}: {key}", f"must hold finite {', '.join(DTYPES)}", remedy=fault)
    return tensors


def _parameters(model: Transformer) -> dict[str, Tensor]:
    """The parameters of an adapter, by PEFT's names without its prefix."""
    found = {}
    for name, module in adapters(model):
        for theirs, ours in _PARTS.items():
            if (parameter := getattr(module, ours)) is not None:
                found[f"{hf_name(f'{name}.')}{theirs}"] = parameter
    for name, matrix in token_matrices(model).items():
        if (rows := trained_rows(matrix)) is not None:
            found[f"{hf_name(f'{name}.')}{_ROWS}"] = rows.rows
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    if not is_adapter(folder):
        raise UserError(f"{folder}: must be an adapter folder with {CONFIG}, and has none")
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        got, remedy = str(data)[:60], "copy the adapter again"
        raise UserError(f"{folder / CONFIG}:", "must hold an object", got=got, remedy=remedy)
    return data


def _token_ids(data: dict[str, Any], model: Transformer, where: str) -> list[int]:
    """The tokens whose rows an adapter brings. PEFT lists them once for the embedding, or for each matrix."""
    listed, vocab_size = data.get(_ROW_IDS) or [], model.config.vocab_size
    lists = list(listed.values()) if isinstance(listed, dict) else [listed]
    ids = lists[0]
    if listed and (len(lists) != len(token_matrices(model)) or any(other != ids for other in lists)):
        expectation = "must be the same for the embedding and an lm_head of its own"
        raise UserError(f"{where}: {_ROW_IDS}", expectation, got=listed)
    if not isinstance(ids, list) or not all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ids):
        raise UserError(f"{where}: {_ROW_IDS}", f"must be ids below {vocab_size}", got=listed)
    return ids


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the hashes of a folder's safetensors files, in the order of their names."""
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
    """Our config from PEFT's. The weights name the targets."""
    for key, value in data.items():
        if key in _ALLOWED and value not in _ALLOWED[key]:
            expectation = f"must be {' or '.join(map(repr, _ALLOWED[key]))}"
            raise UserError(f"{where}: {key}", expectation, got=f"{value!r}: this adapter cannot be read")
        if value and key not in [*_ALLOWED, *_NAMES, *_HARMLESS, _ROW_IDS]:
            got = f"{str(value)[:60]}: this adapter computes what Lumi does not"
            raise UserError(f"{where}: {key}", "must not be set", got=got)
    if missing := [key for key in ("r", "lora_alpha") if key not in data]:
        raise UserError(f"{where}: {missing[0]} is missing; copy the adapter again")
    values = {ours: data[theirs] for theirs, ours in _NAMES.items() if theirs in data}
    return from_dict(LoraConfig, values, where)
