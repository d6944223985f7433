"""One training run: set-up, the one loop, and what it leaves."""

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.checkpoint.saver import Saver
from lumi.config import UserError, to_dict, write_json
from lumi.data.batches import Batch, prefetch
from lumi.evaluation import held_out_loss
from lumi.host.devices import peak_flops
from lumi.host.interruption import Interrupted, StopSignal
from lumi.kernels.bundle import Ops, select
from lumi.model.lora import trained_tensors
from lumi.parallel.process_group import process_group
from lumi.parallel.sharding import gradient_sync, parallelize, reshard
from lumi.parallel.tensor_parallel import check_tensor_parallel
from lumi.parallel.watchdog import Watchdog
from lumi.parallel.world import World, attempt
from lumi.training.loss_scale import LossScale
from lumi.training.loss_spikes import LossSpikes
from lumi.training.optimizer import Optimizer
from lumi.training.plan import describe_plan
from lumi.training.preflight import choose_micro_batch, free_memory, rehearse, with_micro_batch
from lumi.training.resume import micro_batch_before, resumed_state, run_identity
from lumi.training.run_config import Paths, TrainConfig
from lumi.training.run_data import RunData
from lumi.training.run_folder import RunFolder
from lumi.training.run_log import RunLog
from lumi.training.run_model import build, resolve, save_final
from lumi.training.run_status import Status, write_status
from lumi.training.schedule import lr_at


