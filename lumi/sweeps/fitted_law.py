"""A law fitted to runs, with its uncertainty, and the size that a budget of FLOPs should take."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lumi.sweeps.law_runs import LawRun, points_of
from lumi.sweeps.scaling_law import Law, bootstrap, check_points, fit_law, interval


class Estimate(NamedTuple):
    """A number with its 95% interval; None: there are too few runs for one."""

    value: float
    interval: tuple[float, float] | None

    def describe(self, show: Callable[[float], str] = "{:.4g}".format) -> str:
        """For people."""
        if self.interval is None:
            return f"{show(self.value)} (no interval)"
        return f"{show(self.value)} [{show(self.interval[0])}, {show(self.interval[1])}]"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        others: the law for data that could have come instead; None: there are too few runs.
        flops_per_product: FLOPs for each parameter and token, the median of the runs.
    """

    runs: Sequence[LawRun]
    law: Law
    others: Law | None
    flops_per_product: float

    def numbers(self) -> dict[str, Estimate]:
        """E, A, a, B and b."""
        return {
            name: _estimate(getattr(self.law, name), self.others and getattr(self.others, name))
            for name in Law._fields
        }

    def best(self, flops: float) -> dict[str, Estimate]:
        """What a budget of FLOPs should take, and the held-out bits per byte that it comes to."""
        products = flops / self.flops_per_product

        def of(law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            size = law.best_size(products)
            return size, products / size, law.loss(size, products / size)

        others = (None, None, None) if self.others is None else of(self.others)
        names = ("parameters", "tokens", "bits_per_byte")
        return {
            name: _estimate(value, more)
            for name, value, more in zip(names, of(self.law), others, strict=True)
        }


def _estimate(value: np.ndarray, others: np.ndarray | None) -> Estimate:
    return Estimate(float(value), None if others is None else interval(others))


def make_fit(runs: Sequence[LawRun]) -> Fit:
    """Fit the law. Raises UserError for runs from which it cannot be told."""
    points = points_of(runs)
    check_points(points)
    law = fit_law(points)
    ratio = statistics.median(run.flops_per_product for run in runs)
    return Fit(runs=runs, law=law, others=bootstrap(points, law), flops_per_product=ratio)
