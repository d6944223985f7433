"""The judge itself: what it must refuse."""

import pytest
import torch
from parity import assert_parity

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def test_accepts_twice_the_reference_error_and_an_ulp():
    reference = EXACT.float() + 1e-4
    assert_parity("y", EXACT.float() - 2e-4, reference, EXACT)


@pytest.mark.parametrize(
    "actual",
    [EXACT.float() + 3e-4, EXACT.float() * float("nan"), EXACT.float()[:2], EXACT],
    ids=["error", "nan", "shape", "dtype"],
)
def test_refuses(actual):
    with pytest.raises(AssertionError, match="y: "):
        assert_parity("y", actual, EXACT.float() + 1e-4, EXACT)


def test_an_exact_reference_leaves_one_ulp():
    with pytest.raises(AssertionError, match="exceeds budget"):
        assert_parity("y", EXACT.float() * (1 + 4e-7), EXACT.float(), EXACT)


def test_empty_is_poisoned():
    assert torch.empty(4).isnan().all()
    assert torch.empty_like(torch.ones(4)).isnan().all()