class Trainer:
    """Everything one run holds on one process; `train` is the loop, the rest is what it calls."""

    def __init__(self, config: TrainConfig, paths: Paths, world: World):
        config, shape, self.start = resolve(config, paths.model_path)
        self.paths, self.world = paths, world
        self.ops = _select_kernels(config.kernels, world.device, shape.head_dim)
        self.folder = RunFolder(paths.output_dir)
        self.log = RunLog(self.folder, world.is_main)
        free = free_memory(world.device)
        found = self.folder.find(paths.resume, world, self.log.say)
        self.config, self.data = config, RunData(config, paths, world)
        self.identity = world.agreed(
            lambda: run_identity(config, self.start, self.data)
        )  # before the weights that it names are read
        self.model = world.agreed(lambda: build(config, shape, self.start, self.data.tokenizer, self.ops))
        self.num_trained = (
            sum(tensor.numel() for tensor in trained_tensors(self.model).values()) if config.lora else None
        )
        before = micro_batch_before(found)
        self.config = config = world.alike(
            lambda: choose_micro_batch(config, world, self.ops.name, free, self.num_trained, before)
        )
        self.micro_steps = config.batches.micro_steps(world.layout.data)
        if config.compile:
            for layer in self.model.layers:
                layer.compile()
        weights = self.model.initial_weights(config.seed) if self.start is None else None
        self.parallel_model = parallelize(self.model, world, config.parallel.reduce_dtype, weights)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.loss_scale = LossScale(config.dtype)
        self.spikes = LossSpikes(config.max_loss_sigmas)
        fine_tuning = self.start is not None and bool(self.data.validation)
        self.state: dict[str, Any] = {
            "step": 0,
            "skipped_in_a_row": 0,
            "skipped_steps": 0,
            "best": None,
            "validation": None,
        }
        self.state["validation_due"] = fine_tuning  # what fine-tuning begins at
        self.saved_step: int | None = None
        self.fault: str | None = None  # why this process could not read the data of a step
        self._resume(found)
        self.saver = Saver(self.folder.checkpoints, world.rank, world.size, world.saving)
        self.watchdog = Watchdog(
            world.patient, config.step_timeout_seconds, self._report_hang, lambda: self.saver.progress
        )
        peak = peak_flops(world.device)
        self.peak_flops = peak and peak * world.size
        flops_per_token = shape.flops_per_token(
            config.batches.sequence_length, frozen=config.lora is not None
        )
        self.flops_share = self.peak_flops and flops_per_token / self.peak_flops

    def train(self) -> bool:
        """The one training loop, from the step after `state["step"]` to `num_steps`. Returns False where a signal ended it early."""
        config, world = self.config, self.world
        if self.state["validation_due"]:
            self._validate()
            self._note_best()
        for step, micro_batches in self._loaded():
            num_targets, stopping = self._agree(micro_batches)
            if stopping:
                self._save()
                return False
            _seed(
                _step_seed(config.seed, step, world.data_rank), world.device
            )  # what a step draws depends on nothing before it
            # Gradients are means over the processes that read different rows; the loss is the sum over all targets, by their number.
            dloss = self.loss_scale.value * world.layout.data / num_targets
            nats: list[Tensor] = []
            for index, batch in enumerate(micro_batches):
                self.watchdog.mark(step, f"micro-step {index + 1} of {len(micro_batches)}")
                nats.append(self._forward_backward(batch, dloss, last=index == len(micro_batches) - 1))
            self.watchdog.mark(step, "optimizer")
            mean_loss = world.sum(torch.stack(nats).sum().item())[0] / num_targets
            gradient_norm, lr = (
                self.optimizer.clip_gradients(self.loss_scale.value),
                lr_at(step, config.num_steps, config.optimizer.peak_lr, config.optimizer.schedule),
            )
            finite = math.isfinite(mean_loss) and math.isfinite(gradient_norm)
            accepted = finite and not self.spikes.is_spike(mean_loss)
            if accepted:
                self.optimizer.step(lr)
            if finite:
                self.spikes.record(mean_loss)
            self.optimizer.zero_grad()
            self.loss_scale.update(finite)
            self._end_step(step, accepted, mean_loss, gradient_norm, lr, num_targets, nats)
        if self.saved_step is None:
            self._save()  # nothing was left to do after another run's checkpoint: final/ is made of one of this run
        return not self.state["validation_due"]  # a signal cut the last one short

    def _loaded(self) -> Iterator[tuple[int, list[Batch]]]:
        """The steps to do, with their micro-batches; waiting for them is on record, and `fault` where they cannot be read."""
        steps = range(self.state["step"] + 1, self.config.num_steps + 1)
        loading = prefetch(self._micro_batches, steps)
        for step in steps:
            self.watchdog.mark(step, "waiting for data")
            with self.log.meter.waiting():
                loaded, fault = attempt(lambda: next(loading))
            self.fault = fault
            yield loaded or (step, [])

    def _agree(self, micro_batches: list[Batch]) -> tuple[int, bool]:
        """The targets of a step over all processes, and whether any was told to stop.

        Raises:
            UserError: on any process data could not be read or the log not be written, or a save has failed.
        """
        self.watchdog.mark(self.state["step"] + 1, "counting targets")
        faulty, mine = bool(self.fault or self.log.fault), sum(batch.num_targets for batch in micro_batches)
        targets, stopping, faults, failed = self.world.sum(
            mine, self.world.stop.received, faulty, self.saver.failed
        )
        if faults:
            self._refuse_faults()
        if failed:
            self._finish_save()
        return round(targets) // self.world.layout.tensor, stopping > 0

    def _refuse_faults(self) -> None:
        self.world.refuse_first(self.fault or self.log.fault)

    def _forward_backward(self, batch: Batch, dloss: float, last: bool) -> Tensor:
        """One micro-step; returns its loss, summed over this process's targets."""
        batch = batch.to(self.world.device)
        with gradient_sync(self.parallel_model, enabled=last):
            loss = self.parallel_model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, dloss)
            (loss * dloss).backward()
        return loss.detach()

    def _end_step(
        self,
        step: int,
        accepted: bool,
        loss: float,
        gradient_norm: float,
        lr: float,
        num_targets: int,
        nats: list[Tensor],
    ) -> None:
        """Count and log a step, and do what is due after it."""
        config, state = self.config, self.state
        self.watchdog.mark(step, "logging")
        state["step"] = step
        state["skipped_in_a_row"] = 0 if accepted else state["skipped_in_a_row"] + 1
        state["skipped_steps"] += not accepted
        self._log_step(loss, gradient_norm, lr, num_targets)
        if not accepted:
            self._report_skipped(loss, gradient_norm, nats)
        saving = step % config.save_every == 0 or step == config.num_steps
        if self.data.validation and (saving or step % config.validate_every == 0):
            self._validate()
        if saving:
            self._save()

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's rows of a step."""
        return [self.data.batches.rows(step, *self._rows(index)) for index in range(self.micro_steps)]

    def _rows(self, micro_step: int) -> tuple[int, int]:
        size = self.config.batches.micro_batch_rows
        first = (self.world.data_rank * self.micro_steps + micro_step) * size
        return first, first + size

    def _log_step(self, loss: float, gradient_norm: float, lr: float, num_targets: int) -> None:
        step, state = self.state["step"], self.state
        values: dict[str, Any] = {"gradient_norm": gradient_norm, "lr": lr, "targets": num_targets}
        values |= {"skipped": state["skipped_in_a_row"] > 0}
        if state["skipped_steps"]:
            values["skipped_steps"] = state["skipped_steps"]
        if len(self.data.stores) > 1:
            values["mix"] = [round(share, 6) for share in self.data.batches.mix(step)]
        self.log.step(step, self.config.batches.batch_tokens, loss, values, self.flops_share)

    def _report_skipped(self, loss: float, gradient_norm: float, nats: list[Tensor]) -> None:
        """Name the documents behind a step that was skipped, each process its own; stop after too many steps in a row."""
        step, skipped = self.state["step"], self.state["skipped_in_a_row"]
        spike = math.isfinite(loss) and math.isfinite(gradient_norm)
        self.log.say(
            f"step {step} skipped: loss {loss}, gradient norm {gradient_norm}{', a spike' if spike else ''}"
        )
        for index, value in enumerate(nats):
            if (
                math.isfinite(loss) or not value.isfinite()
            ):  # of a spike, or of gradients, nobody knows whose it was
                named, fault = attempt(partial(self.data.name_documents, step, *self._rows(index)))
                tqdm.write(f"step {step}: loss {value.item()} in a micro-batch of {named or fault}")
        if skipped >= self.config.max_skipped_steps:
            self._save()
            self._finish_save()
            what = (
                "the loss was a spike, or it or the gradient not finite,"
                if spike
                else "the loss or gradient was not finite"
            )
            self.world.refuse(
                f"{what} in {skipped} steps running, up to step {step}; "
                f"to inspect: {self.folder.checkpoint(step)}; "
                f"a lower optimizer.peak_lr{' or a higher max_loss_sigmas' * spike} often mends it"
            )

    def _validate(self) -> None:
        """The held-out loss of now. A signal cuts it short: it is due again when the run goes on."""
        step, config, world = self.state["step"], self.config, self.world

        def stopping(fault: str | None) -> bool:
            self.watchdog.mark(step, "validation")
            self.fault = fault
            stopped, faults = world.sum(world.stop.received, fault is not None)
            if faults:
                self._refuse_faults()
            return stopped > 0

        token_bytes = self.data.tokenizer.token_bytes
        result = held_out_loss(
            self.model,
            self.data.validation,
            token_bytes,
            config.batches,
            world,
            config.validation_tokens,
            stopping,
        )
        reshard(self.model)
        self.state["validation_due"] = result is None
        if result is not None:
            self.state["validation"] = (
                {"step": step, **asdict(result)} if math.isfinite(result.loss) else None
            )
            self.log.write(step, "validation", **asdict(result))
            self.log.say(
                f"step {step}: validation loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte"
            )
            self.log.draw()
        self.log.meter.read()  # the time that validation took is not training's

    def _save(self) -> None:
        """Begin a checkpoint of now, if there is none yet."""
        step = self.state["step"]
        if self.saved_step == step:
            return  # a signal during a step that saved comes here again
        self.saved_step = step
        self._note_best()
        state = {**self.state, "loss_scale": vars(self.loss_scale), "spikes": self.spikes.state()}
        state |= {"identity": self.identity, "config": to_dict(self.config)}
        keep_best = self.state["best"] and self.state["best"]["step"]

        def finish(path: Path) -> None:
            self.log.say(f"step {step}: saved {path}")
            for line in self.folder.prune(self.config.keep_last, keep_best):
                self.log.say(line)

        with self.watchdog.patience("saving"):
            stall = self.world.alike(lambda: self.saver.begin(step, self._tensors(), state, finish))
        self.log.write(step, "checkpoint", stall_seconds=round(stall, 4))
        self.log.meter.read()

    def _finish_save(self) -> None:
        """Wait until no save is running. Raises UserError, said once, where it failed."""
        with self.watchdog.patience("saving"):
            self.world.alike(self.saver.wait)

    def _note_best(self) -> None:
        """Best is the saved step of the lowest validation loss."""
        step, best, validation = self.saved_step, self.state["best"], self.state["validation"]
        if validation and validation["step"] == step and (best is None or validation["loss"] < best["loss"]):
            self.state["best"] = {"step": step, "loss": validation["loss"]}

    def _resume(self, found: Checkpoint | None) -> None:
        """Weights, optimizer state and step from the checkpoint that `--resume-from-checkpoint` means."""
        if found is not None:
            self.world.agreed(lambda: self._restore(found))
            self.world.on_main(self._abandon_later)
            self.log.say(f"resumed from {found.path} at step {self.state['step']}")
        elif self.paths.resume:
            self.log.say(f"no checkpoint in {self.folder.checkpoints}: starting at step 0")

    def _abandon_later(self) -> None:
        for name in self.folder.abandon_after(self.state["step"]):
            self.log.say(
                f"set aside {name}: this run goes on from before it; it goes when the next save is whole"
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = resumed_state(checkpoint, self.identity, self.config, self.log.say)
        checkpoint.fill("model", trained_tensors(self.model))
        checkpoint.fill("optimizer", self.optimizer.state_tensors())
        loss_scale = state.pop("loss_scale")
        if self.loss_scale.enabled and loss_scale["enabled"]:
            vars(self.loss_scale).update(loss_scale)
        self.spikes.load(state.pop("spikes"))
        self.state = state
        if self.folder.has(state["step"]):
            self.saved_step = state["step"]

    def _report_hang(self, message: str) -> None:
        write_status(self.folder.path, "failed", self.state["step"], message=message)

    def _announce(self) -> None:
        """Keep the config, and say what the run will do and need."""
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.folder.config, to_dict(self.config))
        size, device, kernels, data = self.world.size, self.world.device, self.ops.name, self.data
        validation = data.num_validation_tokens()
        plan = describe_plan(
            self.config, data.shares(), validation, size, device, kernels, self.peak_flops, self.num_trained
        )
        self.log.say("\n".join([f"plan\n{plan}", *data.describe_conversations()]))

    def _prepare(self) -> None:
        """Before anything counts: a micro-step, which compiles and allocates, and lets DDP settle in which order it sums; then, in a new
        run, all parts of it once (`lumi.training.preflight`)."""
        config, world = self.config, self.world
        batch = world.agreed(lambda: self.data.batches.rows(self.state["step"] + 1, *self._rows(0)))
        splits, token_bytes = self.data.validation[:1], self.data.tokenizer.token_bytes
        one_batch = world.layout.data * config.batches.micro_batch_rows * config.batches.sequence_length

        def micro_step(last: bool) -> None:
            last = (
                last or self.micro_steps == 1
            )  # of which there is none before the last, and no memory for what it would keep
            self._forward_backward(batch, 1.0, last)
            if last:
                self.optimizer.zero_grad()

        def refusing(fault: str | None) -> bool:
            world.refuse_first(fault)
            return False

        def validate() -> None:
            held_out_loss(self.model, splits, token_bytes, config.batches, world, one_batch, refusing)
            reshard(self.model)

        def save(folder: Path) -> float:
            with Saver(folder, world.rank, world.size, world.saving) as saver:
                stall = saver.begin(0, self._tensors(), {})
                world.alike(saver.wait)
            return stall

        rehearses = config.preflight and self.state["step"] == 0
        if rehearses or config.compile or world.size > 1:
            micro_step(True)
        if rehearses:
            done = rehearse(micro_step, validate if splits else None, save, self.folder.checkpoints, world)
            self.log.say(done.describe(self.micro_steps, config.num_steps))

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": trained_tensors(self.model), "optimizer": self.optimizer.state_tensors()}

    def run(self) -> bool:
        """Plan, rehearse, train, and leave `final/`. Returns whether it came to its end: False where a signal stopped it."""
        world = self.world
        world.on_main(self._announce)
        if self.state["step"] < self.config.num_steps:
            self._prepare()
        world.on_main(lambda: self.log.begin(self.state["step"]))
        with self.log.progress(self.state["step"], self.config.num_steps), self.saver, self.watchdog:
            finished = self.train()
            self._finish_save()
        self.log.draw()
        self._refuse_faults()
        if finished:
            world.on_main(self._save_final)
        return finished

    def _save_final(self) -> None:
        """Write `final/` from the checkpoint of the last step, or of the best, one file at a time."""
        step, best = self.state["step"], self.state["best"]
        if self.config.final == "best" and best is not None and best["step"] != step:
            step = best["step"]
            self.log.say(
                f"final is the checkpoint of step {step}, of the lowest validation loss: {best['loss']:.4f}"
            )
        checkpoint = self.folder.load(self.folder.checkpoint(step))
        save_final(
            self.folder.final,
            self.model,
            checkpoint,
            self.config,
            self.start,
            self.identity["start"],
            self.data.tokenizer,
        )
        self.log.say(f"final model: {self.folder.final}")


