import pytest

from lumi.sweeps.fitted_law import Estimate, make_fit


def test_a_budget_is_spent_and_its_loss_is_the_laws(law_runs, true_law):
    fitted = make_fit(law_runs)
    assert fitted.flops_per_product == pytest.approx(5.0)
    best, size = fitted.best(1e17), true_law.best_size(2e16)
    assert best["parameters"].value * best["tokens"].value == pytest.approx(2e16)
    for name, truth in (("parameters", size), ("bits_per_byte", true_law.loss(size, 2e16 / size))):
        low, high = best[name].interval
        assert low < truth < high
        assert high < 2 * low
    low, high = fitted.numbers()["a"].interval
    assert low < true_law.a < high


def test_an_estimate_in_words():
    assert Estimate(1234.56, (1000.0, 2000.0)).describe() == "1235 [1000, 2000]"
    assert Estimate(2.0, None).describe("{:.1f}".format) == "2.0 (no interval)"
