"""The law loss = E + A / N^a + B / D^b, fitted to runs of N parameters and D tokens.

Hoffmann et al. 2022, arXiv:2203.15556, approach 3: the Huber loss between the logarithms of both sides, from
several starts. Minimised by Levenberg-Marquardt with the weights of the Huber loss, many fits at once.
"""

from typing import NamedTuple

import numpy as np

from lumi.config import UserError

HUBER_DELTA = 1e-3  # of Hoffmann et al.; a residual of 0.1% of the loss
NUM_PARAMETERS = 5
NUM_BOOTSTRAPS = 1000
MOST_ITERATIONS = 300
PATIENCE = 8  # iterations in which no fit gets better, after which all are done
# Of log E, log A and log B at the runs' mean size and tokens, log a and log b. Beyond, nothing changes.
_LOWEST = np.array([-30.0, -30.0, -6.0, -30.0, -6.0])
_HIGHEST = np.array([10.0, 10.0, 1.5, 10.0, 1.5])


class Points(NamedTuple):
    """Runs: `sizes` (parameters), `tokens` and `losses`, each (runs,) float64."""

    sizes: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray


class Law(NamedTuple):
    """The law's numbers, each a float or an array of as many fits."""

    E: np.ndarray
    A: np.ndarray
    a: np.ndarray
    B: np.ndarray
    b: np.ndarray

    def loss(self, sizes: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """The loss of models of these sizes after these tokens."""
        return self.E + self.A / sizes**self.a + self.B / tokens**self.b

    def best_size(self, products: np.ndarray | float) -> np.ndarray:
        """The size of the lowest loss where size x tokens must be `products`."""
        ratio = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        return ratio * products ** (self.b / (self.a + self.b))


def check_points(points: Points) -> None:
    """Raises UserError for runs from which the law cannot be told: too few, or too much alike."""
    pairs = np.unique(np.column_stack([points.sizes, points.tokens]), axis=0)
    sizes, tokens = (len(np.unique(column)) for column in pairs.T)
    for what, number, least in (
        ("different pairs of size and tokens", len(pairs), NUM_PARAMETERS),
        ("different sizes", sizes, 3),
        ("different numbers of tokens", tokens, 3),
    ):
        if number < least:
            expectation = f"must name finished runs of at least {least} {what}"
            raise UserError("RUN", expectation, got=number, remedy="add such runs")
    if abs(np.corrcoef(np.log(pairs).T)[0, 1]) > 0.99:
        remedy = "add runs of the same size with other tokens"
        got = "tokens that follow from the size"
        raise UserError("RUN", "must name runs in which size and tokens differ apart", got=got, remedy=remedy)


def fit_law(points: Points) -> Law:
    """The law that fits best."""
    starts = _starts(points)
    targets = np.broadcast_to(np.log(points.losses), (len(starts), len(points.losses)))
    fitted, objective = _minimise(starts, points, targets)
    return _law(fitted[np.argmin(objective)], points)


def bootstrap(points: Points, law: Law, seed: int = 0) -> Law | None:
    """The law of many data sets that could have come instead: arrays of `NUM_BOOTSTRAPS`.

    Each has the runs' sizes and tokens. Its losses are the law's with residuals drawn from those of the fit,
    which are widened for the five numbers that were fitted to them. None: there are no more runs than
    numbers, so residuals say nothing.
    """
    num_runs = len(points.losses)
    if num_runs <= NUM_PARAMETERS:
        return None
    fitted = np.log(law.loss(points.sizes, points.tokens))
    residuals = np.log(points.losses) - fitted
    residuals = (residuals - residuals.mean()) * np.sqrt(num_runs / (num_runs - NUM_PARAMETERS))
    generator = np.random.default_rng(seed)
    targets = fitted + generator.choice(residuals, (NUM_BOOTSTRAPS, num_runs))
    starts = np.tile(_theta(law, points), (NUM_BOOTSTRAPS, 1))
    return _law(_minimise(starts, points, targets)[0], points)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _means(points: Points) -> tuple[float, float]:
    return float(np.log(points.sizes).mean()), float(np.log(points.tokens).mean())


def _starts(points: Points) -> np.ndarray:
    """(starts, 5): how much of the lowest loss is E, and the exponents; the rest is shared equally."""
    lowest, mean = points.losses.min(), points.losses.mean()
    starts = []
    for share in (0.5, 0.9):
        rest = np.log((mean - share * lowest) / 2)
        for a in (0.2, 0.5, 1.0):
            starts += [[np.log(share * lowest), rest, np.log(a), rest, np.log(b)] for b in (0.2, 0.5, 1.0)]
    return np.array(starts)


def _law(theta: np.ndarray, points: Points) -> Law:
    """The law of (..., 5) numbers of `_minimise`."""
    size, tokens = _means(points)
    e, log_a, a, log_b, b = np.moveaxis(theta, -1, 0)
    a, b = np.exp(a), np.exp(b)
    return Law(np.exp(e), np.exp(log_a + a * size), a, np.exp(log_b + b * tokens), b)


def _theta(law: Law, points: Points) -> np.ndarray:
    size, tokens = _means(points)
    log_a, log_b = np.log(law.A) - law.a * size, np.log(law.B) - law.b * tokens
    return np.array([np.log(law.E), log_a, np.log(law.a), log_b, np.log(law.b)])


def _minimise(theta: np.ndarray, points: Points, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit each row of (fits, 5) starts to its row of (fits, runs) log losses.

    Returns:
        what it came to, and the (fits,) Huber losses.
    """
    size, tokens = _means(points)
    x, y = np.log(points.sizes) - size, np.log(points.tokens) - tokens
    theta = np.clip(theta, _LOWEST, _HIGHEST)
    residuals, jacobian = _residuals(theta, x, y, targets)
    objective, damping = _huber(residuals), np.full(len(theta), 1e-2)
    idle = 0
    for _ in range(MOST_ITERATIONS):
        if idle == PATIENCE:
            break
        weights = 1 / np.maximum(1.0, np.abs(residuals) / HUBER_DELTA)
        weighted = jacobian * weights[..., None]
        normal = weighted.transpose(0, 2, 1) @ jacobian
        gradient = (weighted * residuals[..., None]).sum(axis=1)
        diagonal = np.einsum("fii->fi", normal) + 1e-12
        damped = normal + np.eye(NUM_PARAMETERS) * (damping[:, None] * diagonal)[:, None, :] + _TINY
        step = np.linalg.solve(damped, gradient[..., None])[..., 0]
        tried = np.clip(theta - step, _LOWEST, _HIGHEST)
        new_residuals, new_jacobian = _residuals(tried, x, y, targets)
        new_objective = _huber(new_residuals)
        better = new_objective < objective
        idle = 0 if np.any(new_objective < (1 - 1e-7) * objective - 1e-16) else idle + 1
        theta = np.where(better[:, None], tried, theta)
        residuals = np.where(better[:, None], new_residuals, residuals)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        objective = np.where(better, new_objective, objective)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return theta, objective


_TINY = 1e-15 * np.eye(NUM_PARAMETERS)  # keeps the equations solvable where a number has no effect


def _residuals(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(fits, runs) residuals of the log losses, and their (fits, runs, 5) derivatives."""
    e, log_a, a, log_b, b = (column[:, None] for column in theta.T)
    a, b = np.exp(a), np.exp(b)
    terms = np.stack(np.broadcast_arrays(e, log_a - a * x, log_b - b * y), axis=-1)
    highest = terms.max(axis=-1, keepdims=True)
    shares = np.exp(terms - highest)
    total = shares.sum(axis=-1, keepdims=True)
    shares /= total
    predicted = (highest + np.log(total))[..., 0]
    constant, of_size, of_tokens = np.moveaxis(shares, -1, 0)
    jacobian = np.stack([constant, of_size, -of_size * a * x, of_tokens, -of_tokens * b * y], axis=-1)
    return predicted - targets, jacobian


def _huber(residuals: np.ndarray) -> np.ndarray:
    """The (fits,) sums of the Huber losses of (fits, runs)."""
    size = np.abs(residuals)
    inside, outside = residuals**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)
    return np.where(size <= HUBER_DELTA, inside, outside).sum(axis=1)
