import numpy as np
import pytest

from lumi.sweeps.fitted_law import Estimate, make_fit
from lumi.sweeps.law_runs import LawRun
from lumi.sweeps.scaling_law import Law

TRUTH = Law(*map(np.float64, (0.8, 80.0, 0.34, 90.0, 0.28)))


def law_runs(flops_per_product=5.0):
    generator, runs = np.random.default_rng(1), []
    for size in (10**6, 10**7, 10**8):
        for tokens in (10**8, 10**9, 10**10):
            loss = TRUTH.loss(size, tokens) * np.exp(generator.normal(0, 1e-3))
            flops = flops_per_product * size * tokens
            common = {"path": None, "held_out_bytes": 9, "setting": "", "flops": flops}
            runs.append(LawRun(num_parameters=size, tokens=tokens, bits_per_byte=float(loss), **common))
    return runs


def test_a_budget_is_spent_and_its_loss_is_the_laws():
    fitted = make_fit(law_runs())
    assert fitted.flops_per_product == pytest.approx(5.0)
    best = fitted.best(1e17)
    assert best["parameters"].value * best["tokens"].value == pytest.approx(1e17 / 5)
    assert best["bits_per_byte"].value == pytest.approx(
        TRUTH.loss(*(size := TRUTH.best_size(1e17 / 5), 1e17 / 5 / size)), rel=0.01
    )
    low, high = best["parameters"].interval
    assert low < TRUTH.best_size(1e17 / 5) < high
    assert fitted.numbers()["a"].interval[0] < 0.34 < fitted.numbers()["a"].interval[1]


def test_an_estimate_in_words():
    assert Estimate(1234.56, (1000.0, 2000.0)).describe() == "1235 [1000, 2000]"
    assert Estimate(2.0, None).describe("{:.1f}".format) == "2.0 (no interval)"
