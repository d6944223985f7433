"""Sweeps of the recipe -> `benchmarks/results/recipe-NAME.json` and the tables of `docs/results.md`.

    python benchmarks/recipe_tables.py runs/recipe/changes

takes in the finished sweep of `recipe/changes.json`. Without folders it writes the tables alone, from what
`results` holds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, device_name

from lumi.config import load_config, write_json, write_text
from lumi.sweeps.results import standard_error
from lumi.sweeps.settings import text_of
from lumi.training.run_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RATE = "optimizer.peak_lr"
HEAD = "| recipe | rate | parameters | tokens | bits per byte, a seed each | mean | against the first |"


def take_in(sweep: Path, commit: str) -> dict[str, Any]:
    """What a finished sweep found: for each setting its values, size, tokens, and bits per byte by seed."""
    call, rows = (json.loads((sweep / name).read_text()) for name in ("sweep.json", "results.json"))
    if open_rows := [row["setting"] for row in rows if row["state"] != "finished"]:
        sys.exit(f"error: {sweep} must be a finished sweep, got {len(open_rows)} settings without a result")
    (data_dir,) = call["data_dirs"]
    return {
        "sweep": sweep.name,
        "machine": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": commit,
        "corpus": json.loads((Path(data_dir) / "manifest.json").read_text())["inputs"]["corpus 0"],
        "rows": [_row(sweep, row) for row in sorted(rows, key=lambda row: row["trials"][0]["folder"])],
    }


def _row(sweep: Path, row: dict[str, Any]) -> dict[str, Any]:
    overrides = [f"{key}={text_of(value)}" for key, value in row["values"].items()]
    config = load_config(TrainConfig, sweep / "base.json", overrides)
    assert config.model is not None
    return {
        "contender": row["contender"],
        "values": row["values"],
        "parameters": config.model.num_parameters,
        "batch_tokens": config.batches.batch_tokens,
        "tokens": row["trials"][0]["tokens"],
        "bits_per_byte": [trial["bits_per_byte"] for trial in row["trials"]],
        "seconds": round(statistics.fmean(trial["seconds"] for trial in row["trials"]), 1),
    }


def table(result: dict[str, Any], first: Sequence[str] = ()) -> str:
    """The table of a sweep: the best setting of each contender, with all its seeds.

    Args:
        first: contenders in the order of their rows; those that it does not name follow.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(result["rows"], key=lambda row: [*first, row["contender"]].index(row["contender"])):
        held = best.get(row["contender"])
        if held is None or _rank(row) < _rank(held):
            best[row["contender"]] = row
    reference = next(iter(best.values()))["bits_per_byte"]
    lines = [HEAD, "| --- " * 7 + "|"]
    for name, row in best.items():
        bits = row["bits_per_byte"]
        rates = [each["values"][RATE] for each in result["rows"] if each["contender"] == name]
        shares = [100 * (ours / theirs - 1) for ours, theirs in zip(bits, reference, strict=True)]
        cells = [
            name,
            f"{row['values'][RATE]:g} of {', '.join(f'{rate:g}' for rate in sorted(rates))}",
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            ", ".join(f"{value:.3f}" for value in bits),
            _mean(bits, ".4f"),
            "" if bits is reference else f"{_mean(shares, '.1f', '+')} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    about = ", ".join(f"{name} {result[name]}" for name in ("torch", "commit"))
    about = f"{result['machine']}, {about}, corpus {result['corpus'][:12]}"
    return "\n".join([*lines, "", f"`benchmarks/recipe/{result['sweep']}.json`; {about}."])


def _mean(values: Sequence[float], digits: str, sign: str = "") -> str:
    error = standard_error(values)
    return f"{statistics.fmean(values):{sign}{digits}}" + ("" if error is None else f" ± {error:{digits}}")


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    return -len(row["bits_per_byte"]), statistics.fmean(row["bits_per_byte"])


def page_with(text: str, tables: dict[str, str]) -> str:
    """The page, with the tables between their marks."""
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            sys.exit(f"error: {PAGE} must have the marks of {name}: {begin.strip()} and {end}")
        text = f"{before}{begin}\n{content}\n\n{end}{after}"
    return text


def stored_tables() -> dict[str, str]:
    """The table of each sweep in `results`, by its name."""
    tables = {}
    for path in sorted(RESULTS.glob("recipe-*.json")):
        result = json.loads(path.read_text())
        sweep = json.loads((ROOT / "benchmarks" / "recipe" / f"{result['sweep']}.json").read_text())
        tables[result["sweep"]] = table(result, list(sweep["search"]["grids"]))
    return tables


def main() -> None:
    """Take the folders in, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", nargs="*", type=Path, help="folders of finished sweeps")
    parser.add_argument("--commit", help="that they ran on; this tree's by default")
    args = parser.parse_args()
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = args.commit or subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    for sweep in args.sweeps:
        write_json(RESULTS / f"recipe-{sweep.name}.json", take_in(sweep, commit))
    write_text(PAGE, page_with(PAGE.read_text(encoding="utf-8"), stored_tables()))


if __name__ == "__main__":
    main()
