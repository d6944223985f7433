"""Training: the wiring, and the one loop.

torchrun --nproc-per-node 8 lumi/train.py --config C --data-dirs S... --tokenizer-dir T --output-dir R
"""

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from lumi.batches import Batch, BatchConfig, Batches, prefetch
from lumi.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from lumi.command_line import add_config, parser, run
from lumi.config import UserError, load_config, to_dict, write_json
from lumi.evaluation import held_out_loss
from lumi.hf_format import save_model
from lumi.kernels.bundle import select
from lumi.metrics import Meter, MetricsLog, draw_loss, human, memory_estimate, peak_flops, progress_bar
from lumi.model import ModelConfig, Transformer
from lumi.optimizer import LossScale, Optimizer, OptimizerConfig, lr_at
from lumi.parallel import World, data_parallel, gradient_sync, process_group
from lumi.shards import TokenStore, open_or_tokenize
from lumi.storage import sweep_temporaries
from lumi.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Paths are not in it: they come from the command line."""

    model: ModelConfig
    batches: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    num_steps: int
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of activations and products; master weights are float32
    kernels: Literal["auto", "reference", "triton"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    validate_every: int = 250
    validation_tokens: int | None = 1_000_000  # of each data folder; null: the whole split
    save_every: int = 1000
    keep_last: int = 2  # checkpoints; the best one is kept beside them
    max_skipped_steps: int = 5  # in a row, for a loss or gradient that is not finite, before the run stops

    def __post_init__(self):
        for name in ("num_steps", "validate_every", "save_every", "keep_last", "max_skipped_steps", "validation_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.batches.sequence_length > self.model.max_positions:
            raise ValueError(
                f"batches.sequence_length must be at most model.max_positions = {self.model.max_positions}, "
                f"got {self.batches.sequence_length}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.num_steps * self.batches.batch_tokens


@dataclass(frozen=True)
class Paths:
    """What the command line says."""

    data_dirs: Sequence[str]
    tokenizer_dir: str
    output_dir: Path
    data_weights: Sequence[float] | None = None
    resume: str | None = None  # "auto" or a checkpoint folder

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.output_dir / "checkpoints"


class StopSignal:
    """SIGTERM and SIGINT, within a `with` block, as a flag that the loop reads between steps; a second one stops at once."""

    def __init__(self):
        self.received, self.time = 0, 0.0

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self.time = number, now
        elif now - self.time > 1.0:  # torchrun hands Ctrl-C on to processes that the terminal has already told: that is not a second one
            os._exit(128 + number)


class Trainer:
    """Everything one run holds on one process; `train` is the loop, the rest is what it calls."""

    def __init__(self, config: TrainConfig, paths: Paths, world: World):
        self.config, self.paths, self.world = config, paths, world
        self.micro_steps = config.batches.micro_steps(world.size)
        self.tokenizer = Tokenizer.load(paths.tokenizer_dir)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size must be at least the tokenizer's {self.tokenizer.vocab_size} pieces, got {config.model.vocab_size}"
            )
        self.stores = self._open_stores()
        self.batches = Batches([store.split("train") for store in self.stores], paths.data_weights, config.batches, config.seed)
        self.validation = [store.split("validation") for store in self.stores if store.has_split("validation")]

        dtype = getattr(torch, config.dtype)
        self.ops = select(config.kernels, world.device)
        self.model = Transformer(config.model, self.ops, compute_dtype=dtype, gradient_checkpointing=config.gradient_checkpointing)
        self.model.init_weights(config.seed).to(world.device)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.loss_scale = LossScale(config.dtype)
        self.state: dict[str, Any] = {"step": 0, "skipped_in_a_row": 0, "best": None}
        if paths.resume is not None:
            self._resume(paths.resume)
        if config.compile:
            for layer in self.model.layers:
                layer.compile()
        self.parallel_model = data_parallel(self.model, world)
        self.stop = StopSignal()
        self.meter = Meter()

    def train(self) -> bool:
        """The one training loop, from the step after `state["step"]` to `num_steps`. Returns False where a signal ended it early."""
        config, world = self.config, self.world
        for step, micro_batches in prefetch(self._micro_batches, range(self.state["step"] + 1, config.num_steps + 1)):
            num_targets, stopping = world.sum(sum(batch.num_targets for batch in micro_batches), self.stop.received)
            if stopping:
                self._save()
                return False
            torch.manual_seed(_step_seed(config.seed, step, world.rank))  # what a step draws depends on nothing before it
            nats = torch.zeros((), device=world.device)
            for index, batch in enumerate(micro_batches):
                batch = batch.to(world.device)
                with gradient_sync(self.parallel_model, enabled=index == len(micro_batches) - 1):
                    loss = self.parallel_model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens)
                    # DDP takes a mean over processes; the loss is the sum over all of them / all targets.
                    (loss * (self.loss_scale.value * world.size / num_targets)).backward()
                nats += loss.detach()
            mean_loss = world.sum(nats.item())[0] / num_targets
            gradient_norm, lr = self.optimizer.clip_gradients(self.loss_scale.value), lr_at(step, config.num_steps, config.optimizer)
            finite = math.isfinite(mean_loss) and math.isfinite(gradient_norm)
            if finite:
                self.optimizer.step(lr)
            self.optimizer.zero_grad()
            self.loss_scale.update(finite)

            self.state |= {"step": step, "skipped_in_a_row": 0 if finite else self.state["skipped_in_a_row"] + 1}
            self._log_step(mean_loss, gradient_norm, lr)
            saving = step % config.save_every == 0 or step == config.num_steps
            if self.validation and (saving or step % config.validate_every == 0):
                self._validate()
            if saving:
                self._save()
        return True

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's rows of a step."""
        size = self.config.batches.micro_batch_size
        first = self.world.rank * self.micro_steps * size
        return [self.batches.rows(step, first + i * size, first + (i + 1) * size) for i in range(self.micro_steps)]

    def _log_step(self, loss: float, gradient_norm: float, lr: float) -> None:
        step, config = self.state["step"], self.config
        self.meter.add(config.batches.batch_tokens)
        if self.world.is_main:
            finite = math.isfinite(loss) and math.isfinite(gradient_norm)
            rate = self.meter.read()
            measured = {"loss": loss, "gradient_norm": gradient_norm, "lr": lr, "tokens_per_second": round(rate, 1)}
            values = {key: value if math.isfinite(value) else None for key, value in measured.items()}  # JSON has no nan
            mix = {"mix": [round(share, 6) for share in self.batches.mix(step)]} if len(self.stores) > 1 else {}
            self.log.write(step, "train", **values, tokens=step * config.batches.batch_tokens, skipped=not finite, **mix)
            self.bar.set_postfix_str(f"loss {loss:.3f}, {human(rate)} tokens/s", refresh=False)
            self.bar.update()
        if self.state["skipped_in_a_row"]:
            self._report_skipped(loss, gradient_norm)

    def _report_skipped(self, loss: float, gradient_norm: float) -> None:
        """Say which documents a step that was skipped is made of; stop after too many in a row."""
        step, skipped = self.state["step"], self.state["skipped_in_a_row"]
        sources = "; ".join(f"{self.paths.data_dirs[store]} documents {ids}" for store, ids in self.batches.documents(step)[:4])
        self._say(f"step {step} skipped: loss {loss}, gradient norm {gradient_norm}; its rows are {sources} ...")
        if skipped >= self.config.max_skipped_steps:
            self._save()
            raise UserError(
                f"the loss or gradient was not finite in {skipped} steps running, up to step {step}; "
                f"to inspect: {self.paths.checkpoints / f'step-{step:08d}'}; a lower optimizer.peak_lr often mends it"
            )

    def _validate(self) -> None:
        step, config = self.state["step"], self.config
        result = held_out_loss(
            self.model, self.validation, self.tokenizer.token_bytes, config.batches, self.world, config.validation_tokens
        )
        self.state["validation"] = {"step": step, **asdict(result)}
        if self.world.is_main:
            self.log.write(step, "validation", **asdict(result))
            self._say(f"step {step}: validation loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte")
            draw_loss(self.log.path, self.paths.output_dir / "loss.png", f"{self.paths.output_dir.name}: loss")
        self.meter.read()  # the time that validation took is not training's

    def _save(self) -> None:
        """A checkpoint of now, by the main process; then old ones are pruned. Best is the lowest validation loss among the saved."""
        step, best = self.state["step"], self.state["best"]
        validation = self.state.get("validation")
        if validation and validation["step"] == step and (best is None or validation["loss"] < best["loss"]):
            best = self.state["best"] = {"step": step, "loss": validation["loss"]}
        if self.world.is_main:
            tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_tensors()}
            state = {**self.state, "loss_scale": vars(self.loss_scale), "identity": self._identity(), "config": to_dict(self.config)}
            path = save_checkpoint(self.paths.checkpoints, step, Checkpoint(tensors, state))
            prune_checkpoints(self.paths.checkpoints, self.config.keep_last, best and f"step-{best['step']:08d}")
            self._say(f"step {step}: saved {path}")
        self.world.barrier()
        self.meter.read()

    def _open_stores(self) -> list[TokenStore]:
        """One store per data folder. The main process tokenizes corpus folders and checks every hash; the others wait for it."""
        stores = [open_or_tokenize(folder, self.tokenizer) for folder in self.paths.data_dirs] if self.world.is_main else []
        self.world.barrier()
        return stores or [open_or_tokenize(folder, self.tokenizer, verify="size") for folder in self.paths.data_dirs]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        config = self.config
        return {
            "model": to_dict(config.model),
            "sequence_length": config.batches.sequence_length,
            "batch_tokens": config.batches.batch_tokens,
            "optimizer": config.optimizer.kind,
            "seed": config.seed,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "data": [{name: file.sha256 for name, file in store.manifest.splits["train"].files.items()} for store in self.stores],
            "data_weights": self.batches.weights,
        }

    def _resume(self, source: str) -> None:
        """Weights, optimizer state and step from a checkpoint; `auto` is the newest one of this run, and step 0 where there is none."""
        if source == "auto":
            found = list_checkpoints(self.paths.checkpoints)
            if not found:
                self._say(f"no checkpoint in {self.paths.checkpoints}: starting at step 0")
                return
            source = str(found[-1])
        checkpoint = load_checkpoint(source)
        for key, value in self._identity().items():
            if (saved := checkpoint.state["identity"].get(key)) != value:
                raise UserError(f"{source}: cannot go on from here: {key} was {saved} and is {value} now; use what the run began with")
        self.model.load_state_dict(checkpoint.tensors["model"])
        self.optimizer.load_state_tensors(checkpoint.tensors["optimizer"])
        if self.loss_scale.enabled and checkpoint.state["loss_scale"]["enabled"]:
            vars(self.loss_scale).update(checkpoint.state["loss_scale"])
        self.state = {key: value for key, value in checkpoint.state.items() if key not in ("loss_scale", "identity", "config")}
        self._say(f"resumed from {source} at step {self.state['step']}")

    def _say(self, line: str) -> None:
        if self.world.is_main:
            tqdm.write(line)

    def plan(self) -> str:
        """What this run is about to do, before step 1."""
        config, world = self.config, self.world
        flops = config.model.flops_per_token(config.batches.sequence_length) * config.num_tokens
        compute_bytes = torch.finfo(getattr(torch, config.dtype)).bits // 8
        memory = memory_estimate(config.model, config.batches, config.optimizer.kind, compute_bytes, config.gradient_checkpointing)
        epochs = [
            f"{name}: {weight:.1%} of the rows, {stream.num_tokens:,} tokens, {weight * config.num_tokens / stream.num_tokens:.2f} epochs"
            for name, weight, stream in zip(self.paths.data_dirs, self.batches.weights, self.batches.streams, strict=True)
        ]
        processes = "1 process" if world.size == 1 else f"{world.size} processes"
        shares = f"{processes} x {self.micro_steps} micro-steps x {config.batches.micro_batch_size} rows x {config.batches.sequence_length}"
        rows = {
            "model": f"{config.model.num_parameters:,} parameters, {config.model.num_layers} layers of {config.model.model_dim}",
            "device": f"{world.size} x {world.device.type}, {config.dtype}, {self.ops.name} kernels",
            "tokens": f"{config.num_tokens:,} ({config.num_tokens / config.model.num_parameters:.1f} per parameter)",
            "steps": f"{config.num_steps:,} of {config.batches.batch_tokens:,} tokens: {shares}",
            "compute": f"{flops:.3g} FLOPs"
            + (f", {flops / peak / world.size / 3600:.2f} h at peak" if (peak := peak_flops(world.device)) else ""),
            "memory": ", ".join(f"{part} {size / 2**20:,.0f} MiB" for part, size in memory.items()) + " (a process, estimated)",
            "data": "; ".join(epochs),
            "validation": f"{sum(len(split.tokens) for split in self.validation):,} tokens"
            if self.validation
            else "none: no validation split",
        }
        width = max(map(len, rows))
        return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows.items())

    def run(self) -> int:
        """Plan, train, and leave `final/`. Returns the process's exit code: 0, or 128 + the signal that ended it."""
        paths, main = self.paths, self.world.is_main
        first = self.state["step"] + 1
        if main:
            write_json(paths.output_dir / "config.json", to_dict(self.config))
            self.log = MetricsLog(paths.output_dir / "metrics.jsonl", self.state["step"])
            self._say(f"plan\n{self.plan()}")
            self.bar = progress_bar(self.config.num_steps, "train", "step", initial=first - 1)
        with self.stop:
            finished = self.train()
        if main:
            self.bar.close()
            self.log.close()
            draw_loss(self.log.path, paths.output_dir / "loss.png", f"{paths.output_dir.name}: loss")
            if finished:
                save_model(paths.output_dir / "final", self.model, self.tokenizer)
                self._say(f"final model: {paths.output_dir / 'final'}")
        if finished:
            return 0
        number = self.stop.received or signal.SIGTERM
        self._say(f"stopped by {signal.Signals(number).name} after step {self.state['step']}; go on with --resume-from-checkpoint auto")
        return 128 + number


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def check_output(paths: Paths) -> None:
    """Refuse to mix two runs in one folder. Raises UserError."""
    if paths.resume is None and (list_checkpoints(paths.checkpoints) or (paths.output_dir / "metrics.jsonl").exists()):
        raise UserError(
            f"--output-dir must be new, got {paths.output_dir}, which holds a run; "
            f"go on with it by --resume-from-checkpoint auto, or choose another folder"
        )
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    for folder in (paths.output_dir, paths.checkpoints):
        for name in sweep_temporaries(folder):
            print(f"removed {folder / name}, left by a run that was interrupted", flush=True)


