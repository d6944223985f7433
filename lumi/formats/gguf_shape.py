"""The shape of a model as GGUF metadata: llama.cpp's architectures, written from our config and read into it.

llama.cpp's Mistral is its `llama`. What no architecture computes is refused by name.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumi.config import UserError, from_dict
from lumi.formats.gguf_file import GgufFile
from lumi.kernels.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from lumi.model.model_config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
NO_ROPE_INTERVAL = 4  # of smollm3; llama.cpp reads it from nowhere
FREQUENCIES = "rope_freqs.weight"  # llama3's scaling: by what each period is longer
SCALING = "lumi.rope_scaling"  # JSON: `FREQUENCIES` does not say what it was made of
_READ = """
    context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon rope.freq_base
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    vocab_size
""".split()
_EMBEDDING = "token_embd.weight"
_REFUSED = "this model cannot be written as GGUF"


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's architecture that computes what a model of this shape computes.

    Raises:
        UserError: there is none; names our key.
    """
    found = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if config.no_rope_layer_interval is not None:
        found = "smollm3"
    scaling = config.rope_scaling
    windowed = config.window is not None and config.window < config.max_positions
    if windowed:
        _refuse("window", "null, since llama.cpp computes none for these models", config.window)
    if config.no_rope_layer_interval not in (None, NO_ROPE_INTERVAL):
        _refuse("no_rope_layer_interval", f"{NO_ROPE_INTERVAL} or null", config.no_rope_layer_interval)
    if isinstance(scaling, Llama3Scaling) and found != "llama":
        _refuse("rope_scaling", f"null, linear or yarn with the architecture {found}", "llama3")
    if isinstance(scaling, YarnScaling):
        default = YarnScaling(factor=scaling.factor, original_max_positions=scaling.original_max_positions)
        for field in dataclasses.fields(scaling):
            expected, value = getattr(default, field.name), getattr(scaling, field.name)
            if value != expected:
                _refuse(f"rope_scaling.{field.name}", f"{expected}, as in llama.cpp", value)
    return found


def _refuse(key: str, expectation: str, got: Any) -> None:
    raise UserError(f"the model's {key}", f"must be {expectation}", got=got, remedy=_REFUSED)


