"""Training: the wiring, and the one loop.

torchrun --nproc-per-node 8 lumi/train.py --config C --data-dirs S... --tokenizer-dir T --output-dir R
"""

import math
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lumi.batches import Batch, prefetch
from lumi.checkpoint import Checkpoint
from lumi.command_line import add_config, parse, parser, run
from lumi.config import UserError, differences, load_config, to_dict, write_json
from lumi.evaluation import held_out_loss
from lumi.interruption import StopSignal
from lumi.kernels.bundle import Ops, select
from lumi.lora import load_trained, trained_tensors
from lumi.metrics import Meter, MetricsLog, draw_loss, human, peak_flops
from lumi.optimizer import LossScale, Optimizer, lr_at
from lumi.parallel import World, data_parallel, gradient_sync, process_group
from lumi.plan import describe_plan
from lumi.progress import progress_bar
from lumi.run_config import Paths, TrainConfig
from lumi.run_data import RunData
from lumi.run_folder import RunFolder
from lumi.run_model import build, resolve, save_final, start_fingerprint


class Trainer:
    """Everything one run holds on one process; `train` is the loop, the rest is what it calls."""

    def __init__(self, config: TrainConfig, paths: Paths, world: World):
        config, shape, self.start = resolve(config, paths.model_path)
        self.config, self.paths, self.world, self.folder = config, paths, world, RunFolder(paths.output_dir)
        self.world.on_main(self._claim_folder)
        self.micro_steps = config.batches.micro_steps(world.size)
        self.data = RunData(config, paths, world)
        self.identity = self._identity()
        self.ops = _select_kernels(config.kernels, world.device, shape.per_head)
        self.model = build(config, shape, self.start, self.data.tokenizer, self.ops, world.device)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.loss_scale = LossScale(config.dtype)
        self.state: dict[str, Any] = {"step": 0, "skipped_in_a_row": 0, "best": None, "validation": None}
        self._resume()
        if config.compile:
            for layer in self.model.layers:
                layer.compile()
        self.parallel_model = data_parallel(self.model, world)
        self.stop = StopSignal()
        self.meter = Meter()
        self.flops_per_token = shape.flops_per_token(config.batches.sequence_length, frozen=config.lora is not None)
        peak = peak_flops(world.device)
        self.peak_flops = peak and peak * world.size

    def train(self) -> bool:
        """The one training loop, from the step after `state["step"]` to `num_steps`. Returns False where a signal ended it early."""
        config, world = self.config, self.world
        if self.start is not None and self.data.validation and self.state["step"] == 0:
            self._validate()  # what fine-tuning begins at
        for step, micro_batches in prefetch(self._micro_batches, range(self.state["step"] + 1, config.num_steps + 1)):
            num_targets, stopping = world.sum(sum(batch.num_targets for batch in micro_batches), self.stop.received)
            if stopping:
                self._save()
                return False
            torch.manual_seed(_step_seed(config.seed, step, world.rank))  # what a step draws depends on nothing before it
            dloss = self.loss_scale.value * world.size / num_targets  # DDP takes a mean over processes; the loss is the sum / all targets
            nats: list[Tensor] = []
            for index, batch in enumerate(micro_batches):
                batch = batch.to(world.device)
                with gradient_sync(self.parallel_model, enabled=index == len(micro_batches) - 1):
                    loss = self.parallel_model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, dloss)
                    (loss * dloss).backward()
                nats.append(loss.detach())
            mean_loss = world.sum(torch.stack(nats).sum().item())[0] / num_targets
            gradient_norm, lr = self.optimizer.clip_gradients(self.loss_scale.value), lr_at(step, config.num_steps, config.optimizer)
            finite = math.isfinite(mean_loss) and math.isfinite(gradient_norm)
            if finite:
                self.optimizer.step(lr)
            self.optimizer.zero_grad()
            self.loss_scale.update(finite)

            self.state |= {"step": step, "skipped_in_a_row": 0 if finite else self.state["skipped_in_a_row"] + 1}
            self._log_step(mean_loss, gradient_norm, lr, int(num_targets))
            if not finite:
                self._report_skipped(mean_loss, gradient_norm, nats)
            saving = step % config.save_every == 0 or step == config.num_steps
            if self.data.validation and (saving or step % config.validate_every == 0):
                self._validate()
            if saving:
                self._save()
        return True

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's rows of a step."""
        return [self.data.batches.rows(step, *self._rows(index)) for index in range(self.micro_steps)]

    def _rows(self, micro_step: int) -> tuple[int, int]:
        size = self.config.batches.micro_batch_size
        first = (self.world.rank * self.micro_steps + micro_step) * size
        return first, first + size

    def _log_step(self, loss: float, gradient_norm: float, lr: float, num_targets: int) -> None:
        step, config = self.state["step"], self.config
        self.meter.add(config.batches.batch_tokens)
        if not self.world.is_main:
            return
        rate = self.meter.read()
        extra: dict[str, Any] = {"mfu": rate * self.flops_per_token / self.peak_flops} if self.peak_flops else {}
        if len(self.data.stores) > 1:
            extra["mix"] = [round(share, 6) for share in self.data.batches.mix(step)]
        skipped = self.state["skipped_in_a_row"] > 0
        values = {"loss": loss, "gradient_norm": gradient_norm, "lr": lr, "tokens_per_second": round(rate, 1), "targets": num_targets}
        self.log.write(step, "train", **values, tokens=step * config.batches.batch_tokens, skipped=skipped, **extra)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {human(rate)} tokens/s", refresh=False)
        self.bar.update()

    def _report_skipped(self, loss: float, gradient_norm: float, nats: list[Tensor]) -> None:
        """Name the documents behind a step that was skipped, each process its own; stop after too many steps in a row."""
        step, skipped = self.state["step"], self.state["skipped_in_a_row"]
        self._say(f"step {step} skipped: loss {loss}, gradient norm {gradient_norm}")
        for index, value in enumerate(nats):
            if not value.isfinite():
                named = self.data.name_documents(step, *self._rows(index))
                tqdm.write(f"step {step}: loss {value.item()} in a micro-batch of {named}")
        if skipped >= self.config.max_skipped_steps:
            self._save()
            raise UserError(
                f"the loss or gradient was not finite in {skipped} steps running, up to step {step}; "
                f"to inspect: {self.folder.checkpoints / f'step-{step:08d}'}; a lower optimizer.peak_lr often mends it"
            )

    def _validate(self) -> None:
        step, config = self.state["step"], self.config
        token_bytes = self.data.tokenizer.token_bytes
        result = held_out_loss(self.model, self.data.validation, token_bytes, config.batches, self.world, config.validation_tokens)
        self.state["validation"] = {"step": step, **asdict(result)} if math.isfinite(result.loss) else None
        if self.world.is_main:
            self.log.write(step, "validation", **asdict(result))
            self._say(f"step {step}: validation loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte")
            draw_loss(self.folder.metrics, self.folder.picture, f"{self.paths.output_dir.name}: loss")
        self.meter.read()  # the time that validation took is not training's

    def _save(self) -> None:
        """A checkpoint of now, by the main process, if there is none yet. Best is the lowest validation loss among the saved."""
        step, best, validation = self.state["step"], self.state["best"], self.state["validation"]
        if validation and validation["step"] == step and (best is None or validation["loss"] < best["loss"]):
            self.state["best"] = {"step": step, "loss": validation["loss"]}
        tensors = {"model": trained_tensors(self.model), "optimizer": self.optimizer.state_tensors()}
        state = {**self.state, "loss_scale": vars(self.loss_scale), "identity": self.identity, "config": to_dict(self.config)}

        def write() -> None:
            if not self.folder.has(step):  # a signal during a step that saved comes here again
                self._say(f"step {step}: saved {self.folder.save(step, tensors, state, self.config.keep_last)}")

        self.world.on_main(write)
        self.meter.read()

    def _claim_folder(self) -> None:
        for name in self.folder.claim(self.paths.resume):
            self._say(f"removed {name}, left by a run that was interrupted")

    def _identity(self) -> dict[str, Any]:
        """What decides the weights' shapes and which data a step sees: it must be the same when a run goes on."""
        config = self.config
        return {
            "model": to_dict(config.model),
            "start": start_fingerprint(self.start),
            "lora": config.lora and to_dict(config.lora),
            "sequence_length": config.batches.sequence_length,
            "batch_tokens": config.batches.batch_tokens,
            "optimizer": config.optimizer.kind,
            "seed": config.seed,
            **self.data.identity(),
        }

    def _resume(self) -> None:
        """Weights, optimizer state and step from the checkpoint that `--resume-from-checkpoint` means."""
        found = self.folder.find(self.paths.resume, self._say)
        if found is not None:
            self._restore(*found)
            if self.world.is_main:
                for name in self.folder.abandon_after(self.state["step"]):
                    self._say(f"removed {name}: this run goes on from before it")
        elif self.paths.resume:
            self._say(f"no checkpoint in {self.folder.checkpoints}: starting at step 0")
        if not self.world.all_equal(self.state["step"]):
            raise UserError(
                f"--output-dir must be on a disk that all machines share, got {self.paths.output_dir} with different checkpoints"
            )

    def _restore(self, path: Path, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        if changed := differences(state.pop("identity"), self.identity):
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise UserError(f"{path}: cannot go on from here: {'; '.join(changed[:3])}{more}; use what the run began with")
        if state["step"] > self.config.num_steps:
            raise UserError(f"num_steps must be at least the checkpoint's step {state['step']}, got {self.config.num_steps}")
        for change in differences(state.pop("config"), to_dict(self.config)):
            self._say(f"changed since the checkpoint: {change}")
        load_trained(self.model, tensors["model"])
        self.optimizer.load_state_tensors(tensors["optimizer"])
        loss_scale = state.pop("loss_scale")
        if self.loss_scale.enabled and loss_scale["enabled"]:
            vars(self.loss_scale).update(loss_scale)
        self.state = state
        self._say(f"resumed from {path} at step {self.state['step']}")

    def _say(self, line: str) -> None:
        if self.world.is_main:
            tqdm.write(line)

    def _plan(self) -> str:
        num_trained = sum(tensor.numel() for tensor in trained_tensors(self.model).values()) if self.config.lora else None
        size, device, kernels, data = self.world.size, self.world.device, self.ops.name, self.data
        plan = describe_plan(self.config, data.shares(), data.num_validation_tokens(), size, device, kernels, self.peak_flops, num_trained)
        return "\n".join([f"plan\n{plan}", *data.describe_conversations()])

    def _return_to_best(self) -> None:
        best = self.state["best"]
        if best is not None and best["step"] != self.state["step"]:
            load_trained(self.model, self.folder.load(self.folder.checkpoint(best["step"])).tensors["model"])
            self._say(f"final is the checkpoint of step {best['step']}, of the lowest validation loss: {best['loss']:.4f}")

    def run(self) -> int:
        """Plan, train, and leave `final/`. Returns the process's exit code: 0, or 128 + the signal that ended it."""
        folder, main = self.folder, self.world.is_main
        if main:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(folder.config, to_dict(self.config))
            self.log = MetricsLog(folder.metrics, self.state["step"])
            self._say(self._plan())
            self.bar = progress_bar("train", "step", total=self.config.num_steps, initial=self.state["step"])
        with self.stop:
            finished = self.train()
        if main:
            self.bar.close()
            self.log.close()
            draw_loss(folder.metrics, folder.picture, f"{self.paths.output_dir.name}: loss")
            if finished:
                if self.config.final == "best":
                    self._return_to_best()
                save_final(folder.final, self.model, self.config, self.start, self.identity["start"], self.data.tokenizer)
                self._say(f"final model: {folder.final}")
        if finished:
            return 0
        number = self.stop.received or signal.SIGTERM
        self._say(f"stopped by {signal.Signals(number).name} after step {self.state['step']}; go on with --resume-from-checkpoint auto")
        return 128 + number


def _select_kernels(name: str, device: torch.device, head_dim: int) -> Ops:
    try:
        return select(name, device, head_dim)
    except ValueError as error:
        raise UserError(str(error)) from error


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def train(config: TrainConfig, paths: Paths, device: str = "auto") -> int:
    """Run a training from start to end on this process's share. Returns the exit code."""
    with process_group(device) as world:
        return Trainer(config, paths, world).run()


def main(argv: list[str]) -> int:
    """The command line."""
    arguments = parser("train.py", "Train a language model; start with torchrun, or plain python for one process.")
    add_config(arguments)
    arguments.add_argument("--data-dirs", nargs="+", required=True, metavar="DIR", help="token stores, or corpus folders")
    arguments.add_argument(
        "--data-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="share of the rows that each data folder gets; by its tokens where not given",
    )
    arguments.add_argument("--tokenizer-dir", "--tokenizer-path", required=True, help="tokenizer folder or model file")
    arguments.add_argument("--model-path", type=Path, metavar="M", help="begin with this model: a run or a Hugging Face folder")
    arguments.add_argument("--output-dir", required=True, type=Path, help="the run folder")
    arguments.add_argument("--resume-from-checkpoint", metavar="auto|PATH", help="go on with a run")
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parse(arguments, argv)
    config = load_config(TrainConfig, options.config, options.overrides)
    weights, resume = options.data_weights, options.resume_from_checkpoint
    paths = Paths(options.data_dirs, options.tokenizer_dir, options.output_dir, weights, resume, options.model_path)
    return train(config, paths, options.device)


if __name__ == "__main__":
    sys.exit(run(main))
