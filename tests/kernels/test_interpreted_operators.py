"""Every Triton operator in the patched interpreter: on memory that notices wrong accesses, and with
instructions as inexact as a GPU's. The cases are those of `benchmarks/correctness.py`."""

import importlib
from pathlib import Path

import pytest
import torch
from parity import assert_parity

pytest.importorskip("triton", reason="Triton is not installed here")
import interpreted_memory
import interpreted_numbers

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
    # numpy warns about what nothing reads: the logits' buffer between V and its row's end.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
OPERATORS = (
    "rms_norm", "add_rms_norm", "swiglu", "rope", "attention", "decode_attention", "linear_cross_entropy",
)  # fmt: skip
WITHOUT_TRITON = {"lora_linear", "adamw"}

# float32 results may be so many ulps further off with approximate instructions, each 2 ulps off. That is not
# little beside the references', which is an ulp or so; beside a rounding to bfloat16 it is nothing.
# - RMSNorm: rstd = 1 / sqrt(sum / D + eps). The first quotient counts half (under the root): 1 + 2 + 2 = 5.
#   y has one factor rstd. In dx the projection rstd x_hat mean(dx_hat x_hat) has three, and a quotient: 17.
#   For random gradients over 96 elements and more it is at most an eighth of dx: 5 + 17 / 8 = 7.
# - SwiGLU: sigmoid = 1 / (1 + exp(-gate)): 2 of the quotient, and 2 of the power, weighed by 1 - sigmoid < 1.
#   y and dup have one: 4. dgate has another in 1 + gate (1 - sigmoid), of which at most half counts: 6.
# - Softmax needs nothing: quotients of summed powers, 2 ulps off each, lose less than the references' sums.
MORE_ULPS = {"rms_norm": 7, "add_rms_norm": 7, "swiglu": 6}


@pytest.fixture
def correctness(monkeypatch):
    """`benchmarks/correctness.py`, judged by the rule of `assert_parity`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("correctness")
    monkeypatch.setattr(module.measure, "check", judge(0))
    return module


def judge(more_ulps):
    """As `measure.check`; float32 sums of `terms` values may lose sqrt(terms) ulps there too."""

    def check(name, actual, same_dtype, exact, terms=1):
        for index, (a, s, e) in enumerate(zip(actual, same_dtype, exact, strict=True)):
            ulps = more_ulps + terms**0.5 if a.dtype == torch.float32 else 1
            assert_parity(f"{name}, tensor {index}", a, s, e, ulps=ulps)

    return check


def check_all(correctness, operator, dtype, small=True):
    for case in correctness.OPERATORS[operator]():
        if case.small == small:
            correctness.check(case, dtype, CPU, CPU)


def dtypes(*by_default):
    """Pairs of an operator and a dtype; all but some are left to the soak. float32 is slow: its tiles are
    small."""
    return pytest.mark.parametrize(
        ("operator", "dtype"),
        [
            pytest.param(
                operator,
                dtype,
                marks=[] if dtype in by_default and (operator, dtype) != SLOW else pytest.mark.soak,
                id=f"{operator}-{dtype}",
            )
            for operator in OPERATORS
            for dtype in (torch.bfloat16, torch.float32)
        ],
    )


SLOW = ("attention", torch.float32)


def test_no_operator_is_left_out(correctness):
    assert set(OPERATORS) == set(correctness.OPERATORS) - WITHOUT_TRITON


@dtypes(torch.bfloat16)
def test_accesses(operator, dtype, correctness, monkeypatch):
    """Each access is inside its tensor, no program needs another's result, and nothing unwritten counts."""
    interpreted_memory.install_checks(monkeypatch, seed=0)
    check_all(correctness, operator, dtype)


@dtypes(torch.float32)
def test_approximate_instructions(operator, dtype, correctness, monkeypatch):
    interpreted_numbers.install_approximations(monkeypatch, seed=0)
    monkeypatch.setattr(correctness.measure, "check", judge(MORE_ULPS.get(operator, 0)))
    check_all(correctness, operator, dtype)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("operator", OPERATORS)
def test_approximate_instructions_of_other_seeds(operator, seed, correctness, monkeypatch):
    interpreted_numbers.install_approximations(monkeypatch, seed)
    monkeypatch.setattr(correctness.measure, "check", judge(MORE_ULPS.get(operator, 0)))
    for dtype in (torch.bfloat16, torch.float32):
        check_all(correctness, operator, dtype)


# The loss has no place here: its larger cases are matrix products of minutes.
@pytest.mark.soak
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "linear_cross_entropy"])
def test_accesses_of_larger_cases(operator, correctness, monkeypatch):
    interpreted_memory.install_checks(monkeypatch, seed=1)
    check_all(correctness, operator, torch.bfloat16, small=False)
