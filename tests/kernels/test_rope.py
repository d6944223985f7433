import math
from dataclasses import replace

import pytest
import torch
from parity import assert_parity
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lumi.kernels.rope import RopeScaling, rope_reference, rope_table

LLAMA_3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
SHORT = RopeScaling(factor=32.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_positions=100)


def judge(head_dim, theta, scaling=None, max_positions=32_768):
    rope_parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope_parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=head_dim,
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=max_positions,
            rope_parameters=rope_parameters,
        )
    )


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 48, 64, 128])
@pytest.mark.parametrize("scaling", [None, LLAMA_3_1, SHORT], ids=["unscaled", "llama 3.1", "short"])
def test_table_is_transformers_table_to_the_bit(head_dim, theta, scaling):
    torch.manual_seed(0)
    positions = torch.stack((torch.arange(700), torch.randint(0, 32_768, (700,))))
    cos, sin = judge(head_dim, theta, scaling)(torch.zeros(1), positions)
    ours = rope_table(positions, head_dim, theta, scaling)
    assert torch.equal(ours[0], cos)
    assert torch.equal(ours[1], sin)
    assert ours[0].dtype == torch.float32


def test_scaling_by_hand():
    """theta 4096, head_dim 6: wavelengths of 2 pi (1, 16, 256) tokens against 80 / 2 and 80 / 0.5: kept, between, slowed."""
    scaling = RopeScaling(factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_positions=80)
    cos, _ = rope_table(torch.tensor([[1]]), 6, 4096.0, scaling)
    weight = (80 / (2 * math.pi * 16) - 0.5) / 1.5
    expected = [1.0, (1 - weight) / 16 / 4 + weight / 16, 1 / 256 / 4]
    torch.testing.assert_close(cos[0, 0, :3].arccos(), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"low_freq_factor": 4.0}, "low_freq_factor must be positive and below high_freq_factor = 4.0, got 4.0"),
        ({"low_freq_factor": 0.0}, "low_freq_factor must be positive"),
        ({"original_max_positions": 0}, "original_max_positions must be at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_scaling(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LLAMA_3_1, **changes)


def test_rotation_is_transformers_rotation_to_the_bit():
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 0, 1]])
    cos, sin = rope_table(positions, 64, 10_000.0)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, expected in zip(rope_reference(q, k, cos, sin), theirs, strict=True):
        assert torch.equal(ours, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(1, 50, 2, 32).to(dtype), torch.randn(1, 50, 1, 32).to(dtype)
    cos, sin = rope_table(torch.arange(50)[None], 32, 10_000.0)
    once = [t.to(dtype) for t in rope_reference(q.float(), k.float(), cos, sin)]
    for ours, expected in zip(rope_reference(q, k, cos, sin), once, strict=True):
        assert torch.equal(ours, expected)


def test_scores_depend_on_the_distance_only():
    """The property that rotary embeddings exist for, in float64 with tables made in float64."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)

    def score(q_position, k_position):
        rotated = []
        for x, position in ((q, q_position), (k, k_position)):
            angles = (position * frequencies).repeat(2)[None, None]
            rotated.append(rope_reference(x, x, angles.cos(), angles.sin())[0])
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-12, atol=1e-13)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_table_is_exact_to_its_dtype():
    """Against float64 cosines of the float32 angles: each entry within an ulp of 1."""
    positions = torch.arange(2048)[None]
    cos, sin = rope_table(positions, 64, 10_000.0)
    frequencies = 1.0 / (10_000.0 ** (torch.arange(0, 64, 2).float() / 64))
    angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)
    for name, ours, function in (("cos", cos, torch.cos), ("sin", sin, torch.sin)):
        assert_parity(name, ours, function(angles), function(angles.double()))


@pytest.mark.parametrize(
    ("positions", "head_dim", "message"),
    [((5,), 8, r"shape \(B, T\), got \(5,\)"), ((1, 5), 7, "head_dim must be even and positive, got 7")],
)
def test_rejects(positions, head_dim, message):
    with pytest.raises(ValueError, match=message):
        rope_table(torch.zeros(positions, dtype=torch.int64), head_dim, 10_000.0)
