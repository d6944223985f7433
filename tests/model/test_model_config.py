import pytest
import torch

from lumi.config import UserError, from_dict, to_dict
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.rope_scaling import YarnScaling
from lumi.model.model_config import ModelConfig
from lumi.model.transformer import Transformer

TINY = {"vocab_size": 61, "num_layers": 2, "model_dim": 32, "num_heads": 4, "mlp_dim": 48}
SHAPES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one kv head, tied": {"num_kv_heads": 1, "tied_embeddings": True},
    "qk-norm, wide heads": {"qk_norm": True, "head_dim": 16},
    "biases, grouped": {"qkv_bias": True, "num_kv_heads": 2},
}
SIZES = {
    "micro": ((4, 128, 2, 512), 9_438_336),
    "tiny": ((6, 256, 4, 1024), 23_072_000),
    "small": ((7, 384, 6, 1536), 41_686_656),
    "medium": ((12, 512, 8, 2048), 83_898_880),
    "base": ((24, 768, 12, 3072), 276_861_696),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_five_sizes(size):
    (layers, dim, heads, mlp), expected = SIZES[size]
    config = ModelConfig(vocab_size=32_768, num_layers=layers, model_dim=dim, num_heads=heads, mlp_dim=mlp)
    with torch.device("meta"):
        model = Transformer(config, REFERENCE)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert config.num_parameters == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_by_arithmetic(shape):
    config = ModelConfig(**TINY | SHAPES[shape])
    model = Transformer(config, REFERENCE)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    one = sum(p.numel() for p in model.layers[0].parameters())
    assert sum(p.numel() for p in Transformer(config.one_layer, REFERENCE).layers.parameters()) == one


def test_null_means_what_follows_from_the_other_numbers():
    config = from_dict(ModelConfig, TINY | {"num_kv_heads": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert config == ModelConfig(**TINY) == from_dict(ModelConfig, to_dict(config))
    given = ModelConfig(**TINY | {"num_kv_heads": 2, "head_dim": 16})
    assert (given.num_kv_heads, given.head_dim) == (2, 16)
    with pytest.raises(UserError, match=r"config: num_layers must be an integer, got null"):
        from_dict(ModelConfig, TINY | {"num_layers": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_heads": 5}, "model_dim must be a multiple of num_heads = 5, got 32"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"rope_theta": 1.0}, r"rope_theta must be above 1, got 1\.0"),
        ({"norm_eps": -1.0}, r"norm_eps must be above 0, got -1\.0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"full_attention_layers": 1}, "full_attention_layers must be from 0 .* and 0 without, got 1"),
        ({"full_attention_layers": 2, "window": 4}, "full_attention_layers must be from 0 to num_layers - 1"),
        ({"full_attention_layers": -1, "window": 4}, "full_attention_layers must be from 0 .* got -1"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1, got 0"),
        (
            {"no_rope_layer_interval": 3},
            "no_rope_layer_interval must be at most num_layers = 2, or null, got",
        ),
        (
            {"qk_norm": True, "qkv_bias": True},
            r"qkv_bias must not be set together with qk_norm \(no model family has both\), got True",
        ),
        (
            {"qkv_bias": True, "no_rope_layer_interval": 2},
            "no_rope_layer_interval must not be set together with qkv_bias .* got 2",
        ),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**TINY | changes)


def test_flops_by_hand():
    config = ModelConfig(vocab_size=10, num_layers=1, model_dim=4, num_heads=2, mlp_dim=8)
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 10 * 4 + 3 * 4  # q k v o, gate up down, lm_head, norms
    assert config.flops_per_token(context=16) == 6 * weights + 6 * 4 * 16


def test_flops_in_a_window_by_hand():
    """A window of 4 in 16 tokens: 4 (32 - 4) / 16 = 7 keys instead of 16, in the layers that have it."""
    shape = {"vocab_size": 10, "num_layers": 3, "model_dim": 4, "num_heads": 2, "mlp_dim": 8}
    full = ModelConfig(**shape)
    assert full.attention_flops_per_token(16) == 3 * 6 * 4 * 16
    windowed = ModelConfig(**shape, window=4, full_attention_layers=1)
    assert windowed.attention_flops_per_token(16) == 6 * 4 * (16 + 2 * 7)
    assert windowed.attention_flops_per_token(3) == full.attention_flops_per_token(3)
    products = full.flops_per_token(16) - full.attention_flops_per_token(16)
    assert windowed.flops_per_token(16) == products + windowed.attention_flops_per_token(16)


def test_which_layers_have_windows_and_rope():
    config = ModelConfig(**TINY | {"num_layers": 5}, window=9, full_attention_layers=2)
    assert [config.layer_window(layer) for layer in range(5)] == [None, None, 9, 9, 9]
    config = ModelConfig(**TINY | {"num_layers": 5}, no_rope_layer_interval=2)
    assert [config.layer_has_rope(layer) for layer in range(5)] == [True, False, True, False, True]


def test_scalings_of_positions_are_told_apart_by_their_kind():
    scaling = {"kind": "yarn", "factor": 4, "original_max_positions": 2048}
    config = from_dict(ModelConfig, TINY | {"rope_scaling": scaling})
    assert config.rope_scaling == YarnScaling(factor=4.0, original_max_positions=2048)
    assert from_dict(ModelConfig, to_dict(config)) == config
    for wrong, message in (
        ({"kind": "ntk"}, 'rope_scaling.kind must be one of "linear", "llama3", "yarn", got "ntk"'),
        (scaling | {"factor": 0.5}, "rope_scaling.factor must be at least 1, got 0.5"),
        (scaling | {"low_freq_factor": 1.0}, "rope_scaling.low_freq_factor unknown key"),
    ):
        with pytest.raises(UserError, match=message):
            from_dict(ModelConfig, TINY | {"rope_scaling": wrong})
