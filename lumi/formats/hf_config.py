"""transformers' `config.json` and `generation_config.json`, written from our config and read into it."""

from typing import Any

from lumi.config import UserError, from_dict
from lumi.model.transformer import ModelConfig
from lumi.tokenizer.tokenizer import Tokenizer

_ROPE_SCALING = {  # ours -> theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}
_REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def to_hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """transformers' `config.json`, with the keys of both its generations."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"}
        scaling |= {theirs: getattr(config.rope_scaling, ours) for ours, theirs in _ROPE_SCALING.items()}
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


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`generation_config.json`. With it, transformers stops where `lumi generate` and `lumi chat` stop."""
    ends = list(tokenizer.eos_ids)
    im_end_id = tokenizer.control_id("<|im_end|>")
    if im_end_id is not None and im_end_id not in ends and "<|im_end|>" in (tokenizer.chat_template or ""):
        ends.append(im_end_id)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


def from_hf_config(data: Any, where: str) -> ModelConfig:
    """Our config from transformers' `config.json`.

    Raises:
        UserError: the config asks for something that our model does not compute. The error names the key.
    """
    if not isinstance(data, dict) or not isinstance(data.get("architectures") or [], list):
        expectation = "must be the config of a model, an object with a list of architectures"
        raise UserError(f"{where}: {expectation}", remedy="copy the file again")
    rope = _read_rope(data, where)
    _check_supported(data, rope, where)
    if missing := [key for key in _REQUIRED if key not in data]:
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
        "rope_scaling": _rope_scaling(rope, where) if _rope_type(rope) == "llama3" else None,
        "rope_theta": rope.get("rope_theta", data.get("rope_theta", 10_000.0)),
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "tied_embeddings": data.get("tie_word_embeddings", False),
        "qk_norm": data["model_type"] == "qwen3",
    }
    return from_dict(ModelConfig, ours, where)


def _check_supported(data: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """Raises UserError naming the first key that asks for something else than our model computes."""
    architectures = ("LlamaForCausalLM", "Qwen3ForCausalLM")
    rotary = rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {  # the value, and the values that we compute
        "model_type": (data.get("model_type"), ("llama", "qwen3")),
        "architectures": ((data.get("architectures") or [None])[0], (None, *architectures)),
        "quantization_config": (data.get("quantization_config"), (None,)),
        "hidden_act": (data.get("hidden_act", "silu"), ("silu",)),
        "rope_type": (_rope_type(rope), ("default", "llama3")),
        "partial_rotary_factor": (rotary, (1.0, None)),
        "attention_bias": (data.get("attention_bias", False), (False,)),
        "mlp_bias": (data.get("mlp_bias", False), (False,)),
        "use_sliding_window": (data.get("use_sliding_window", False), (False,)),
    }
    for key, (value, allowed) in supported.items():
        if value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed if item is not None) or "absent"
            got = f"{repr(value)[:100]}: this model cannot be imported"
            raise UserError(f"{where}: {key}", f"must be {wanted}", got=got)


def _read_rope(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary parameters. `rope_scaling`, the older key, may repeat them but not contradict them."""
    older = data.get("rope_scaling")
    rope = data.get("rope_parameters") or older or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters", "must be an object", got=repr(rope))
    if older is None:
        return rope
    if not isinstance(older, dict) or _rope_type(older) != _rope_type(rope) or _contradict(rope, older):
        keys = f"{where}: rope_parameters and rope_scaling"
        raise UserError(keys, "must say the same", got=f"{rope} and {older}", remedy="take one out")
    return rope


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _contradict(rope: dict[str, Any], older: dict[str, Any]) -> bool:
    return any(rope.get(key) != value for key, value in older.items() if key not in ("type", "rope_type"))


def _rope_scaling(rope: dict[str, Any], where: str) -> dict[str, Any]:
    if missing := [theirs for theirs in _ROPE_SCALING.values() if theirs not in rope]:
        raise UserError(f"{where}: {missing[0]} of the rope type llama3 is missing; copy the file again")
    return {ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()}
