"""transformers' model families that our model computes, and what tells their configs apart.

A family follows from what a model computes. So a Mistral without a window and a SmolLM3 with RoPE in all
layers become a Llama when they are written again.
"""

from typing import Any

from lumi.config import UserError
from lumi.model.model_config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# What transformers takes where a config leaves a key out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def family_of(config: ModelConfig) -> str:
    """The model type of the family that computes what a model of this shape computes."""
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    if config.no_rope_layer_interval is not None or config.full_attention_layers:
        return "smollm3"
    return "llama" if config.window is None else "mistral"


def family_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that not all families have."""
    family, layers = family_of(config), range(config.num_layers)
    keys: dict[str, Any] = {}
    if family not in ("mistral", "qwen2"):  # they have no such keys
        keys |= {"attention_bias": False, "mlp_bias": False}
    if family == "smollm3":
        keys["no_rope_layers"] = [int(config.layer_has_rope(layer)) for layer in layers]
    if config.window is None:
        return keys
    keys["sliding_window"] = config.window
    if family != "mistral":
        windows = [config.layer_window(layer) for layer in layers]
        keys["use_sliding_window"] = True
        keys["layer_types"] = [_FULL if window is None else _SLIDING for window in windows]
        keys["max_window_layers"] = config.full_attention_layers
    return keys


def read_family(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Our keys for what only some families have, from a config with the defaults of its family.

    Raises:
        UserError: windows, or layers without RoPE, lie where ours cannot.
    """
    family = data["model_type"]
    for key, least in (("num_hidden_layers", 1), ("max_window_layers", 0), ("no_rope_layer_interval", 1)):
        is_used = key == "num_hidden_layers" or key in DEFAULTS[family]
        if is_used and (type(value := data[key]) is not int or value < least):
            raise UserError(f"{where}: {key}", f"must be an integer of at least {least}", got=repr(value))
    interval = _no_rope_interval(data, where) if family == "smollm3" else None
    window, full_layers = _read_window(data, interval, where)
    return {
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
        "no_rope_layer_interval": interval,
        "window": window,
        "full_attention_layers": full_layers,
    }


def _list(data: dict[str, Any], key: str, where: str) -> list[Any] | None:
    if not isinstance(value := data.get(key), list | None):
        raise UserError(f"{where}: {key}", "must be a list", got=repr(value))
    return value


def _no_rope_interval(data: dict[str, Any], where: str) -> int | None:
    """The interval of SmolLM3's layers without RoPE; None where all layers have it."""
    layers, given = range(1, data["num_hidden_layers"] + 1), _list(data, "no_rope_layers", where)
    if given is None:
        interval = data["no_rope_layer_interval"]
        return interval if interval in layers else None
    without = [layer for layer, has_rope in zip(layers, given, strict=False) if not has_rope]
    if len(given) < len(layers) or (without and without != [n for n in layers if n % without[0] == 0]):
        expectation = "must be 0 for every n-th layer and 1 for the others, num_hidden_layers in all"
        raise UserError(f"{where}: no_rope_layers", expectation, got=given)
    return without[0] if without else None


def _read_window(data: dict[str, Any], interval: int | None, where: str) -> tuple[int | None, int]:
    """The window, and how many layers at the beginning have none."""
    family, layers = data["model_type"], range(data["num_hidden_layers"])
    window = data.get("sliding_window")
    if family != "mistral" and not data.get("use_sliding_window", False):
        window = None
    if window is None:
        implied = [_FULL for _ in layers]
    elif family == "mistral":
        implied = [_SLIDING for _ in layers]
    elif family == "smollm3":
        implied = [_SLIDING if interval and (layer + 1) % interval == 0 else _FULL for layer in layers]
    else:
        implied = [_SLIDING if layer >= data["max_window_layers"] else _FULL for layer in layers]
    given = _list(data, "layer_types", where)
    types = implied if given is None or family in ("llama", "mistral") else given
    full_layers = types.index(_SLIDING) if _SLIDING in types else len(layers)
    possible = [_SLIDING if window is not None and layer >= full_layers else _FULL for layer in layers]
    if types != possible or given not in (None, types):
        expectation = f"must be {_FULL} for the first layers and {_SLIDING} for all others, if any"
        raise UserError(f"{where}: layer_types", expectation, got=given or types)
    return (window, full_layers) if full_layers < len(layers) else (None, 0)
