"""What a step asks a GPU for, counted without one: operators, launches, bytes, and how often the host waits.

    python benchmarks/launches.py [--sizes micro tiny small medium base] [--label now]
                                  [--output-dir benchmarks/results]

The training loop itself runs, with Triton's operators, on a stand-in for a GPU (`stand_in_gpu.py`) that has
shapes and no values, for the models of configs/pretrain with 16 rows of 1,024 tokens. The counts go to
`launches.json` under their label, beside those of other labels, and `launches.md` is the table of all. Counts
of the same model under the same label are replaced.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from loop import Data, random_data
from results import RESULTS
from stand_in_gpu import CUDA, StandInGpu, Tally

import lumi.configs
from lumi.command_line import run
from lumi.config import UserError, from_dict
from lumi.host.interruption import Interrupted, StopSignal
from lumi.host.storage import check_output
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.process_group import process_group
from lumi.training.resolved_run import resolve_run
from lumi.training.run_config import Paths, TrainConfig
from lumi.training.run_folder import RunFolder
from lumi.training.trainer import Trainer

CONFIGS = Path(lumi.configs.__path__[0]) / "pretrain"
SIZES = ("micro", "tiny", "small", "medium", "base")
ROWS, LENGTH, NUM_STEPS = 16, 1024, 3
AIMED_AT = "tiny"
ABOUT = """Made by `python benchmarks/launches.py`, without a GPU.

Each model trains on 16 rows of 1,024 tokens at a time. "micro-step" is a further one of a step: what a step
of two has more than a step of one. "step" is a whole step of one micro-step, with the optimizer and the loop.

- operators: calls from Python and from autograd, without views, allocations and copies from the host. One of
  Lumi's counts once; "inside" are those that work within it.
- launches: one for an operator of torch, also where CUDA takes several, as for a sort; of torch's foreach
  kernels one for so many tensors and blocks. Lumi's operators are run, and their launches counted.
- GB: each tensor of a launch is read once or written once. What a kernel reads again is not in it.
- weight bytes: of these, for each parameter of the model, the bytes of what has the shape of its matrices:
  weights, their copies, gradients and states. "casts": what casts of them read and write.
- waits: how often the host waits for a value of the device. "late": copies to the host that it does not wait
  for.
"""
COLUMNS = {
    "micro-step": (
        "operators",
        "lumi's",
        "inside",
        "views",
        "launches",
        "copies",
        "GB",
        "weight bytes",
        "casts",
    ),
    "step": ("operators", "launches", "copies", "GB", "weight bytes", "waits", "late"),
}


class CountedTrainer(Trainer):
    """Keeps the counts at the end of each step in `ends`; it neither validates nor saves."""

    def __init__(self, tally: Tally, *args: Any):
        super().__init__(*args)
        self.ends: list[Tally] = []
        log_step = self.log.step

        def step(*values: Any, **more: Any) -> None:
            log_step(*values, **more)
            self.ends.append(tally.copy())

        self.log.step = step  # type: ignore[method-assign]

    def validate(self) -> None:
        """Nothing: there are no values."""

    save = validate


def count_step(config: dict[str, Any], data: Data, folder: Path) -> Tally:
    """The counts of a step of this run that is neither the first nor the last."""
    batches, model = config["batches"], ModelConfig(**config["model"])
    gpu = StandInGpu(weight_shapes(model), (batches["micro_batch_size"], batches["sequence_length"]))
    paths = Paths([str(data.store)], str(data.tokenizer), folder)
    # New weights are not drawn: they would have no values.
    undrawn = mock.patch.object(Transformer, "initial_weights", return_value=())
    with (
        StopSignal() as stop,
        stop.interrupting(),  # a step that a signal ended would be counted as a whole one
        process_group("cpu", stop=stop) as world,
        gpu.entered(),
        undrawn,
    ):
        world = replace(world, device=CUDA)
        resolved = resolve_run(from_dict(TrainConfig, config), paths, world)
        with redirect_stderr(StringIO()):  # its progress
            trainer = CountedTrainer(gpu.tally, resolved, world, RunFolder(folder))
            with trainer.log.progress(0, config["num_steps"]):
                trainer.train()
    return trainer.ends[1] - trainer.ends[0]


def weight_shapes(model: ModelConfig) -> set[tuple[int, int]]:
    """Of matrices, and of those of one input packed together."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    rows = {q, kv, q + 2 * kv, model.mlp_dim, 2 * model.mlp_dim, model.vocab_size}
    return {(count, model.model_dim) for count in rows} | {
        (model.model_dim, q),
        (model.model_dim, model.mlp_dim),
    }


