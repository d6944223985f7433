"""Fit the demo's trainings into a given time on a CPU: measure whole steps; choose model, dtype and steps."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import lumi.configs
from lumi.config import load_config
from lumi.host.devices import fast_bfloat16
from lumi.kernels.bundle import select
from lumi.model.lora import add_lora
from lumi.model.transformer import Transformer
from lumi.training.optimizer import Optimizer
from lumi.training.run_config import TrainConfig

CONFIGS = Path(lumi.configs.__file__).parent / "demo"

# The pre-trainings, the better one first, and the least share of its steps that is worth its time (measured).
# Below it the smaller model is better in the same time, and the smallest no longer beats xz clearly.
LEAST_SHARES = {"pretrain": 0.85, "pretrain_small": 0.25}
LONGEST_SECONDS = 600.0  # what the least training may take where the minutes are too few for it
MARGIN = 0.9  # of the time left is planned: a step on real text differs from the rehearsed one
OTHER_SECONDS = 12.0  # to start and save trainings, merge, answer and compress

Dtype = Literal["float32", "bfloat16", "float16"]


class Pace(NamedTuple):
    """What this machine does: a pre-training by its config's name, the dtype, and the share of all steps."""

    name: str
    dtype: Dtype
    share: float

    def config(self, name: str) -> TrainConfig:
        """A shipped training at this pace. One that is cut warms up for the same share of its steps, and
        validates and saves at its end only."""
        config = replace(load_config(TrainConfig, shipped(name)), dtype=self.dtype, preflight=False)
        if self.share == 1.0:
            return config
        steps = max(1, round(config.num_steps * self.share))
        warmup_steps = config.optimizer.schedule.warmup_steps * steps // config.num_steps
        schedule = replace(config.optimizer.schedule, warmup_steps=warmup_steps)
        optimizer = replace(config.optimizer, schedule=schedule)
        return replace(config, num_steps=steps, optimizer=optimizer, validate_every=steps, save_every=steps)


FULL = Pace("pretrain", "bfloat16", 1.0)


class Rehearsal(NamedTuple):
    """Seconds of one step of pre-training and of fine-tuning, and the number of tokens held out of each."""

    pretrain: float
    finetune: float
    text_tokens: int
    answer_tokens: int

    def stages(self, pace: Pace) -> dict[str, float]:
        """Seconds of each stage from pre-training on.

        A pass over held-out tokens costs a third of a step on as many tokens.
        """
        text, answers = pace.config(pace.name), pace.config("finetune")
        text_pass = self.text_tokens * self.pretrain / 3 / text.batches.batch_tokens
        answer_pass = self.answer_tokens * self.finetune / 3 / answers.batches.batch_tokens
        text_passes = text.num_steps // text.validate_every
        answer_passes = 1 + answers.num_steps // answers.validate_every  # the first is before step 1
        return {
            "pre-train": text.num_steps * self.pretrain + text_passes * text_pass,
            "fine-tune": answers.num_steps * self.finetune + answer_passes * answer_pass,
            "evaluate": text_pass + answer_pass,
            "the rest": OTHER_SECONDS,
        }

    def total(self, pace: Pace) -> float:
        """Seconds of all stages from pre-training on."""
        return sum(self.stages(pace).values())

    def fit(self, full: Pace, seconds: float) -> Pace:
        """The largest share in whole percents whose stages take at most `seconds`; at least one percent."""
        paces = [full._replace(share=percent / 100) for percent in range(100, 0, -1)]
        return next((pace for pace in paces if self.total(pace) <= seconds), paces[-1])


def shipped(name: str) -> Path:
    """One of the demo's configs."""
    return CONFIGS / f"{name}.json"


def pace_of(config: TrainConfig) -> Pace:
    """The pace at which a pre-training of the demo was begun."""
    for name in LEAST_SHARES:
        full = load_config(TrainConfig, shipped(name))
        if full.model == config.model:
            return Pace(name, config.dtype, config.num_steps / full.num_steps)
    return FULL._replace(dtype=config.dtype)


