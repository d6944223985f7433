"""The jobs of `gpu_first.py` that train: `train.py` on the documentation inside this Python.

    python benchmarks/gpu_first_training.py JOB --output-dir DIR [--rehearse]

"data" makes the token store, "train 16" and "train 128" train on it with so many rows at a time, "losses cpu"
and "losses gpu" do the same few steps on both, and "training" judges. The text differs from one Python to the
next. `gpu_first.py --data DIR` takes the data, and the CPU's losses, of another machine.
`--rehearse` walks the same code on the CPU at tiny sizes, without meaning.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loop import CONFIG, QUICK
from results import Results

from lumi.corpus import DeduplicationConfig, PrepareConfig, prepare
from lumi.corpus.sources import PythonDocsSource
from lumi.data.tokenization import tokenize
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer
from lumi.train import main as train
from lumi.training.metrics import final_figures, read_metrics

MICRO_BATCHES = (16, 128)  # rows of 1,024 tokens
# The losses that are compared: few steps, as a CPU takes seconds for each.
COMPARED = {"sequence_length": 1024, "batch_tokens": 2048, "micro_batch_size": 2}
COMPARED_STEPS, MOST_DIFFERENCE = 20, 0.1  # nats: bfloat16 rounds; a wrong gradient is soon further away


def data(folder: Path, rehearse: bool) -> None:
    """A token store of the documentation inside this Python, and its tokenizer."""
    source = PythonDocsSource(name="python_docs", packages=("topics",) if rehearse else ("topics", "stdlib"))
    config = PrepareConfig(sources=(source,), deduplication=DeduplicationConfig(near=False))
    prepare(config, folder / "corpus", num_workers=1)
    vocabulary = TokenizerConfig(vocab_size=512 if rehearse else 4096)
    tokenizer = train_tokenizer(vocabulary, [folder / "corpus"], folder / "tokenizer")
    tokenize([folder / "corpus"], tokenizer, folder / "tokens", validation_fraction=0.03)


def training_config(job: str, rehearse: bool) -> dict[str, Any]:
    """`configs/pretrain/tiny.json`: 200 steps with so many rows at a time, as "train 16" says, or the few
    steps whose losses are compared."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    if job.startswith("train "):
        config["batches"] |= {"micro_batch_size": int(job.split()[1]), "batch_tokens": 131_072}
        num_steps = 200
    else:
        config["batches"], num_steps = COMPARED, COMPARED_STEPS
        config["dtype"] = "float32" if job.endswith("cpu") else "bfloat16"
    if rehearse:
        num_steps = 4
        for part, values in QUICK.items():
            config[part] = config[part] | values
    config["optimizer"]["schedule"]["warmup_steps"] = num_steps // 10
    once = {"num_steps": num_steps, "save_every": num_steps, "validate_every": num_steps, "preflight": False}
    return config | once | {"validation_tokens": 20_000}


def run_training(job: str, folder: Path, rehearse: bool) -> int:
    """The command line of a training on the stored text; the CPU trains where the job's name or a rehearsal
    says so."""
    config = training_config(job, rehearse)
    run = folder / job.replace(" ", "_")
    run.with_suffix(".json").write_text(json.dumps(config), encoding="utf-8")
    device = "cpu" if rehearse or job.endswith("cpu") else "cuda"
    paths = {"config": run.with_suffix(".json"), "data-dirs": folder / "data" / "tokens"}
    paths |= {"tokenizer-dir": folder / "data" / "tokenizer", "output-dir": run}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return train([*options, "--device", device])


def judge_training(results: Results) -> None:
    """The figures of the trainings, and the GPU's losses beside the CPU's."""
    folder = results.path.parent
    for rows in MICRO_BATCHES:
        with results.case(f"train {rows}"):
            found = final_figures(read_metrics(folder / f"train_{rows}" / "metrics.jsonl"))
            for name in ("tokens_per_second", "mfu", "loss"):
                results.claim(f"train.py, tiny, {rows} rows at a time: {name}", found.get(name))
    with results.case("losses"):
        ours, cpu = (_losses(folder / f"losses_{device}") for device in ("gpu", "cpu"))
        results.note(losses={"gpu": ours, "cpu": cpu})
        apart = max(abs(a - b) for a, b in zip(ours, cpu, strict=True))
        text = "losses of train.py in bfloat16, most that one is apart from the CPU's in float32, nats"
        results.claim(text, apart, at_most=MOST_DIFFERENCE)


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]


def main(argv: Sequence[str]) -> int:
    """One job. Exit code 1 where it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trainings = [*(f"train {rows}" for rows in MICRO_BATCHES), "losses cpu", "losses gpu"]
    parser.add_argument("job", choices=["data", *trainings, "training"])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    if args.job == "data":
        data(args.output_dir / "data", args.rehearse)
        return 0
    if args.job in trainings:
        return run_training(args.job, args.output_dir, args.rehearse)
    results = Results("training", torch.device("cpu" if args.rehearse else "cuda:0"), args.output_dir)
    judge_training(results)
    results.finish()
    return 1 if results.data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
