"""The picture of a fitted law: the runs on its curves, and the best size for each budget."""

from pathlib import Path
from typing import Any

import numpy as np

from lumi.sweeps.fitted_law import Fit
from lumi.training.metrics import human


def draw_fit(fitted: Fit, path: Path) -> None:
    """Left: runs and law against tokens, a colour for each size. Right: the best size against FLOPs."""
    import matplotlib.figure  # here: it takes longer to import than everything else

    figure = matplotlib.figure.Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, fitted)
    _draw_best(right, fitted)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    right.set_yscale("log")
    figure.savefig(path)


def _draw_curves(axes: Any, fitted: Fit) -> None:
    tokens = np.array([run.tokens for run in fitted.runs], dtype=np.float64)
    along = np.geomspace(tokens.min() / 1.5, tokens.max() * 1.5, 100)
    for size in sorted({run.num_parameters for run in fitted.runs}):
        runs = [run for run in fitted.runs if run.num_parameters == size]
        points = [(run.tokens, run.bits_per_byte) for run in runs]
        (dots,) = axes.plot(*zip(*points, strict=True), "o", markersize=4, label=human(size))
        axes.plot(along, fitted.law.loss(size, along), color=dots.get_color(), linewidth=1)
    axes.set(xlabel="tokens", ylabel="held-out bits per byte", title="the law, for each number of parameters")


def _draw_best(axes: Any, fitted: Fit) -> None:
    flops = np.array([run.flops for run in fitted.runs])
    along = np.geomspace(flops.min(), flops.max() * 100, 60)
    best = [fitted.best(budget)["parameters"] for budget in along]
    axes.plot(along, [each.value for each in best], color="#2171b5", label="best size")
    if fitted.others is not None:
        low, high = zip(*(each.interval for each in best if each.interval), strict=True)
        axes.fill_between(along, low, high, color="#9ecae1", alpha=0.6, label="95% interval")
    sizes = [run.num_parameters for run in fitted.runs]
    axes.plot(flops, sizes, "o", color="#d94801", markersize=4, label="runs")
    axes.set(xlabel="FLOPs", ylabel="parameters", title="the size that a budget should take")
