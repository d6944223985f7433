import itertools
import math

import pytest
import torch
from parity import assert_parity

from lumi.kernels.attention import attention_plan_reference, attention_reference


def naive(q, k, v, cu_seqlens):
    """Document by document, head by head, token by token, in float64. Shares nothing with the code under test."""
    B, T, H, K = q.shape
    G = k.shape[2]
    q, k, v = (t.reshape(B * T, -1, K) for t in (q, k, v))
    rows = [[torch.zeros(K, dtype=q.dtype)] * H for _ in range(B * T)]
    for start, end in itertools.pairwise(cu_seqlens):
        for t, h in itertools.product(range(start, end), range(H)):
            g = h * G // H
            scores = torch.stack([q[t, h].dot(k[s, g]) / math.sqrt(K) for s in range(start, t + 1)])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            rows[t][h] = sum(weight * v[start + i, g] for i, weight in enumerate(weights))
    return torch.stack([torch.stack(row) for row in rows]).view(B, T, H, K)


def run(function, q, k, v, dy):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    y = function(q, k, v)
    return y, *torch.autograd.grad(y, (q, k, v), dy)


def inputs(B, T, H, G, K, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, K, dtype=dtype) for heads in (H, G, G, H)]


DOCUMENTS = {
    "one document a row": [0, 9, 18],
    "several": [0, 4, 9, 12, 18],
    "length one": [0, 1, 2, 8, 9, 17, 18],
    "empty": [0, 0, 4, 4, 4, 9, 9, 18, 18],
    "each token alone": list(range(19)),
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["gqa1", "gqa2", "gqa4"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_matches_a_loop_over_documents(documents, heads):
    q, k, v, dy = inputs(2, 9, *heads, 4)
    plan = attention_plan_reference(torch.tensor(documents, dtype=torch.int32), 2, 9, "cpu")
    actual = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    expected = run(lambda q, k, v: naive(q, k, v, documents), q, k, v, dy)
    for name, a, e in zip(("y", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=["gqa1", "gqa4"])
def test_no_documents_means_causal_rows(heads):
    q, k, v, dy = inputs(2, 9, *heads, 4)
    results = []
    for cu_seqlens in (None, torch.tensor([0, 9, 18], dtype=torch.int32)):
        plan = attention_plan_reference(cu_seqlens, 2, 9, "cpu")
        results.append(run(lambda q, k, v, plan=plan: attention_reference(q, k, v, plan), q, k, v, dy))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0][0], naive(q, k, v, [0, 9, 18]), rtol=1e-12, atol=1e-14)


def test_packed_equals_separate():
    """Three documents in one row give what each gives in a row of its own, gradients too."""
    q, k, v, dy = inputs(1, 30, 4, 2, 8)
    offsets = [0, 11, 12, 30]
    plan = attention_plan_reference(torch.tensor(offsets, dtype=torch.int32), 1, 30, "cpu")
    packed = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    pieces = []
    for start, end in itertools.pairwise(offsets):
        alone = attention_plan_reference(None, 1, end - start, "cpu")
        tensors = (t[:, start:end] for t in (q, k, v, dy))
        pieces.append(run(lambda q, k, v, alone=alone: attention_reference(q, k, v, alone), *tensors))
    for a, b in zip(packed, (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_another_document_cannot_be_felt():
    """Not even as NaN's neighbour: a finite change of one document leaves the others' bits alone."""
    q, k, v, _ = inputs(1, 12, 2, 2, 4, torch.float32)
    plan = attention_plan_reference(torch.tensor([0, 5, 12], dtype=torch.int32), 1, 12, "cpu")
    before = attention_reference(q, k, v, plan)
    k[:, :5] += 100
    v[:, :5] -= 100
    assert torch.equal(attention_reference(q, k, v, plan)[:, 5:], before[:, 5:])
    assert not torch.equal(attention_reference(q, k, v, plan)[:, :5], before[:, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_good_as_plain_torch(dtype):
    """Softmax is float32 inside: no worse than twice the same formula written out in the dtype."""
    q, k, v, dy = (t.to(dtype) for t in inputs(2, 33, 4, 2, 16))
    causal = torch.ones(33, 33, dtype=torch.bool).tril()

    def written_out(q, k, v):
        k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
        return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)

    plan = attention_plan_reference(None, 2, 33, "cpu")
    actual = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    same_dtype = run(written_out, q, k, v, dy)
    exact = run(written_out, q.double(), k.double(), v.double(), dy.double())
    for name, a, s, e in zip(("y", "dq", "dk", "dv"), actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 18], "every row boundary .multiples of 9., got none at 9"),
        ([0, 9, 17], "must go from 0 to batch . length = 18"),
        ([1, 9, 18], "must go from 0"),
        ([0, 12, 9, 18], "must go from 0"),
    ],
)
def test_rejects_wrong_boundaries(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        attention_plan_reference(torch.tensor(cu_seqlens, dtype=torch.int32), 2, 9, "cpu")


def test_rejects_wrong_boundary_dtype():
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 of shape \(num_documents \+ 1,\), got torch.int64"):
        attention_plan_reference(torch.tensor([0, 9]), 1, 9, "cpu")


def test_rejects_shapes_that_do_not_fit():
    q, k, v, _ = inputs(2, 9, 4, 3, 4)
    plan = attention_plan_reference(None, 2, 9, "cpu")
    with pytest.raises(ValueError, match="query heads must be a multiple of kv heads, got 4 and 3"):
        attention_reference(q, k, v, plan)
    with pytest.raises(ValueError, match="k and v must have shape"):
        attention_reference(q, k, v[:, :8], plan)
    with pytest.raises(ValueError, match=r"plan's batch and length \(2, 9\), got \(2, 8\)"):
        attention_reference(q[:, :8], k[:, :8], v[:, :8], plan)
