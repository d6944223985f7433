"""Models as Hugging Face folders: `LlamaForCausalLM`, or `Qwen3ForCausalLM` where the heads' queries and keys are normalised."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumi.config import UserError, from_dict, read_json, write_json
from lumi.host.storage import atomic_folder, sha256_file
from lumi.host.tensor_files import save_tensors
from lumi.kernels.bundle import Ops
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.tokenizer import MODEL_FILE, Tokenizer

_NAMES = {  # ours -> theirs, in this order
    "token_embedding.": "model.embed_tokens.",
    "final_norm.": "model.norm.",
    "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.",
    "attention.": "self_attn.",
    "layers.": "model.layers.",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_READABLE = {"F64", "F32", "F16", "BF16"}  # integers would be quantised weights
_ROPE_SCALING = {  # ours -> theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def save_model(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """Write a model that is in memory as a folder; all else as `save_model_tensors`."""
    save_model_tensors(folder, model.config, model.state_dict(), tokenizer, dtype, max_shard_bytes)


def save_model_tensors(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """Write a folder that transformers, and anything that reads its format, loads as it is; replaces an older one atomically.

    Leaves `config.json`, `generation_config.json`, `model.safetensors` and the tokenizer's files.

    Args:
        tensors: by our names; each is asked for once, so that they may come from elsewhere one at a time. What is in memory at once
            is one file's.
        dtype: of the weights on disk, a key of `DTYPES`.
        max_shard_bytes: of the tensors in one file; above it the weights are cut into `model-00001-of-00003.safetensors` and so on,
            with an index. A tensor that is larger has a file of its own. None: one file.
    """
    with atomic_folder(folder, replace=True) as temporary:
        tokenizer.save(temporary)
        write_json(temporary / "config.json", hf_config(config, tokenizer, dtype))
        write_json(temporary / "generation_config.json", _generation_config(tokenizer))
        _save_weights(temporary, tensors, DTYPES[dtype], max_shard_bytes)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What stops transformers where `lumi generate` and `lumi chat` stop."""
    ends = [tokenizer.eos_id]
    im_end_id = tokenizer.im_end_id
    if im_end_id is not None and im_end_id not in ends and "<|im_end|>" in (tokenizer.chat_template or ""):
        ends.append(im_end_id)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


def _save_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int | None
) -> None:
    """Write the weights file by file. How many there are is known at the end, and part of their names."""
    parts: list[list[str]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}
    for name in tensors:
        tensor = tensors[name].to(dtype)
        if shard and max_shard_bytes is not None and size + tensor.nbytes > max_shard_bytes:
            save_tensors(folder / f"part-{len(parts)}", shard)
            parts.append(list(shard))
            shard, size = {}, 0
        shard[hf_name(name)] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    save_tensors(folder / f"part-{len(parts)}", shard)
    parts.append(list(shard))
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [_WEIGHTS]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the `final/` of a run folder. Raises UserError where there is no model."""
    path = Path(path)
    if (path / "final").is_dir():
        return path / "final"
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{path}: must be a finished run, but has no final/ yet; finish it with --resume-from-checkpoint auto"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: must be a model folder with a config.json; pass a run folder or its final/")
    return path


def load_model(
    folder: str | Path,
    ops: Ops,
    compute_dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
) -> Transformer:
    """Read a Llama or Qwen3 folder, ours or anybody's.

    Args:
        tokenizer: checked against the fingerprint that our folders carry, or the tokenizer that lies in others'.

    Raises:
        UserError: where the folder is none, asks for something this model does not compute (names the key), or was trained with
            another tokenizer.
    """
    folder = model_folder(folder)
    data, shape = read_json(folder / "config.json"), read_shape(folder)
    expected_tokenizer = data.get("tokenizer_fingerprint")
    if expected_tokenizer is None and (folder / MODEL_FILE).is_file():
        expected_tokenizer = sha256_file(folder / MODEL_FILE)  # what our fingerprint is
    if tokenizer is not None and expected_tokenizer not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{folder}: the tokenizer must be the one it was trained with, of fingerprint {expected_tokenizer}, got "
            f"{tokenizer.fingerprint}; pass --tokenizer-path {folder}"
        )
    model = Transformer(shape, ops, compute_dtype=compute_dtype)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer must have at most the model's {model.config.vocab_size} ids, got {tokenizer.vocab_size}; "
            f"remove tokens that the model does not know from tokenizer_config.json and added_tokens.json, or pass another --tokenizer-path"
        )
    _load_weights(folder, model)
    return model


def _load_weights(folder: Path, model: Transformer) -> None:
    """Copy the weights into the model, one tensor at a time, after every name, shape and type has been compared."""
    expected = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    places: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if name.endswith("rotary_emb.inv_freq") or (
                    name == "lm_head.weight" and model.config.tied_embeddings
                ):
                    continue  # old writers store the frequencies, some repeat the tied embedding
                view = tensors.get_slice(name)
                if view.get_dtype() not in _READABLE:
                    raise UserError(
                        f"{file}: {name} must be of {', '.join(sorted(_READABLE))}, got {view.get_dtype()}: quantised weights?"
                    )
                places[name], shapes[name] = file, tuple(view.get_shape())
    for name, tensor in expected.items():
        if (got := shapes.get(name, "nothing")) != tuple(tensor.shape):
            raise UserError(f"{folder}: {name} must have shape {tuple(tensor.shape)}, got {got}")
    if unknown := sorted(places.keys() - expected.keys()):
        raise UserError(
            f"{folder}: holds a weight that this model has no place for: {unknown[0]} ({len(unknown)} in all)"
        )
    for file in sorted(set(places.values())):
        with open_tensors(file) as tensors, torch.no_grad():
            for name in (name for name, place in places.items() if place == file):
                expected[name].copy_(tensors.get_tensor(name))


def _weight_files(folder: Path) -> Sequence[Path]:
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        names = [_WEIGHTS]
    else:
        index = read_json(folder / _INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(
                f"{folder / _INDEX}: must hold a weight_map of weights and their files, got none; copy it again"
            )
        names = sorted(map(str, set(weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):  # a path could lead anywhere
            raise UserError(
                f"{folder / _INDEX}: must name safetensors files beside it, got {name!r}; do not use this folder"
            )
        if not (folder / name).is_file():
            why = (
                "only safetensors weights are read (no pickle)"
                if names == [_WEIGHTS]
                else f"{_INDEX} names it; copy the whole folder"
            )
            raise UserError(f"{folder / name}: is missing; {why}")
    return [folder / name for name in names]


def open_tensors(file: Path) -> Any:
    """A safetensors file, opened as a context. Raises UserError where it is none."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: must be a safetensors file: {error}") from error


