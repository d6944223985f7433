"""How fast two processes train beside one: DDP, FSDP2 and tensor parallelism, on a tiny model and random
data.

    python benchmarks/scaling.py [--num-steps 8] [--rounds 3] [--only apart "DDP, weak"] [--quick]

Every figure is of runs of `lumi/train.py` as users start it, each process with one thread, by their
`metrics.jsonl`: the median of the steps after the first ones, and of the rounds, in which the cases take
turns. Strong scaling: the same tokens a step, of which each process has half; weak: the same tokens for each
process, so twice as many a step. "apart" is two runs of one process at the same time, which know nothing of
each other: what the machine itself gives (shared caches, memory, clocks, and whatever else runs on it).

On one machine gloo sends through its memory. That shows what Lumi and torch add to a step, and says nothing
about networks or NCCL. `--quick` walks through all of it in less than a minute, without meaning.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from loop import Data, random_data, run_config
from results import RESULTS, Results

import lumi.train
from lumi.training.metrics import read_metrics

WARM_UP = 2  # steps
ROWS = 4  # of one process in a step


class Case(NamedTuple):
    """`runs` at the same time, each of so many processes, which share the work as `parallel` says, with so
    many rows a step."""

    runs: int
    processes: int
    parallel: dict[str, int]
    rows: int


ONE = Case(1, 1, {}, ROWS)
CASES = {
    "apart": Case(2, 1, {}, ROWS),
    "DDP, strong": Case(1, 2, {"replicate": 2}, ROWS),
    "DDP, weak": Case(1, 2, {"replicate": 2}, 2 * ROWS),
    "FSDP2, strong": Case(1, 2, {"shard": 2}, ROWS),
    "FSDP2, weak": Case(1, 2, {"shard": 2}, 2 * ROWS),
    "TP, strong": Case(1, 2, {"tensor": 2}, ROWS),  # its processes read the same rows: there is no weak
}


def tokens_per_second(case: Case, config: dict[str, Any], data: Data, folder: Path) -> float:
    """Of all runs of a case together.

    Raises:
        RuntimeError: a run failed; with the end of what it said.
    """
    batch_tokens = case.rows * config["batches"]["sequence_length"]
    config = config | {
        "parallel": case.parallel,
        "batches": config["batches"] | {"batch_tokens": batch_tokens},
    }
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
        if case.processes > 1
        else []
    )
    program = [sys.executable, *torchrun, str(lumi.train.__file__), "--config", str(file), "--device", "cpu"]
    paths = ["--data-dirs", str(data.store), "--tokenizer-dir", str(data.tokenizer), "--output-dir"]
    outputs = [folder / f"run-{index}" for index in range(case.runs)]
    with contextlib.ExitStack() as started:
        running = [
            started.enter_context(_started([*program, *paths, str(output)], output.with_suffix(".err")))
            for output in outputs
        ]
        for process, output in zip(running, outputs, strict=True):
            if process.wait():
                errors = output.with_suffix(".err").read_text(encoding="utf-8")
                raise RuntimeError(
                    f"{' '.join(process.args)}: exit code {process.returncode}: {errors[-3000:]}"
                )
    return sum(batch_tokens / step_seconds(output / "metrics.jsonl") for output in outputs)


@contextlib.contextmanager
def _started(command: Sequence[str], errors: Path) -> Iterator[subprocess.Popen]:
    """A run, with one thread to a process; where the block is left before it has ended it is told to stop."""
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=file
        )
    try:
        yield process
    finally:
        process.terminate()  # torchrun hands it on
        process.wait()


def step_seconds(metrics: Path) -> float:
    """The median of a run's steps after the first ones."""
    return median(
        record["step_seconds"]
        for record in read_metrics(metrics)
        if record["kind"] == "train" and record["step"] > WARM_UP
    )


def measure(
    results: Results, names: Sequence[str], config: dict[str, Any], data: Data, folder: Path, rounds: int
) -> None:
    """Every case in turn, round by round."""
    cases = {"one process": ONE} | {name: case for name, case in CASES.items() if name in names}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds):
        for number, (name, case) in enumerate(cases.items()):
            rates[name].append(tokens_per_second(case, config, data, folder / f"{index}-{number}"))
            print(
                f"round {index + 1}: {name:<14} {rates[name][-1]:10,.1f} tokens/s, "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    results.note(
        tokens_per_second={name: [round(rate, 1) for rate in values] for name, values in rates.items()}
    )
    one, apart = (median(rates[name]) if name in rates else None for name in ("one process", "apart"))
    for name, values in rates.items():
        if name != "one process":
            results.claim(
                f"{name}: tokens a second over twice those of one process", median(values) / (2 * one)
            )
        if apart and name not in ("one process", "apart"):
            results.claim(
                f"{name}: tokens a second over those of two processes apart", median(values) / apart
            )


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 1 where a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a model of a few thousand weights")
    args = parser.parse_args(argv)
    results = Results("scaling", torch.device("cpu"), args.output_dir)
    config = run_config(args.quick, args.num_steps, batches={"micro_batch_size": ROWS // 2})
    with tempfile.TemporaryDirectory() as temporary:
        data = random_data(Path(temporary), 2 * ROWS * args.num_steps * config["batches"]["sequence_length"])
        with results.case("scaling"):
            measure(results, args.only, config, data, Path(temporary), args.rounds)
    results.finish()
    print(f"wrote {results.path}")
    return 1 if results.data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
