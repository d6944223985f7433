"""transformers' `config.json` and `generation_config.json`, written from our config and read into it."""

import contextlib
from pathlib import Path
from typing import Any, NoReturn

from lumi.chat.rendering import stop_ids
from lumi.config import UserError, from_dict, write_json
from lumi.formats.hf_family import ARCHITECTURES, DEFAULTS, family_keys, family_of, read_family
from lumi.formats.hf_rope import ROPE_TYPES, from_hf_scaling, read_rope, rope_type, to_hf_scaling
from lumi.model.model_config import ModelConfig
from lumi.tokenizer.files import GENERATION_FILE
from lumi.tokenizer.tokenizer import Tokenizer

_REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def to_hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """transformers' `config.json`, with the keys of both its generations."""
    scaling, family = to_hf_scaling(config.rope_scaling), family_of(config)
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
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
        **family_keys(config),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer's files, and the `generation_config.json` that names all ids that end a text."""
    tokenizer.save(folder)
    write_json(folder / GENERATION_FILE, generation_config(tokenizer))


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """All ids that end a text or an answer, EOS first: where `lumi generate` and `lumi chat` stop."""
    ends = list(tokenizer.eos_ids)
    with contextlib.suppress(UserError):  # a chat template that fails ends no answer
        ends += sorted(stop_ids(tokenizer) - set(ends))
    return ends


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`generation_config.json`. With it, transformers stops where `lumi generate` and `lumi chat` stop."""
    ends = end_ids(tokenizer)
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
    if not isinstance(family := data.get("model_type"), str) or family not in ARCHITECTURES:
        _refuse(where, "model_type", family, tuple(ARCHITECTURES))
    data = DEFAULTS[family] | data
    rope = read_rope(data, where)
    _check_supported(data, rope, where)
    if missing := [key for key in _REQUIRED if key not in data]:
        raise UserError(f"{where}: {missing[0]} is missing; this is not the config of a {family} model")
    ours = {
        "vocab_size": data["vocab_size"],
        "num_layers": data["num_hidden_layers"],
        "model_dim": data["hidden_size"],
        "num_heads": data["num_attention_heads"],
        "mlp_dim": data["intermediate_size"],
        "num_kv_heads": data.get("num_key_value_heads"),
        "head_dim": data.get("head_dim"),
        "max_positions": data["max_position_embeddings"],
        "rope_scaling": from_hf_scaling(rope, data, where),
        "rope_theta": rope.get("rope_theta", data.get("rope_theta", 10_000.0)),
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "tied_embeddings": data.get("tie_word_embeddings", False),
    }
    return from_dict(ModelConfig, ours | read_family(data, where), where)


def _check_supported(data: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """Raises UserError naming the first key that asks for something else than our model computes."""
    family = data["model_type"]
    rotary = rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {  # the value, and the values that we compute
        "architectures": ((data.get("architectures") or [None])[0], (None, ARCHITECTURES[family])),
        "quantization_config": (data.get("quantization_config"), (None,)),
        "hidden_act": (data.get("hidden_act", "silu"), ("silu",)),
        "rope_type": (rope_type(rope), ROPE_TYPES),
        "partial_rotary_factor": (rotary, (1.0, None)),
        "mlp_bias": (data.get("mlp_bias", False), (False,)),
    }
    if family not in ("mistral", "qwen2"):  # transformers does not look at it there
        supported["attention_bias"] = (data.get("attention_bias", False), (False,))
    if family in ("llama", "mistral"):
        supported["use_sliding_window"] = (data.get("use_sliding_window", False), (False,))
    if family == "llama":
        supported["sliding_window"] = (data.get("sliding_window"), (None,))
    for key, (value, allowed) in supported.items():
        if value not in allowed:
            _refuse(where, key, value, allowed)


def _refuse(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> NoReturn:
    wanted = " or ".join(repr(item) for item in allowed if item is not None) or "absent"
    got = f"{repr(value)[:100]}: this model cannot be imported"
    raise UserError(f"{where}: {key}", f"must be {wanted}", got=got)