def _select_kernels(name: str, device: torch.device, head_dim: int) -> Ops:
    try:
        return select(name, device, head_dim)
    except ValueError as error:
        raise UserError(str(error)) from error


def _seed(seed: int, device: torch.device) -> None:
    """Not torch.manual_seed, which also formats a stack trace for every kind of device that is not in use: half a millisecond a step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def train(config: TrainConfig, paths: Paths, device: str = "auto") -> int:
    """Run a training from start to end on this process's share.

    Returns:
        The process's exit code: 0, or 128 + the signal that ended it.
    """
    with (
        StopSignal() as stop,
        process_group(device, config.parallel, stop, config.step_timeout_seconds) as world,
        RunFolder(paths.output_dir) as folder,
    ):
        trainer: Trainer | None = None
        claimed = finished = False

        def report(status: Status, **more: str) -> None:
            if world.is_main and claimed:
                write_status(folder.path, status, trainer.state["step"] if trainer else 0, **more)

        try:
            world.on_main(lambda: _check(config, paths, world))
            world.on_main(lambda: _claim(folder, paths.resume))
            claimed = True
            world.on_main(lambda: report("running"))
            trainer = Trainer(config, paths, world)
            finished = trainer.run()
        except Interrupted:
            pass
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk has no room for that either
                report("failed", message=str(error))
            raise
        number = 0 if finished else world.signal()
        name = signal.Signals(number).name if number else ""
        _, fault = attempt(lambda: report("finished") if finished else report("preempted", signal=name))
        if world.is_main and not finished:
            after = f" after step {trainer.state['step']}" if trainer else ""
            tqdm.write(f"stopped by {name}{after}; go on with --resume-from-checkpoint auto")
        if fault := world.from_main(
            fault
        ):  # when one process leaves, torchrun ends the others: not before the status is written
            world.refuse(fault)
        return 128 + number if number else 0


def _check(config: TrainConfig, paths: Paths, world: World) -> None:
    """Raises UserError where config, model and processes do not go together: in one process, before any work."""
    config, shape, _ = resolve(config, paths.model_path)
    check_tensor_parallel(
        shape,
        config.batches.sequence_length,
        world.layout.tensor,
        config.lora is not None and config.lora.dora,
    )
    smallest = with_micro_batch(config, 1) if config.batches.micro_batch_size == "auto" else config
    smallest.batches.micro_steps(world.layout.data)
    _select_kernels(config.kernels, world.device, shape.head_dim)


def _claim(folder: RunFolder, resume: str | None) -> None:
    for name in folder.claim(resume, tqdm.write):
        tqdm.write(f"removed {name}, left by a run that was interrupted")
