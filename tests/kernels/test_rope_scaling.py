"""Scaled rotary frequencies; transformers is the judge."""

import math
from dataclasses import replace

import pytest
import torch

from lumi.kernels.rope import rope_table
from lumi.kernels.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

LLAMA_3_1 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
SHORT = Llama3Scaling(factor=32.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_positions=100)
QWEN_2_5 = YarnScaling(factor=4.0, original_max_positions=32_768)
NARROW = YarnScaling(
    factor=2.5, original_max_positions=100, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3
)
SCALINGS = {
    "linear": LinearScaling(factor=3.0),
    "llama 3.1": LLAMA_3_1,
    "llama 3, short": SHORT,
    "yarn of Qwen 2.5": QWEN_2_5,
    "yarn, narrow": NARROW,
    "yarn, not truncated": replace(NARROW, truncate=False),
    "yarn of one": YarnScaling(factor=1.0, original_max_positions=100),
}


@pytest.fixture(scope="module")
def llama():
    """transformers' module of that name; `make gpu` does without."""
    pytest.importorskip("transformers", reason="transformers is not installed here")
    from transformers.models.llama import modeling_llama

    return modeling_llama


def judge(llama, head_dim, theta, scaling):
    parameters = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if not isinstance(scaling, LinearScaling):
        parameters["original_max_position_embeddings"] = scaling.original_max_positions
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"):
        if hasattr(scaling, name):
            parameters[name] = getattr(scaling, name)
    if scaling in (NARROW, SCALINGS["yarn, not truncated"]):  # the others have what follows from `factor`
        parameters["attention_factor"] = scaling.attention_factor
    config = llama.LlamaConfig(
        head_dim=head_dim,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=32_768,
        rope_parameters=parameters,
    )
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 48, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_table_is_transformers_table_to_the_bit(llama, head_dim, theta, scaling):
    torch.manual_seed(0)
    positions = torch.stack((torch.arange(700), torch.randint(0, 32_768, (700,))))
    cos, sin = judge(llama, head_dim, theta, SCALINGS[scaling])(torch.zeros(1), positions)
    ours = rope_table(positions, head_dim, theta, SCALINGS[scaling])
    assert torch.equal(ours[0], cos)
    assert torch.equal(ours[1], sin)
    assert ours[0].dtype == torch.float32


def test_llama_3_by_hand():
    """theta 4096, head_dim 6: wavelengths of 2 pi (1, 16, 256) tokens against 80 / 2 and 80 / 0.5: kept,
    between, slowed."""
    scaling = Llama3Scaling(factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_positions=80)
    cos, _ = rope_table(torch.tensor([[1]]), 6, 4096.0, scaling)
    weight = (80 / (2 * math.pi * 16) - 0.5) / 1.5
    expected = [1.0, (1 - weight) / 16 / 4 + weight / 16, 1 / 256 / 4]
    torch.testing.assert_close(cos[0, 0, :3].arccos(), torch.tensor(expected), rtol=1e-4, atol=0)


def test_yarn_by_hand():
    """theta 4096, head_dim 6: a frequency turns 12 times in 80 tokens at i = 0.02, half a time at i = 1.17.
    The whole numbers around are 0 and 2: the first is kept, the second in the middle, the third slowed."""
    scaling = YarnScaling(factor=4.0, original_max_positions=80, beta_fast=12.0, beta_slow=0.5)
    cos, sin = rope_table(torch.tensor([[1]]), 6, 4096.0, scaling)
    expected = [1.0, (1 / 16 + 1 / 64) / 2, 1 / 1024]
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0, :3], torch.tensor(expected), rtol=1e-5, atol=0)
    length = (cos[0, 0, :3] ** 2 + sin[0, 0, :3] ** 2).sqrt()
    torch.testing.assert_close(length, torch.full((3,), 0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("scaling", "changes", "message"),
    [
        (SCALINGS["linear"], {"factor": 0.5}, "factor must be at least 1, got 0.5"),
        (LLAMA_3_1, {"factor": 0.5}, "factor must be at least 1, got 0.5"),
        (
            LLAMA_3_1,
            {"low_freq_factor": 4.0},
            "low_freq_factor must be positive and below high_freq_factor = 4.0, got 4.0",
        ),
        (LLAMA_3_1, {"low_freq_factor": 0.0}, "low_freq_factor must be positive"),
        (LLAMA_3_1, {"original_max_positions": 0}, "original_max_positions must be at least 1, got 0"),
        (QWEN_2_5, {"factor": 0.9}, "factor must be at least 1, got 0.9"),
        (QWEN_2_5, {"beta_fast": 1.0}, "beta_slow must be positive and below beta_fast = 1.0, got 1.0"),
        (QWEN_2_5, {"attention_factor": 0.0}, "attention_factor must be positive, got 0.0"),
        (QWEN_2_5, {"original_max_positions": 0}, "original_max_positions must be at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_scaling(scaling, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(scaling, **changes)
