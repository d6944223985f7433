"""The two plans: what each token sees, as a mask and as intervals."""

import itertools

import pytest
import torch

from lumi.kernels.attention_plan import ORDER_BLOCK, attention_plan, attention_plan_reference

BOTH = pytest.mark.parametrize("make", [attention_plan_reference, attention_plan], ids=["mask", "intervals"])


def seen(offsets, length, window):
    """(N, N) by the definition, token by token."""
    N = offsets[-1]
    result = torch.zeros(N, N, dtype=torch.bool)
    for start, end in itertools.pairwise(offsets):
        for t in range(start, end):
            for s in range(start, t + 1):
                result[t, s] = window is None or t - s < window
    return result


CASES = {
    "rows": (2, 9, None),
    "documents": (2, 9, [0, 4, 9, 12, 18]),
    "empty ones": (2, 9, [0, 0, 4, 4, 9, 9, 18, 18]),
    "each token alone": (1, 9, list(range(10))),
}


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_both_say_what_the_definition_says(case, window):
    batch, length, offsets = CASES[case]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    expected = seen(offsets or list(range(0, batch * length + 1, length)), length, window)
    mask = attention_plan_reference(cu_seqlens, batch, length, "cpu", window).mask
    if mask is None:
        assert case == "rows"
        assert window in (None, 100)  # at least a row
    else:
        assert torch.equal(torch.block_diag(*mask[:, 0]).bool(), expected)
    plan = attention_plan(cu_seqlens, batch, length, "cpu", window)
    position = torch.arange(batch * length)
    assert plan.first_key.dtype == plan.last_query.dtype == torch.int32
    assert torch.equal((plan.first_key[:, None] <= position) & (position <= position[:, None]), expected)
    assert torch.equal((plan.last_query[:, None] >= position) & (position >= position[:, None]), expected.T)


def test_the_most_work_comes_first():
    """Rows of 5 tiles: the last tiles of queries and the first tiles of keys have the longest walks."""
    plan = attention_plan(None, 2, 5 * ORDER_BLOCK, "cpu")
    assert plan.query_order.tolist() == [4, 9, 3, 8, 2, 7, 1, 6, 0, 5]
    assert plan.key_order.tolist() == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    ragged = attention_plan(None, 1, 2 * ORDER_BLOCK + 1, "cpu")
    assert sorted(ragged.query_order.tolist()) == sorted(ragged.key_order.tolist()) == [0, 1, 2]


def test_unchecked_offsets_never_lead_out_of_a_row(monkeypatch):
    """On a GPU the offsets are not read back. Whatever they hold, every interval holds its token and stays in
    the token's row."""
    monkeypatch.setattr("lumi.kernels.attention_plan._check", lambda *_: None)
    torch.manual_seed(0)
    row = torch.arange(20) // 10 * 10
    for _ in range(50):
        offsets = torch.randint(-50, 50, (4,), dtype=torch.int32).sort().values
        plan = attention_plan(offsets, 2, 10, "cpu")
        token = torch.arange(20)
        assert ((row <= plan.first_key) & (plan.first_key <= token)).all()
        assert ((token <= plan.last_query) & (plan.last_query < row + 10)).all()


@BOTH
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 18], "every row boundary .multiples of 9., got none at 9"),
        ([0, 9, 17], "must go from 0 to batch . length = 18"),
        ([1, 9, 18], "must go from 0"),
        ([0, 12, 9, 18], "must go from 0"),
    ],
)
def test_rejects_wrong_boundaries(cu_seqlens, message, make):
    with pytest.raises(ValueError, match=message):
        make(torch.tensor(cu_seqlens, dtype=torch.int32), 2, 9, "cpu")


@BOTH
def test_rejects_wrong_boundary_dtype(make):
    with pytest.raises(
        ValueError, match=r"cu_seqlens must be int32 of shape \(num_documents \+ 1,\), got torch.int64"
    ):
        make(torch.tensor([0, 9]), 1, 9, "cpu")


@BOTH
def test_rejects_a_window_of_nothing(make):
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        make(None, 1, 9, "cpu", 0)
