import numpy as np
import pytest

from lumi.config import UserError
from lumi.sweeps.scaling_law import Law, Points, bootstrap, check_points, fit_law, interval

TRUTH = Law(*map(np.float64, (0.8, 80.0, 0.34, 90.0, 0.28)))


def design(sizes=(1e6, 3e6, 1e7, 3e7), tokens=(1e7, 4e7, 1.6e8, 6.4e8), seeds=2, noise=0.0, seed=0):
    """Runs of the true law; `noise`: the deviation of the log losses."""
    grid = np.meshgrid(sizes, tokens)
    sizes, tokens = (np.repeat(axis.ravel(), seeds) for axis in grid)
    errors = np.random.default_rng(seed).normal(0, noise, sizes.size)
    return Points(sizes, tokens, TRUTH.loss(sizes, tokens) * np.exp(errors))


def test_without_noise_the_true_numbers_come_out():
    np.testing.assert_allclose(fit_law(design()), TRUTH, rtol=1e-9)


def test_the_true_numbers_lie_in_the_intervals():
    """Each of the five in 95% of cases: of 8 data sets in at least 6. And the intervals are narrow."""
    inside = np.zeros(5)
    for seed in range(8):
        points = design(noise=2e-3, seed=seed)
        law = fit_law(points)
        intervals = [interval(values) for values in bootstrap(points, law, seed)]
        inside += [low <= truth <= high for (low, high), truth in zip(intervals, TRUTH, strict=True)]
        a = intervals[2]
        assert a[1] - a[0] < 0.1
    assert inside.min() >= 6


def test_one_wild_run_moves_nothing():
    points = design(noise=1e-3)
    points.losses[5] *= 1.3
    assert abs(fit_law(points).a - TRUTH.a) < 0.03
    assert abs(fit_law(points).b - TRUTH.b) < 0.03


def test_the_best_size_has_the_lowest_loss_of_all_that_cost_the_same():
    products = 1e15
    sizes = np.geomspace(1e4, 1e10, 200_001)
    by_search = sizes[TRUTH.loss(sizes, products / sizes).argmin()]
    assert TRUTH.best_size(products) == pytest.approx(by_search, rel=1e-3)


def test_as_many_runs_as_numbers_have_no_interval():
    points = design()
    few = Points(*(column[[0, 8, 10, 18, 30]] for column in points))
    check_points(few)
    assert bootstrap(few, fit_law(few)) is None


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (design((1e6, 1e7), (1e7, 1e8)), "at least 5 different pairs of size and tokens, got 4"),
        (design((1e6, 1e7), (1e7, 2e7, 4e7)), "at least 3 different sizes, got 2"),
        (design((1e6, 2e6, 4e6), (1e7, 2e7)), "at least 3 different numbers of tokens, got 2"),
    ],
)
def test_too_few_runs_are_refused(points, message):
    with pytest.raises(UserError, match=f"RUN must name finished runs of {message}; add such runs"):
        check_points(points)


def test_a_ladder_with_equal_tokens_per_parameter_is_refused():
    sizes = np.geomspace(1e6, 1e8, 9)
    with pytest.raises(UserError, match="RUN must name runs in which size and tokens differ apart"):
        check_points(Points(sizes, 20 * sizes, TRUTH.loss(sizes, 20 * sizes)))