def train(config: TrainConfig, paths: Paths, device: str = "auto") -> int:
    """Run a training from start to end on this process's share. Returns the exit code."""
    with process_group(device) as world:
        if world.is_main:
            check_output(paths)
        world.barrier()
        return Trainer(config, paths, world).run()


def main(argv: list[str]) -> int:
    """The command line."""
    arguments = parser("train.py", "Train a language model; start with torchrun, or plain python for one process.")
    add_config(arguments)
    arguments.add_argument("--data-dirs", nargs="+", required=True, metavar="DIR", help="token stores, or corpus folders")
    arguments.add_argument("--data-weights", nargs="+", type=float, metavar="W", help="share of each data folder; default: its size")
    arguments.add_argument("--tokenizer-dir", "--tokenizer-path", required=True, help="tokenizer folder or model file")
    arguments.add_argument("--output-dir", required=True, type=Path, help="the run folder")
    arguments.add_argument("--resume-from-checkpoint", metavar="auto|PATH", help="go on with a run")
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = arguments.parse_args(argv)
    config = load_config(TrainConfig, options.config, options.overrides)
    paths = Paths(options.data_dirs, options.tokenizer_dir, options.output_dir, options.data_weights, options.resume_from_checkpoint)
    return train(config, paths, options.device)


if __name__ == "__main__":
    sys.exit(run(main))
