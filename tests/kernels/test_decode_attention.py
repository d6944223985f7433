import pytest
import torch

from lumi.kernels.attention import attention_plan_reference, attention_reference
from lumi.kernels.decode_attention import decode_attention_reference


def inputs(B, T, H, G, K):
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, K, dtype=torch.float64) for heads in (H, G, G)]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["gqa1", "gqa2", "gqa4"])
@pytest.mark.parametrize("split", [[13], [1] * 13, [6, 1, 5, 1]], ids=["prefill", "one by one", "chunks"])
def test_step_by_step_equals_all_at_once(split, heads):
    q, k, v = inputs(2, 13, *heads, 8)
    expected = attention_reference(q, k, v, attention_plan_reference(None, 2, 13, "cpu"))
    k_cache, v_cache = torch.zeros(2, 2, 20, heads[1], 8, dtype=torch.float64)
    pieces, start = [], 0
    for length in split:
        new = slice(start, start + length)
        k_cache[:, new], v_cache[:, new] = k[:, new], v[:, new]
        positions = torch.arange(new.start, new.stop).expand(2, -1)
        pieces.append(decode_attention_reference(q[:, new], k_cache, v_cache, positions))
        start += length
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-12, atol=1e-14)


def test_rows_may_stand_at_different_positions():
    q, k, v = inputs(2, 9, 4, 2, 8)
    expected = attention_reference(q, k, v, attention_plan_reference(None, 2, 9, "cpu"))
    positions = torch.tensor([[3], [8]])
    actual = decode_attention_reference(torch.stack((q[0, 3:4], q[1, 8:9])), k, v, positions)
    torch.testing.assert_close(actual[:, 0], torch.stack((expected[0, 3], expected[1, 8])), rtol=1e-12, atol=1e-14)


def test_later_slots_cannot_be_felt():
    q, k, v = inputs(1, 6, 2, 2, 4)
    positions = torch.tensor([[2]])
    before = decode_attention_reference(q[:, 2:3], k, v, positions)
    k[:, 3:], v[:, 3:] = 1e6, -1e6
    assert torch.equal(decode_attention_reference(q[:, 2:3], k, v, positions), before)
    v[:, 2] += 1
    assert not torch.equal(decode_attention_reference(q[:, 2:3], k, v, positions), before)


def test_rejects_shapes_that_do_not_fit():
    q, k, v = inputs(2, 5, 4, 2, 8)
    positions = torch.arange(5).expand(2, -1)
    with pytest.raises(ValueError, match="the caches must have shape"):
        decode_attention_reference(q, k, v[:, :4], positions)
    with pytest.raises(ValueError, match=r"positions must have shape \(2, 5\), got \(2, 4\)"):
        decode_attention_reference(q, k, v, positions[:, :4])
    with pytest.raises(ValueError, match="query heads must be a multiple of kv heads, got 3 and 2"):
        decode_attention_reference(q[:, :, :3], k, v, positions)
