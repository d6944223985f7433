"""Models as Hugging Face folders: `LlamaForCausalLM`, or `Qwen3ForCausalLM` where the heads' queries and keys are normalised."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumi.checkpoint import load_tensors, save_tensors
from lumi.config import UserError, from_dict, read_json, write_json
from lumi.kernels.bundle import Ops
from lumi.model import ModelConfig, Transformer
from lumi.storage import atomic_folder
from lumi.tokenizer import Tokenizer

_NAMES = {  # ours -> theirs, in this order
    "token_embedding.": "model.embed_tokens.",
    "final_norm.": "model.norm.",
    "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.",
    "attention.": "self_attn.",
    "layers.": "model.layers.",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_model(folder: str | Path, model: Transformer, tokenizer: Tokenizer, dtype: str = "float32") -> None:
    """Write a folder that transformers, and anything that reads its format, loads as it is; replaces an older one atomically.

    Leaves `config.json`, `generation_config.json`, `model.safetensors` and the tokenizer's files.
    """
    with atomic_folder(folder, replace=True) as temporary:
        tokenizer.save(temporary)
        write_json(temporary / "config.json", hf_config(model.config, tokenizer, dtype))
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        write_json(temporary / "generation_config.json", special)
        tensors = {hf_name(name): tensor.to(_DTYPES[dtype]) for name, tensor in model.state_dict().items()}
        save_tensors(temporary / "model.safetensors", tensors)


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the `final/` of a run folder. Raises UserError where there is no model."""
    path = Path(path)
    if (path / "final").is_dir():
        return path / "final"
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: must be a finished run, but has no final/ yet; finish it with --resume-from-checkpoint auto")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: must be a model folder with a config.json; pass a run folder or its final/")
    return path


def load_model(folder: str | Path, ops: Ops, compute_dtype: torch.dtype = torch.float32, tokenizer: Tokenizer | None = None) -> Transformer:
    """Read a Llama or Qwen3 folder, ours or anybody's.

    Args:
        tokenizer: checked against the fingerprint that our folders carry.

    Raises:
        UserError: where the folder is none, asks for something this model does not compute (names the key), or was trained with
            another tokenizer.
    """
    folder = model_folder(folder)
    data = read_json(folder / "config.json")
    expected_tokenizer = data.get("tokenizer_fingerprint")
    if tokenizer is not None and expected_tokenizer not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{folder}: the tokenizer must be the one it was trained with, of fingerprint {expected_tokenizer}, got "
            f"{tokenizer.fingerprint}; leave out --tokenizer-path to use the one in the folder"
        )
    model = Transformer(model_config(data, str(folder / "config.json")), ops, compute_dtype=compute_dtype)
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; only safetensors weights are read (no pickle)")
        tensors |= load_tensors(folder / name)
    expected = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tied_embeddings:
        tensors.pop("lm_head.weight", None)  # some writers repeat the embedding under this name
    for name, tensor in expected.items():
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        if got != tuple(tensor.shape):
            raise UserError(f"{folder}: {name} must have shape {tuple(tensor.shape)}, got {got}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise UserError(f"{folder}: holds a weight that this model has no place for: {unknown[0]} ({len(unknown)} in all)")
    model.load_state_dict({name: tensors[hf_name(name)].float() for name in model.state_dict()})
    return model


def hf_name(name: str) -> str:
    """Our parameter name in transformers' spelling."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """transformers' `config.json`, with the keys of both its generations."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.per_head,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
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


def model_config(data: dict[str, Any], where: str) -> ModelConfig:
    """Our config from transformers'. Raises UserError naming what is not supported."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    supported = {
        "model_type": (data.get("model_type"), ("llama", "qwen3")),
        "hidden_act": (data.get("hidden_act", "silu"), ("silu",)),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
        "attention_bias": (data.get("attention_bias", False), (False,)),
        "mlp_bias": (data.get("mlp_bias", False), (False,)),
        "use_sliding_window": (data.get("use_sliding_window", False), (False,)),
    }
    for key, (value, allowed) in supported.items():
        if value not in allowed:
            raise UserError(f"{where}: {key} must be {' or '.join(map(repr, allowed))}, got {value!r}: this model cannot be imported")
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
        "rope_theta": rope.get("rope_theta", data.get("rope_theta", 10_000.0)),
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "tied_embeddings": data.get("tie_word_embeddings", False),
        "qk_norm": data["model_type"] == "qwen3",
    }
    return from_dict(ModelConfig, ours, where)
