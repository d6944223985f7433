"""The jobs of `gpu_first.py` that measure: benchmarks with few rounds and without peers, and a profile.

    python benchmarks/gpu_first_figures.py JOB --output-dir DIR [--rehearse]

`--rehearse` walks the same code on the CPU at tiny sizes, without meaning.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import linear_cross_entropy
import measure
import optimizer
import row_kernels
import torch
import training_step
from results import Results

from lumi.host.devices import choose_device
from lumi.kernels.bundle import REFERENCE, TRITON
from lumi.model.transformer import ModelConfig, Transformer

TINY = ModelConfig(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, mlp_dim=64)
REHEARSED: dict[str, tuple[Any, ...]] = {  # arguments of each benchmark's `run`
    "optimizer": ({"tiny": TINY},),
    "linear_cross_entropy": ([(9, 16, 97)], torch.float16, 64),
    "row_kernels": (
        {"swiglu": replace(row_kernels.OPERATORS["swiglu"], large=[(5, 64)], small=[(5, 64)])},
        torch.float16,
    ),
}
FIGURES = {"optimizer": optimizer, "linear_cross_entropy": linear_cross_entropy, "row_kernels": row_kernels}


def figures(job: str, results: Results, rehearse: bool) -> None:
    """A benchmark with few rounds."""
    FIGURES[job].run(results, *(REHEARSED[job] if rehearse else ()))


def steps(results: Results, rehearse: bool) -> None:
    """The training step without its peers, captured and launched from Python."""
    cases = {name: replace(case, peers=()) for name, case in training_step.CASES.items()}
    if rehearse:
        cases = {"23M": training_step.Case(TINY, 3, 16, ())}
    training_step.run(results, cases, _ops(results), rounds=3)


def profile(results: Results, rehearse: bool) -> None:
    """Where the time of five steps goes, launched from Python: `profile.txt`."""
    case = training_step.Case(TINY, 3, 16, ()) if rehearse else training_step.CASES["23M"]
    device = results.device
    shape = (case.batch, case.length)
    tokens, targets = (torch.randint(0, case.config.vocab_size, shape, device=device) for _ in range(2))
    model = Transformer(case.config, _ops(results), compute_dtype=torch.bfloat16).init_weights(0).to(device)
    step = training_step.lumi_step(model, tokens, targets)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step()
        step().item()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    text = profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60)
    (results.path.parent / "profile.txt").write_text(text, encoding="utf-8")
    print(text)


def _ops(results: Results) -> Any:
    return TRITON if results.device.type == "cuda" else REFERENCE


def main(argv: Sequence[str]) -> int:
    """One job. Exit code 1 where it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = {"training_step": steps, "profile": profile}
    parser.add_argument("job", choices=[*own, *FIGURES])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(choose_device("cpu" if args.rehearse else "cuda"))
    device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    results = Results(args.job, device, args.output_dir, rounds=1 if args.rehearse else 5)
    with measure.ready(device), results.case(args.job):
        if args.job in own:
            own[args.job](results, args.rehearse)
        else:
            figures(args.job, results, args.rehearse)
    results.finish()
    return 1 if results.data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
