"""Shapes as GGUF metadata and back. llama.cpp's logits (`test_gguf_weights.py`) judge what they mean."""

import dataclasses
import json

import pytest
import torch
from gguf_files import ARCHITECTURES, LLAMA_3, SHAPE, YARN

from lumi.config import UserError, to_dict
from lumi.formats.gguf_file import open_gguf, write_gguf
from lumi.formats.gguf_shape import (
    FREQUENCIES,
    SCALING,
    architecture_of,
    period_factors,
    read_shape,
    to_metadata,
)
from lumi.kernels.rope import rope_table
from lumi.kernels.rope_scaling import LinearScaling
from lumi.model.model_config import ModelConfig


def shape(**changes):
    return ModelConfig(**({"vocab_size": 384} | SHAPE | changes))


def file_of(path, config, without=(), **changes):
    """A file with the metadata of a shape, and the tensors that tell something about it."""
    metadata = to_metadata(config) | changes
    tensors = {"token_embd.weight": torch.zeros(config.vocab_size, config.model_dim)}
    if not config.tied_embeddings:
        tensors["output.weight"] = tensors["token_embd.weight"]
    if (factors := period_factors(config)) is not None:
        tensors[FREQUENCIES] = factors
    architecture = metadata.pop("general.architecture", architecture_of(config))
    metadata = {key: value for key, value in metadata.items() if key not in without}
    plan = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items() if name not in without}
    write_gguf(path, architecture, metadata, plan, lambda name: tensors[name])
    return open_gguf(path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name, tmp_path):
    config = shape(**ARCHITECTURES[name])
    assert architecture_of(config) == name.partition(",")[0]
    expected = dataclasses.replace(config, window=None)
    assert to_dict(read_shape(file_of(tmp_path / "a.gguf", config))) == to_dict(expected)


def test_factors_slow_the_frequencies():
    config = shape(rope_scaling=LLAMA_3, head_dim=32)
    positions = torch.tensor([[1]])
    cos, sin = rope_table(positions, 32, config.rope_theta, LLAMA_3)
    plain_cos, plain_sin = rope_table(positions, 32, config.rope_theta)
    scaled, plain = (torch.atan2(s, c)[0, 0, :16] for s, c in ((sin, cos), (plain_sin, plain_cos)))
    factors = period_factors(config)
    torch.testing.assert_close(plain / factors, scaled)
    assert (factors.min(), factors.max()) == (1, 8)


def yarn(**changes):
    return {"rope_scaling": dataclasses.replace(YARN, **changes)}


REFUSALS = {
    "window": ({"window": 127}, "null, since llama.cpp computes none for these models, got 127"),
    "no_rope_layer_interval": ({"no_rope_layer_interval": 2}, "4 or null, got 2"),
    "rope_scaling": (
        {"qk_norm": True, "rope_scaling": LLAMA_3},
        "null, linear or yarn with the architecture qwen3, got llama3",
    ),
    "rope_scaling.beta_fast": (yarn(beta_fast=16.0), r"32.0, as in llama.cpp, got 16.0"),
    "rope_scaling.truncate": (yarn(truncate=False), "True, as in llama.cpp, got False"),
    "rope_scaling.attention_factor": (yarn(attention_factor=1.0), r"1.138\d+, as in llama.cpp, got 1.0"),
    "attention.layer_norm_rms_epsilon": (
        {"norm_eps": 1.00000000001e-5},
        "a number of float32, got 1.00000000001e-05",
    ),
}


@pytest.mark.parametrize("key", REFUSALS)
def test_what_llama_cpp_does_not_compute(key):
    changes, message = REFUSALS[key]
    with pytest.raises(
        UserError, match=f"the model's {key} must be {message}; this model cannot be written as GGUF"
    ):
        to_metadata(shape(**changes))


