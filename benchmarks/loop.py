"""What the training loop costs beside forward, backward and optimizer, and what saving costs it: on the tiny
model, with random data.

    python benchmarks/loop.py [--threads 1] [--num-steps 40] [--num-saves 10] [--batch-tokens 4096] [--quick]

A run of `Trainer` whose parts are timed from outside. A step lasts from the end of the step before it to its
own; the first ones are left out. Then another run, with AdamW (three tensors for each weight), that saves
every few steps, in turn as training does it and with the loop waiting for the end of it. On a GPU the device
is waited for around every part, so that what is found outside is at most too much. The folder is a temporary
one: TMPDIR says on which disk. `--quick` walks through all of it in seconds, without meaning.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from results import RESULTS, Results

from lumi.config import from_dict
from lumi.corpus import DeduplicationConfig, JsonlSource, PrepareConfig, prepare
from lumi.data.store_manifest import Counts
from lumi.data.store_writer import StoreWriter
from lumi.host.devices import choose_device
from lumi.host.interruption import StopSignal
from lumi.parallel.process_group import process_group
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer
from lumi.training.pending_outcome import PendingOutcome
from lumi.training.resolved_run import resolve_run
from lumi.training.run_config import Paths, TrainConfig
from lumi.training.run_folder import RunFolder
from lumi.training.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "tiny.json"
QUICK = {
    "model": {"vocab_size": 512, "num_layers": 1, "model_dim": 32, "num_heads": 2, "mlp_dim": 64},
    "batches": {"sequence_length": 32, "batch_tokens": 128, "micro_batch_size": 2},
}
WARM_UP = 3  # steps; of saves, the first of each kind
SAVE_EVERY = 5  # steps: some beside the writing, and some after it
WORK = ("forward, backward", "optimizer")  # of the parts of a step


class Data(NamedTuple):
    """Folders of a token store and of its tokenizer."""

    store: Path
    tokenizer: Path


def random_data(folder: Path, num_tokens: int) -> Data:
    """A tokenizer of 512 pieces, trained on Python's language reference, and a store of random ones in
    documents of some 600 tokens."""
    records = folder / "records.jsonl"
    records.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in topics.values()), encoding="utf-8"
    )
    source = JsonlSource(name="topics", paths=(str(records),))
    prepare(
        PrepareConfig(sources=(source,), deduplication=DeduplicationConfig(near=False)),
        folder / "corpus",
        num_workers=1,
    )
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=512), [folder / "corpus"], folder / "tokenizer")
    rng = np.random.default_rng(0)
    lengths = 1 + rng.lognormal(6.0, 1.0, num_tokens // 500).astype(np.int64)
    lengths = lengths[lengths.cumsum() <= num_tokens]
    tokens = rng.integers(0, tokenizer.vocab_size, int(lengths.sum()))
    (folder / "store").mkdir()
    writer = StoreWriter(
        folder / "store", tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
    )
    counts = Counts(documents=len(lengths), tokens=len(tokens), bytes=2 * len(tokens))
    writer.append("train", tokens, lengths, {"random": counts})
    writer.finish({})
    return Data(folder / "store", folder / "tokenizer")


def run_config(quick: bool, num_steps: int, **changes: dict[str, Any]) -> dict[str, Any]:
    """`configs/pretrain/tiny.json` with fewer steps, without a warm-up and nothing beside them, and changes
    to its parts; `quick`: of a much smaller model."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config["optimizer"]["schedule"]["warmup_steps"] = 0
    for part in (changes, QUICK if quick else {}):
        for key, value in part.items():
            config[key] = config.get(key, {}) | value
    return config | {"num_steps": num_steps, "save_every": num_steps, "preflight": False}


@dataclass(frozen=True)
class Step:
    """A step of the loop: when it began, seconds of it, and of its parts: `WORK`, "save", and others."""

    start: float
    seconds: float
    parts: dict[str, float]

    @property
    def outside(self) -> float:
        """Seconds that are not forward, backward or optimizer."""
        return self.seconds - sum(self.parts[part] for part in WORK)

    @property
    def unsaved(self) -> float:
        """Seconds before the step's save, if it has one: it comes last."""
        return self.seconds - self.parts.get("save", 0.0)


@dataclass(frozen=True)
class Save:
    """A save: after which step (counted from 0), whether the loop waited for its end, how long it was
    stalled, when it was written, and what a core had to do for that.
    """

    step: int
    waited: bool
    stall: float
    begin: float
    end: float
    cpu_seconds: float