def to_metadata(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a shape. Raises UserError as `architecture_of`."""
    architecture = architecture_of(config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.model_dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling | YarnScaling):
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        values["rope.scaling.original_context_length"] = scaling.original_max_positions
    for key, value in values.items():
        if isinstance(value, float) and _shortest(value) != value:
            raise UserError(f"the model's {key}", "must be a number of float32", got=value, remedy=_REFUSED)
    metadata = {f"{architecture}.{key}": value for key, value in values.items()}
    if isinstance(scaling, Llama3Scaling):
        metadata[SCALING] = json.dumps(dataclasses.asdict(scaling))
    return metadata


def period_factors(config: ModelConfig) -> Tensor | None:
    """What llama.cpp divides the frequencies by, (head_dim / 2,) float32, for the scaling of Llama 3."""
    if not isinstance(scaling := config.rope_scaling, Llama3Scaling):
        return None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    periods = config.rope_theta**exponents
    return 1.0 / periods / scaling.frequencies(periods, config.rope_theta)


def read_shape(file: GgufFile) -> ModelConfig:
    """Our config from the metadata.

    Raises:
        UserError: the metadata ask for something that our model does not compute; names the key.
    """
    architecture = file.value("general.architecture", str)
    if architecture not in ARCHITECTURES:
        expectation = f"must be {' or '.join(ARCHITECTURES)}"
        raise UserError(f"{file.path}: general.architecture", expectation, got=repr(architecture)[:60])
    prefix = f"{architecture}."
    num_heads = file.value(f"{prefix}attention.head_count", int)
    if _EMBEDDING not in file.tensors or len(file.shape(_EMBEDDING)) != 2:
        raise UserError(f"{file.path}: {_EMBEDDING} is missing among the tensors, or is no matrix")
    ours: dict[str, Any] = {
        "vocab_size": file.shape(_EMBEDDING)[0],
        "num_layers": file.value(f"{prefix}block_count", int),
        "model_dim": file.value(f"{prefix}embedding_length", int),
        "num_heads": num_heads,
        "mlp_dim": file.value(f"{prefix}feed_forward_length", int),
        "num_kv_heads": file.value(f"{prefix}attention.head_count_kv", int, num_heads),
        "head_dim": file.metadata.get(f"{prefix}attention.key_length"),
        "max_positions": file.value(f"{prefix}context_length", int),
        "rope_theta": _shortest(file.value(f"{prefix}rope.freq_base", float, 10_000.0)),
        "rope_scaling": _read_scaling(file, prefix),
        "norm_eps": _shortest(file.value(f"{prefix}attention.layer_norm_rms_epsilon", float)),
        "tied_embeddings": "output.weight" not in file.tensors,
        "qk_norm": architecture == "qwen3",
        "qkv_bias": architecture == "qwen2",
        "no_rope_layer_interval": NO_ROPE_INTERVAL if architecture == "smollm3" else None,
    }
    config = from_dict(ModelConfig, ours, str(file.path))
    _check_rest(file, prefix, config)
    if isinstance(config.rope_scaling, Llama3Scaling):
        _check_frequencies(file, config)
    return config


def _check_rest(file: GgufFile, prefix: str, config: ModelConfig) -> None:
    """Raises UserError for a key that changes what is computed."""
    fixed = {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "attention.sliding_window": 0,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for key in (key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)):
        if (value := file.metadata[prefix + key]) != fixed.get(key, value) or key not in (*_READ, *fixed):
            expectation = f"must be {fixed[key]}" if key in fixed else "must not be set"
            got = f"{repr(value)[:60]}: this model computes what Lumi does not"
            raise UserError(f"{file.path}: {prefix}{key}", expectation, got=got)


def _read_scaling(file: GgufFile, prefix: str) -> dict[str, Any] | None:
    kind = file.value(f"{prefix}rope.scaling.type", str, "linear")  # llama.cpp's default, with a factor of 1
    factor = _shortest(file.value(f"{prefix}rope.scaling.factor", float, 1.0))
    if kind == "yarn":
        positions = file.value(f"{prefix}rope.scaling.original_context_length", int)
        return {"kind": kind, "factor": factor, "original_max_positions": positions}
    if kind not in ("none", "linear"):
        expectation = "must be none, linear or yarn"
        raise UserError(f"{file.path}: {prefix}rope.scaling.type", expectation, got=repr(kind)[:60])
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"kind": kind, "factor": factor}
    return _read_llama3(file) if FREQUENCIES in file.tensors else None


def _read_llama3(file: GgufFile) -> dict[str, Any]:
    if SCALING not in file.metadata:
        slowest = max(
            file.tensor(FREQUENCIES).flatten().tolist(), default=1.0
        )  # the rest is what all models of Llama 3 have
        llama_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}
        return {"kind": "llama3", "factor": _shortest(slowest), **llama_3}
    try:
        stored = json.loads(file.value(SCALING, str))
    except ValueError as error:
        raise UserError(f"{file.path}: {SCALING}", "must be JSON", got="other text") from error
    if not isinstance(stored, dict) or stored.get("kind") != "llama3":
        raise UserError(f"{file.path}: {SCALING}", "must be of the kind llama3", got=repr(stored)[:60])
    return stored


def _check_frequencies(file: GgufFile, config: ModelConfig) -> None:
    """Raises UserError if the frequencies in a file are not those of the scaling."""
    is_same = file.shape(FREQUENCIES) == (config.head_dim // 2,)
    if is_same:  # which bounds the memory that this takes
        expected = period_factors(config)
        is_same = expected is not None and torch.allclose(file.tensor(FREQUENCIES), expected, 1e-4, 0)
    if not is_same:
        expectation = "must be of the scaling that Llama 3 has"
        raise UserError(f"{file.path}: {FREQUENCIES}", expectation, got="another, which cannot be read")


def _shortest(value: float) -> float:
    """The shortest decimal number that is the same float32: 1e-5, where the file holds 9.99999974e-06."""
    return float(str(np.float32(value)))
