import math

import pytest

from lumi.training.loss_scale import LossScale


def test_an_overflow_halves_it_and_patience_doubles_it():
    scale = LossScale("float16", patience=3)
    seen = []
    for finite in (False, False, True, True, True, True, True, False, True, True, True):
        scale.update(finite)
        seen.append(math.log2(scale.value))
    assert seen == [14, 13, 13, 13, 14, 14, 14, 13, 13, 13, 14]


def test_it_never_falls_below_one():
    scale = LossScale("float16")
    for _ in range(20):
        scale.update(False)
    assert scale.value == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_need_none(dtype):
    scale = LossScale(dtype, patience=1)
    for finite in (False, True, True):
        scale.update(finite)
    assert scale.value == 1.0