class TimedTrainer(Trainer):
    """Keeps `steps` and `saves`. Waits for every second save where `waiting` is True."""

    def __init__(self, *args: Any, waiting: bool = False):
        super().__init__(*args)
        self.waiting = waiting
        self.steps: list[Step] = []
        self.stalls: list[tuple[int, bool, float]] = []
        self.written: list[tuple[float, float, float]] = []
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.step_start = time.perf_counter()
        parts = [
            (self, "forward_backward", WORK[0]),
            (self, "agree", "agreement"),
            (self.log, "step", "log"),
            (self, "save", "save"),
        ]
        parts += [(self.optimizer, name, WORK[1]) for name in ("measure_gradients", "step", "zero_grad")]
        for owner, name, part in parts:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        self._read, self.log.meter.read = self.log.meter.read, self._note_waiting
        saver = self.checkpoints.saver
        self._write, saver._save = saver._save, self._note_writing

    @property
    def saves(self) -> list[Save]:
        """The saves so far, which must have ended."""
        return [Save(*stalled, *written) for stalled, written in zip(self.stalls, self.written, strict=True)]

    def end_step(self, pending: PendingOutcome) -> None:
        super().end_step(pending)
        now = time.perf_counter()
        self.steps.append(Step(self.step_start, now - self.step_start, dict(self.parts)))
        if seconds := self.parts.get("save"):
            self.stalls.append((len(self.steps) - 1, self._waits(), seconds))
        self.parts.clear()
        self.step_start = time.perf_counter()

    def save(self) -> None:
        super().save()
        if self._waits():
            self.checkpoints.finish()

    def _waits(self) -> bool:
        return self.waiting and len(self.stalls) % 2 == 1

    def _timed(self, function: Callable, part: str) -> Callable:
        def timed(*args: Any, **options: Any) -> Any:
            start = self._now()
            result = function(*args, **options)
            self.parts[part] += self._now() - start
            return result

        return timed

    def _now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _note_waiting(self) -> tuple[float, float, float]:
        seconds, waited, rate = self._read()
        self.parts["data wait"] += waited
        return seconds, waited, rate

    def _note_writing(self, *args: Any) -> None:
        begin, used = time.perf_counter(), time.thread_time()
        self._write(*args)
        self.written.append((begin, time.perf_counter(), time.thread_time() - used))