def test_llama_3_without_our_key(tmp_path):
    """As llama.cpp's converter writes it, from values that all models of Llama 3 have."""
    scaling = dataclasses.replace(LLAMA_3, factor=32.0, original_max_positions=8192)
    config = shape(rope_scaling=scaling, rope_theta=500_000.0, head_dim=64, max_positions=131_072)
    read = read_shape(file_of(tmp_path / "a.gguf", config, without=[SCALING]))
    assert read.rope_scaling == scaling
    other = shape(
        rope_scaling=dataclasses.replace(scaling, original_max_positions=4096), rope_theta=500_000.0
    )
    with pytest.raises(
        UserError, match=r"rope_freqs\.weight must be of the scaling that Llama 3 has, got another"
    ):
        read_shape(file_of(tmp_path / "b.gguf", other, without=[SCALING]))
    for text, message in (("{", "must be JSON"), ('{"kind": "yarn"}', "must be of the kind llama3")):
        with pytest.raises(UserError, match=f"{SCALING} {message}"):
            read_shape(file_of(tmp_path / "c.gguf", config, **{SCALING: text}))
    contradicting = json.dumps(dataclasses.asdict(scaling) | {"factor": 16.0})
    with pytest.raises(UserError, match=r"rope_freqs\.weight must be of the scaling"):
        read_shape(file_of(tmp_path / "d.gguf", config, **{SCALING: contradicting}))


def test_defaults_of_llama_cpp(tmp_path):
    gone = ["llama.attention.head_count_kv", "llama.rope.freq_base", "llama.attention.key_length"]
    read = read_shape(file_of(tmp_path / "a.gguf", shape(), without=gone))
    assert (read.num_kv_heads, read.rope_theta, read.head_dim) == (4, 10_000.0, 16)
    read = read_shape(file_of(tmp_path / "b.gguf", shape(), **{"llama.rope.scaling.factor": 2.0}))
    assert read.rope_scaling == LinearScaling(factor=2.0)
    key = "llama.rope.scaling"
    for values in ({f"{key}.factor": 1.0}, {f"{key}.type": "none", f"{key}.factor": 4.0}):
        assert read_shape(file_of(tmp_path / "c.gguf", shape(), **values)).rope_scaling is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "gemma", "must be llama or qwen2 or qwen3 or smollm3, got 'gemma'"),
        ("llama.block_count", None, "is missing in the metadata; download or copy it again"),
        ("llama.block_count", "two", "must be of the type int, got 'two'"),
        ("llama.block_count", 0, "must be at least 1, got 0"),
        ("llama.attention.head_count_kv", [2, 1], r"must be of the type int, got \[2, 1\]"),
        ("llama.rope.dimension_count", 8, "must be 16, got 8: this model computes what Lumi does not"),
        ("llama.expert_count", 8, "must be 0, got 8: this model computes"),
        ("llama.attention.sliding_window", 64, "must be 0, got 64: this model computes"),
        ("llama.logit_scale", 2.0, "must not be set, got 2.0: this model computes"),
        ("llama.rope.scaling.type", "longrope", "must be none, linear or yarn, got 'longrope'"),
        ("token_embd.weight", None, "is missing among the tensors"),
    ],
)
def test_what_lumi_does_not_compute(key, value, message, tmp_path):
    changes = {} if value is None else {key: value}
    if key == "general.architecture":
        changes |= {key: value}
    with pytest.raises(UserError, match=message):
        read_shape(file_of(tmp_path / "a.gguf", shape(), without=[key] if value is None else (), **changes))


@pytest.mark.parametrize(("name", "dims"), [("token_embd.weight", (24576,)), (FREQUENCIES, (0,))])
def test_tensors_of_another_rank_or_of_nothing(name, dims, tmp_path):
    config = shape(rope_scaling=LLAMA_3)
    metadata = {key: value for key, value in to_metadata(config).items() if key != SCALING}
    tensors = {"token_embd.weight": torch.zeros(384, 64), FREQUENCIES: torch.ones(8), name: torch.zeros(dims)}
    plan = {key: (tuple(tensor.shape), "F32") for key, tensor in tensors.items()}
    write_gguf(tmp_path / "a.gguf", "llama", metadata, plan, lambda key: tensors[key])
    with pytest.raises(UserError, match=rf"a\.gguf: {name} (is missing|must be of the scaling)"):
        read_shape(open_gguf(tmp_path / "a.gguf"))
