"""Rotary parameters of transformers' configs, read and written; transformers is the judge."""

import pytest
import torch
import transformers

from lumi.config import UserError
from lumi.formats.hf_config import from_hf_config, to_hf_config
from lumi.formats.hf_format import load_model, save_model
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from lumi.model.model_config import ModelConfig

LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 30,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FINE_YARN = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.25, "truncate": False}
ROPES = {
    "linear": (LINEAR, LinearScaling(factor=3.0)),
    "llama3": (
        LLAMA_3,
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=30),
    ),
    "yarn": (YARN, YarnScaling(factor=4.0, original_max_positions=32)),
    "yarn with all its keys": (
        FINE_YARN,
        YarnScaling(
            factor=4.0,
            original_max_positions=32,
            beta_fast=8.0,
            beta_slow=2.0,
            attention_factor=1.25,
            truncate=False,
        ),
    ),
}
LLAMA = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
IDS = torch.randint(6, 384, (2, 100), generator=torch.Generator().manual_seed(0))


def their_logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ROPES)
def test_a_random_llama_with_scaled_positions(name, tokenizer, tmp_path):
    rope, scaling = ROPES[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=rope | {"rope_theta": 20_000.0})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", REFERENCE).eval()
    assert ours.config.rope_scaling == scaling
    with torch.no_grad():
        logits = ours.logits(ours.hidden(IDS))
    torch.testing.assert_close(logits, their_logits(theirs), rtol=1e-4, atol=1e-4)
    save_model(tmp_path / "ours", ours, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(their_logits(again), their_logits(theirs))


@pytest.mark.parametrize("name", ROPES)
def test_it_comes_back_as_it_went(name, tokenizer):
    shape = {"vocab_size": 384, "num_layers": 1, "model_dim": 32, "num_heads": 2, "mlp_dim": 32}
    config = ModelConfig(**shape, rope_scaling=ROPES[name][1])
    written = to_hf_config(config, tokenizer, "float32")
    assert from_hf_config(written, "c") == config
    del written["rope_parameters"]  # as older programs have it
    assert from_hf_config(written, "c") == config


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type must be 'default' or .* 'yarn', got 'dynamic'"),
        ({"rope_type": "longrope"}, "rope_type must be 'default' or .* 'yarn', got 'longrope'"),
        ({"rope_type": "linear"}, "factor of the rope type linear is missing"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor of the rope type llama3 is missing"),
        ({"rope_type": "yarn", "factor": 8.0}, "original_max_position_embeddings of the rope type yarn is"),
        (YARN | {"mscale": 0.7}, "mscale must not be set with the rope type yarn, got 0.7"),
        ({"factor": 4.0}, "factor must not be set with the rope type default, got 4.0"),
        (LINEAR | {"factor": 0.5}, "rope_scaling.factor must be at least 1, got 0.5"),
        (YARN | {"factor": None}, "rope_scaling.factor is required, but missing"),
        (LINEAR | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        ([1], r"rope_parameters must be an object, got \[1\]"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused_by_name(rope, message):
    with pytest.raises(UserError, match=message):
        from_hf_config({"model_type": "llama", "rope_parameters": rope} | LLAMA, "c")


@pytest.mark.parametrize(
    "older", [{"type": "linear", "factor": 4.0}, {"type": "linear"}, [1], YARN | {"factor": 2.0}], ids=str
)
def test_both_keys_must_say_the_same(older):
    data = {"model_type": "llama", "rope_parameters": YARN, "rope_scaling": older} | LLAMA
    with pytest.raises(UserError, match="rope_parameters and rope_scaling must say the same, got"):
        from_hf_config(data, "c")


def test_the_positions_of_pre_training_stand_in_two_places_in_some_configs():
    data = {"model_type": "llama", "rope_parameters": YARN, "original_max_position_embeddings": 32} | LLAMA
    assert from_hf_config(data, "c").rope_scaling == YarnScaling(factor=4.0, original_max_positions=32)
    data["original_max_position_embeddings"] = 64
    with pytest.raises(UserError, match=r"must say the same in both places, got 64 and 32"):
        from_hf_config(data, "c")