def plan(minutes: float, started: float, text_tokens: int, answer_tokens: int) -> Pace:
    """Choose model, dtype and steps so that the demo ends in time, and print what each stage will take.

    Args:
        minutes: what the whole demo may take. 0: all steps of the first model, however long that takes.
        started: when the demo began, by `time.monotonic`.
        text_tokens, answer_tokens: held out of pre-training and of fine-tuning.
    """
    dtype = fastest_dtype()
    for name, least_share in LEAST_SHARES.items():
        pace = Pace(name, dtype, 1.0)
        pretrain, finetune = (step_seconds(pace, training) for training in (name, "finetune"))
        rehearsal = Rehearsal(pretrain, finetune, text_tokens, answer_tokens)
        gone = time.monotonic() - started
        if minutes:
            pace = rehearsal.fit(pace, (60 * minutes - gone) * MARGIN)
        if pace.share >= least_share:
            break
    else:
        pace = at_least(pace._replace(share=least_share), pace, rehearsal, gone)
    _print_plan(pace, rehearsal, gone)
    return pace


def at_least(least: Pace, fitting: Pace, rehearsal: Rehearsal, gone: float) -> Pace:
    """The least training that beats xz clearly, or what fits where that would take too long; says which."""
    seconds = rehearsal.total(least)
    takes = f"a training that beats xz clearly takes {_duration(seconds)} here"
    if seconds <= LONGEST_SECONDS:
        print(f"{takes}: the demo takes longer than --minutes allow")
        return least
    print(f"{takes}: it is cut to what fits; --minutes {(seconds / MARGIN + gone) / 60:.0f} would be enough")
    return fitting


def fastest_dtype() -> Dtype:
    """float32, or bfloat16 where the CPU multiplies it in hardware and a whole step is faster for it."""
    dtypes: list[Dtype] = ["float32", "bfloat16"] if fast_bfloat16(torch.device("cpu")) else ["float32"]
    if len(dtypes) == 1:
        return dtypes[0]
    seconds = {dtype: step_seconds(Pace("pretrain", dtype, 1.0), "pretrain") for dtype in dtypes}
    print("\nrehearsal: " + ", ".join(f"{dtype} {value:.2f} s/step" for dtype, value in seconds.items()))
    return min(dtypes, key=lambda dtype: seconds[dtype])


def step_seconds(pace: Pace, name: str) -> float:
    """Seconds of one whole step of a training: the median of three on random tokens, after one to warm up."""
    step, seconds = _rehearsed_step(pace, name), []
    for _ in range(4):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _rehearsed_step(pace: Pace, name: str) -> Callable[[], None]:
    """A step of the real model and the real optimizer, on random tokens."""
    config, shape = pace.config(name), load_config(TrainConfig, shipped(pace.name)).model
    assert shape is not None
    dtype = getattr(torch, config.dtype)
    ops = select(config.kernels, "cpu", shape.head_dim, dtype)
    model = Transformer(shape, ops, compute_dtype=dtype).init_weights(0).train()
    if config.lora is not None:
        add_lora(model, config.lora, 0, range(len(config.lora.tokens)))
    optimizer = Optimizer(model.join_weights(), config.optimizer)
    rows, length = config.batches.micro_batch_rows, config.batches.sequence_length
    tokens = torch.randint(shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32)

    def step() -> None:
        for _ in range(config.batches.micro_steps(1)):
            model(tokens, tokens, None, cu_seqlens).backward()
        optimizer.step(config.optimizer.peak_lr, optimizer.measure_gradients())
        optimizer.zero_grad()

    return step


def _print_plan(pace: Pace, rehearsal: Rehearsal, gone: float) -> None:
    configs = {"pre-train": pace.config(pace.name), "fine-tune": pace.config("finetune")}
    steps = {"pre-train": rehearsal.pretrain, "fine-tune": rehearsal.finetune}
    print(f"\nplan: {_duration(gone + rehearsal.total(pace))} in all; {gone:.0f} s are gone, these follow:")
    for stage, seconds in rehearsal.stages(pace).items():
        line = f"  {stage:<10} {seconds:4.0f} s"
        if stage in configs:
            line += f": {configs[stage].num_steps} steps of {steps[stage]:.2f} s, {pace.dtype}"
        print(line, flush=True)


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.1f} min"
