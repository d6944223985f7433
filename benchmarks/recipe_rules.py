"""Bowls of learning rates: the best rate of each beside that of the rule, and their picture.

    python benchmarks/recipe_rules.py

reads `results/recipe-rates.json`. In each bowl a parabola in the logarithm of the rate goes through the
lowest point and its neighbours. Its minimum is the best rate. The rule is that of `lumi.planning.recipe`.
"""

import json
import math
from typing import Any

import numpy as np
from recipe_tables import RATE, ROOT
from results import RESULTS

from lumi.planning.recipe import best_rate

PICTURE = ROOT / "docs" / "results_rates.png"
NAMES = ("parameters", "tokens", "batch_tokens")


def bowls(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each contender: its name, size, tokens, batch, its rates and losses, the best rate, the rule's.

    The best one is None where the lowest point is the first or the last one: then the bowl has no bottom.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        bowl = found.setdefault(
            row["contender"], {"name": row["contender"], **{name: row[name] for name in NAMES}, "points": []}
        )
        bowl["points"].append((row["values"][RATE], row["bits_per_byte"][0]))
    for bowl in found.values():
        bowl["points"].sort()
        bowl["best"] = bottom(bowl["points"])
        bowl["rule"] = best_rate(bowl["parameters"], bowl["batch_tokens"])
    return list(found.values())


def bottom(points: list[tuple[float, float]]) -> float | None:
    """The rate at the minimum of the parabola through the lowest point and its neighbours."""
    lowest = min(range(len(points)), key=lambda index: points[index][1])
    if lowest in (0, len(points) - 1):
        return None
    rates, losses = zip(*points[lowest - 1 : lowest + 2], strict=True)
    square, slope, _ = np.polyfit(np.log(rates), losses, 2)
    return math.exp(-slope / (2 * square))


def draw(found: list[dict[str, Any]]) -> None:
    """All bowls of at least three rates: how far each point lies above the lowest one of its bowl."""
    import matplotlib.figure  # here: it takes longer to import than everything else

    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for bowl in (each for each in found if len(each["points"]) > 2):
        rates, losses = zip(*bowl["points"], strict=True)
        lowest = min(losses)
        axes.plot(rates, [loss / lowest - 1 for loss in losses], "o-", label=bowl["name"])
    axes.set(xlabel="peak learning rate", ylabel="bits per byte above the best of the bowl", xscale="log")
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(PICTURE)


def main() -> None:
    """Print the bowls, and draw the picture."""
    found = bowls(json.loads((RESULTS / "recipe-rates.json").read_text()))
    for bowl in found:
        best = "at an end" if bowl["best"] is None else f"{bowl['best']:.4g}"
        print(f"{bowl['name']:<50} best rate {best}, the rule's {bowl['rule']:.4g}")
    draw(found)


if __name__ == "__main__":
    main()