def timed_run(
    config: dict[str, Any], data: Data, folder: Path, device: str, waiting: bool = False
) -> TimedTrainer:
    """Train from start to end in this process."""
    paths = Paths([str(data.store)], str(data.tokenizer), folder)
    with (
        StopSignal() as stop,
        process_group(device, stop=stop) as world,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run = resolve_run(from_dict(TrainConfig, config), paths, world)
        trainer = TimedTrainer(run, world, RunFolder(folder), waiting=waiting)
        trainer.run_to_the_end()
    return trainer


def shares(steps: Sequence[Step]) -> dict[str, float]:
    """The share of the steps' time that is outside of `WORK`, and that of every part."""
    total = sum(step.seconds for step in steps)
    parts = {part: sum(step.parts.get(part, 0.0) for step in steps) / total for part in steps[0].parts}
    return {"outside": sum(step.outside for step in steps) / total} | parts


class SaveCost(NamedTuple):
    """Medians over saves, in seconds: a save that the loop waits for; of others the stall, what the steps
    beside the writing take longer than those without, the writing, and the core's work for it. Of the steps
    without: half of the range that half of them lie in.
    """

    synchronous: float
    stall: float
    slowdown: float
    writing: float
    writing_cpu: float
    noise: float


def save_cost(steps: Sequence[Step], saves: Sequence[Save]) -> SaveCost:
    """What saves cost the loop. A step belongs to the save whose writing it meets, in whole or in part,
    before a save of its own.

    Raises:
        ValueError: there is no save of one kind, or no step without one.
    """
    meets = lambda step, save: step.start < save.end and save.begin < step.start + step.unsaved
    low, alone, high = quantiles(
        (step.unsaved for step in steps if not any(meets(step, save) for save in saves)), method="inclusive"
    )
    beside = [save for save in saves if not save.waited]
    slowdowns = [sum(step.unsaved - alone for step in steps if meets(step, save)) for save in beside]
    return SaveCost(
        synchronous=median(save.stall for save in saves if save.waited),
        stall=median(save.stall for save in beside),
        slowdown=median(slowdowns),
        writing=median(save.end - save.begin for save in beside),
        writing_cpu=median(save.cpu_seconds for save in beside),
        noise=(high - low) / 2,
    )


def measure_loop(results: Results, config: dict[str, Any], data: Data, folder: Path) -> None:
    """The loop outside of forward, backward and optimizer, and its waiting for data."""
    steps = timed_run(config, data, folder, results.device.type).steps[WARM_UP:-1]  # the last one saves
    found, seconds = shares(steps), median(step.seconds for step in steps)
    results.note(
        loop={"steps": len(steps), "step_seconds": round(seconds, 4)}
        | {part: round(share, 6) for part, share in found.items()}
    )
    print(
        f"{len(steps)} steps of {config['batches']['batch_tokens']:,} tokens, "
        f"{seconds * 1e3:,.1f} ms each at the median"
    )
    for part, share in found.items():
        typical = median(step.outside if part == "outside" else step.parts.get(part, 0.0) for step in steps)
        print(f"  {part:<18} {share:8.3%} of all, {typical * 1e3:10.3f} ms a step at the median")
    results.claim(
        "loop outside of forward, backward and optimizer, share of the step", found["outside"], at_most=0.02
    )
    results.claim(
        "loop outside of them, median of the steps",
        median(step.outside / step.seconds for step in steps),
        at_most=0.02,
    )
    results.claim("waiting for data, share of the step", found["data wait"], at_most=0.005)


def measure_saves(results: Results, config: dict[str, Any], data: Data, folder: Path) -> None:
    """The stall of a save against one that the loop waits for, and what the steps beside its writing lose."""
    run = timed_run(config | {"save_every": SAVE_EVERY}, data, folder, results.device.type, waiting=True)
    saves, first = run.saves[2:-1], run.saves[0].stall  # beside the last one there are no steps
    num_bytes = sum(file.stat().st_size for file in run.folder.checkpoint(len(run.steps)).iterdir())
    cost = save_cost(run.steps[2 * SAVE_EVERY :], saves)
    results.note(
        save={
            "bytes": num_bytes,
            "first_stall": first,
            **cost._asdict(),
            "saves": [vars(save) for save in saves],
        }
    )
    print(
        f"{len(saves)} saves of {num_bytes / 1e6:,.0f} MB; waited for: {cost.synchronous:.3f} s; "
        f"not: stall {cost.stall:.4f} s"
    )
    print(
        f"  (the first {first:.4f}), {cost.writing:.3f} s written by a thread, "
        f"which kept a core busy for {cost.writing_cpu:.3f} s;"
    )
    print(
        f"  {cost.slowdown:.3f} s lost by the steps beside it, where steps alone differ by {cost.noise:.3f} s"
    )
    results.claim("stall of a save, share of one that the loop waits for", cost.stall / cost.synchronous)
    busy = (cost.stall + cost.writing_cpu) / cost.synchronous
    results.claim(
        "stall and the writing's time on a core (for a machine without one to spare), share of the same",
        busy,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--num-steps", type=int, default=40, help="of the first run")
    parser.add_argument(
        "--num-saves", type=int, default=10, help="of the second; half of them are waited for"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="of a step, in micro-batches of 2 rows of 1,024 tokens"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a model of a few thousand weights")
    args = parser.parse_args(argv)
    for name, least in (("num_steps", WARM_UP + 2), ("num_saves", 5), ("batch_tokens", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 1 where a case failed."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    results = Results("loop", torch.device(choose_device(args.device)), args.output_dir)
    batches = {"batch_tokens": args.batch_tokens, "micro_batch_size": 2}
    config = run_config(args.quick, args.num_steps, batches=batches)
    optimizer = {"kind": "adamw", "peak_lr": 1e-3, "muon_beta2": None}
    saving = run_config(args.quick, args.num_saves * SAVE_EVERY, batches=batches, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as temporary:
        data = random_data(Path(temporary), args.num_steps * args.batch_tokens)
        with results.case("loop"):
            measure_loop(results, config, data, Path(temporary) / "loop")
        with results.case("save"):
            measure_saves(results, saving, data, Path(temporary) / "save")
    results.finish()
    print(f"wrote {results.path}")
    return 1 if results.data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