def run_config(path: Path, micro_steps: int) -> dict[str, Any]:
    """A config of configs/pretrain in a few steps, each of so many micro-batches."""
    config = json.loads(path.read_text(encoding="utf-8"))
    batch_tokens = micro_steps * ROWS * LENGTH
    config["batches"] = {"sequence_length": LENGTH, "micro_batch_size": ROWS, "batch_tokens": batch_tokens}
    config["optimizer"]["schedule"]["warmup_steps"] = 0
    return config | {"num_steps": NUM_STEPS, "kernels": "triton", "preflight": False, "validate_every": 1000}


def count(path: Path, data: Data, folder: Path) -> dict[str, Any]:
    """The counts of a further micro-step and of a whole step of one; what they hold beside is by name."""
    one, two = (count_step(run_config(path, steps), data, folder / str(steps)) for steps in (1, 2))
    num_parameters = ModelConfig(**run_config(path, 1)["model"]).num_parameters
    return {"parameters": num_parameters, "micro-step": vars(two - one), "step": vars(one)}


def count_sizes(sizes: Sequence[str]) -> dict[str, Any]:
    """The counts of each of these models, by name."""
    counts = {}
    with tempfile.TemporaryDirectory() as temporary:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # what preparing says
            data = random_data(Path(temporary), 2 * NUM_STEPS * ROWS * LENGTH)
        for size in sizes:
            counts[size] = count(CONFIGS / f"{size}.json", data, Path(temporary) / size)
            print(f"{size}: counted", flush=True)
    return counts


def cells(counts: dict[str, Any], parameters: int) -> dict[str, str]:
    """A part of a line of the table, by column."""
    return {
        "operators": f"{counts['operators'] - counts['uploads']}",
        "lumi's": f"{counts['custom']}",
        "inside": f"{counts['inner']}",
        **{name: f"{counts[name]}" for name in ("views", "launches", "copies", "waits", "late")},
        "GB": f"{counts['bytes'] / 1e9:.2f}",
        "weight bytes": f"{counts['weight_bytes'] / parameters:.1f}",
        "casts": f"{counts['cast_bytes'] / parameters:.1f}",
    }


def table(records: dict[str, dict[str, Any]]) -> str:
    """Every model under every label, and what is aimed at beside the first label.

    Args:
        records: counts by label and by model.
    """
    lines = []
    for part, columns in COLUMNS.items():
        lines += ["", f"| {part} | counted | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for size in SIZES:
            for label in (label for label in records if size in records[label]):
                counts = records[label][size]
                shown = cells(counts[part], counts["parameters"])
                lines.append(f"| {size} | {label} | {' | '.join(shown[name] for name in columns)} |")
    first, *others = [label for label in records if AIMED_AT in records[label]] or [""]
    for label in others:
        before, now = (records[each][AIMED_AT]["micro-step"] for each in (first, label))
        operators, weights = (now[name] / before[name] for name in ("operators", "weight_bytes"))
        step = records[label][AIMED_AT]["step"]
        lines += [
            "",
            f"{AIMED_AT}, {label} beside {first}: {operators:.0%} of the micro-step's operators (aim: 60%), "
            f"{weights:.0%} of its weight bytes (25%); "
            f"in a step {step['waits']} waits (0) and {step['late']} late copies to the host (1).",
        ]
    return ABOUT + "\n".join(lines) + "\n"


def recorded(path: Path) -> dict[str, Any]:
    """The counts by label and by model that earlier calls wrote. Raises UserError."""
    if not path.exists():
        return {}
    try:
        records: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table(records)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        expectation, remedy = "must be as launches.py writes it", "remove it, or choose another --output-dir"
        raise UserError(str(path), expectation, remedy=remedy) from error
    return records


def main(argv: Sequence[str]) -> int:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--label", default="now", help='such as "now", or "before" a change')
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[^|\s]+", args.label):
        raise UserError("--label", "must be a word without |", got=repr(args.label))
    check_output(args.output_dir, renamed=False)
    path = args.output_dir / "launches.json"
    records = recorded(path)
    if replaced := [size for size in args.sizes if size in records.get(args.label, {})]:
        print(f"{path}: the counts of {' '.join(replaced)} under {args.label} will be replaced", flush=True)
    try:
        records.setdefault(args.label, {}).update(count_sizes(args.sizes))
    except (KeyboardInterrupt, Interrupted) as error:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(records), encoding="utf-8")
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