def hf_name(name: str) -> str:
    """Our parameter name in transformers' spelling."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """transformers' `config.json`, with the keys of both its generations."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | {
            theirs: getattr(config.rope_scaling, ours) for ours, theirs in _ROPE_SCALING.items()
        }
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta} | (scaling or {"rope_type": "default"}),
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def read_shape(folder: str | Path) -> ModelConfig:
    """The shape of the model in a folder. Raises UserError as `load_model`."""
    path = model_folder(folder) / "config.json"
    return model_config(read_json(path), str(path))


def model_config(data: dict[str, Any], where: str) -> ModelConfig:
    """Our config from transformers'. Raises UserError naming what is not supported."""
    if not isinstance(data, dict) or not isinstance(data.get("architectures") or [], list):
        raise UserError(
            f"{where}: must be the config of a model, an object with a list of architectures; copy the file again"
        )
    rope, older = data.get("rope_parameters") or data.get("rope_scaling") or {}, data.get("rope_scaling")
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, got {rope!r}")
    if older is not None and (
        not isinstance(older, dict) or _rope_type(older) != _rope_type(rope) or _contradict(rope, older)
    ):
        raise UserError(
            f"{where}: rope_parameters and rope_scaling must say the same, got {rope} and {older}; take one out"
        )
    rope_type = _rope_type(rope)
    supported = {
        "model_type": (data.get("model_type"), ("llama", "qwen3")),
        "architectures": (
            (data.get("architectures") or [None])[0],
            (None, "LlamaForCausalLM", "Qwen3ForCausalLM"),
        ),
        "quantization_config": (data.get("quantization_config"), (None,)),
        "hidden_act": (data.get("hidden_act", "silu"), ("silu",)),
        "rope_type": (rope_type, ("default", "llama3")),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0)),
            (1.0, None),
        ),
        "attention_bias": (data.get("attention_bias", False), (False,)),
        "mlp_bias": (data.get("mlp_bias", False), (False,)),
        "use_sliding_window": (data.get("use_sliding_window", False), (False,)),
    }
    for key, (value, allowed) in supported.items():
        if value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed if item is not None) or "absent"
            raise UserError(
                f"{where}: {key} must be {wanted}, got {repr(value)[:100]}: this model cannot be imported"
            )
    required = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    if missing := [key for key in required if key not in data]:
        raise UserError(f"{where}: {missing[0]} is missing; this is not the config of a Llama model")
    ours = {
        "vocab_size": data["vocab_size"],
        "num_layers": data["num_hidden_layers"],
        "model_dim": data["hidden_size"],
        "num_heads": data["num_attention_heads"],
        "mlp_dim": data["intermediate_size"],
        "num_kv_heads": data.get("num_key_value_heads"),
        "head_dim": data.get("head_dim"),
        "max_positions": data.get("max_position_embeddings", 2048),
        "rope_scaling": _rope_scaling(rope, where) if rope_type == "llama3" else None,
        "rope_theta": rope.get("rope_theta", data.get("rope_theta", 10_000.0)),
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "tied_embeddings": data.get("tie_word_embeddings", False),
        "qk_norm": data["model_type"] == "qwen3",
    }
    return from_dict(ModelConfig, ours, where)


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _contradict(rope: dict[str, Any], older: dict[str, Any]) -> bool:
    return any(rope.get(key) != value for key, value in older.items() if key not in ("type", "rope_type"))


def _rope_scaling(rope: dict[str, Any], where: str) -> dict[str, Any]:
    if missing := [theirs for theirs in _ROPE_SCALING.values() if theirs not in rope]:
        raise UserError(f"{where}: {missing[0]} of the rope type llama3 is missing; copy the file again")
    return {ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()}
