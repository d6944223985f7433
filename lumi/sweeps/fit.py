"""`lumi fit`: finished runs -> the law of their losses, and the size that a budget of FLOPs should take."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumi.config import UserError, write_json
from lumi.host.storage import check_output, make_folder
from lumi.sweeps.fit_picture import draw_fit
from lumi.sweeps.fitted_law import Fit, make_fit
from lumi.sweeps.law_runs import best_of_each, find_runs
from lumi.training.metrics import human

BUDGETS = (1.0, 10.0, 100.0)  # without --flops: times the largest run


def fit(paths: Sequence[Path], output_dir: Path, flops: Sequence[float] = ()) -> int:
    """Fit the law to finished runs, print it, and write `fit.json` and `fit.png`.

    Args:
        paths: run folders, and folders of sweeps, whose unfinished trials are left out.
        flops: budgets; none: multiples of the largest run.

    Returns:
        The exit code.

    Raises:
        UserError: the runs are too few or too much alike, or one of them cannot be used.
    """
    for budget in flops:
        if not 0 < budget < float("inf"):
            raise UserError("--flops", "must be above 0", got=budget)
    check_output(output_dir, renamed=False)
    found, num_unfinished = find_runs(paths)
    runs = best_of_each(found)
    fitted = make_fit(runs)
    budgets = list(flops) or [times * max(run.flops for run in runs) for times in BUDGETS]
    print("\n".join(describe(fitted, len(found), num_unfinished, budgets)))
    make_folder(output_dir)
    write_json(output_dir / "fit.json", to_json(fitted, budgets))
    draw_fit(fitted, output_dir / "fit.png")
    print(f"wrote {output_dir}/fit.json and fit.png")
    return 0


def describe(fitted: Fit, num_found: int, num_unfinished: int, budgets: Sequence[float]) -> Iterator[str]:
    """The fit for people."""
    runs = fitted.runs
    yield f"loss = E + A / N^a + B / D^b, fitted to {len(runs)} runs"
    yield "N: all parameters, D: tokens of training, loss: held-out bits per byte"
    if num_unfinished:
        yield f"{num_unfinished} trials of sweeps are left out: they are not finished"
    if num_found > len(runs):
        left = num_found - len(runs)
        yield f"{left} runs are left out: another setting of the same size and tokens is better"
    for name, estimate in fitted.numbers().items():
        yield f"  {name}  {estimate.describe()}"
    yield f"a budget of C FLOPs is {fitted.flops_per_product:.3g} N D, as these runs took it"
    largest = max(run.flops for run in runs)
    for budget in budgets:
        best = fitted.best(budget)
        note = f" ({budget / largest:.3g} times the largest run)" if budget > 1.01 * largest else ""
        yield f"  {budget:.3g} FLOPs{note}"
        yield f"    parameters     {best['parameters'].describe(human)}"
        yield f"    tokens         {best['tokens'].describe(human)}"
        yield f"    bits per byte  {best['bits_per_byte'].describe()}"


def to_json(fitted: Fit, budgets: Sequence[float]) -> dict[str, Any]:
    """The fit as JSON values."""
    return {
        "law": "bits_per_byte = E + A / N**a + B / D**b; N: all parameters, D: tokens of training",
        "numbers": {name: estimate._asdict() for name, estimate in fitted.numbers().items()},
        "flops_per_parameter_and_token": fitted.flops_per_product,
        "budgets": [
            {"flops": budget} | {name: each._asdict() for name, each in fitted.best(budget).items()}
            for budget in budgets
        ],
        "runs": [
            {
                "path": str(run.path),
                "parameters": run.num_parameters,
                "tokens": run.tokens,
                "flops": run.flops,
                "bits_per_byte": run.bits_per_byte,
                "fitted_bits_per_byte": float(fitted.law.loss(run.num_parameters, run.tokens)),
            }
            for run in fitted.runs
        ],
    }
