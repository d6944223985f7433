"""One training run on one process: its parts, and the one loop."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lumi.checkpoint.saver import Saver
from lumi.config import UserError, to_dict, write_json
from lumi.data.batches import Batch
from lumi.formats.hf_config import save_tokenizer
from lumi.host.devices import peak_flops
from lumi.host.storage import atomic_folder
from lumi.kernels.wide_float import wide_float
from lumi.parallel.sharding import gradient_sync, parallelize
from lumi.parallel.watchdog import Watchdog
from lumi.parallel.world import World
from lumi.training.loss_scale import LossScale
from lumi.training.loss_spikes import LossSpikes
from lumi.training.objective import make_objective
from lumi.training.optimizer import Optimizer
from lumi.training.pending_outcome import PendingOutcome, runs_behind
from lumi.training.plan import describe_plan
from lumi.training.preflight import rehearse
from lumi.training.prepared_batch import prepared
from lumi.training.resolved_run import ResolvedRun
from lumi.training.resume import run_identity
from lumi.training.run_checkpoints import RunCheckpoints
from lumi.training.run_data import RunData, StepInput
from lumi.training.run_folder import RunFolder
from lumi.training.run_log import RunLog
from lumi.training.run_model import build
from lumi.training.run_status import write_status
from lumi.training.schedule import lr_at
from lumi.training.skipped_steps import report_skipped, too_many_skipped
from lumi.training.train_state import StepOutcome, TrainState
from lumi.training.validation import Validation
from lumi.training.weight_average import WeightAverage


class Trainer:
    """Everything that one run holds on one process. `run_to_the_end` is the whole run, `train` its loop."""

    def __init__(self, run: ResolvedRun, world: World, folder: RunFolder):
        config, start = run.config, run.start
        self.run, self.world, self.folder = run, world, folder
        self.log = RunLog(folder, world.is_main, "token" if config.dpo is None else "pair")
        found = folder.find(run.paths.resume, world, self.log.say)
        self.data = RunData(config, run.paths, world)
        with world.fail_together():
            identity = run_identity(config, start, self.data)  # of the weights before they are read
        with world.fail_together():
            self.model = build(config, run.shape, start, self.data.tokenizer, run.ops)
        for layer in self.model.layers if config.compile else ():
            layer.compile()
        weights = self.model.initial_weights(config.seed) if start is None else None
        self.parallel_model = parallelize(self.model, world, config.parallel.reduce_dtype, weights)
        with world.fail_together():
            self.optimizer = Optimizer(self.model, config.optimizer)
        decay = config.ema_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        self.state = TrainState(
            validation_due=start is not None and bool(self.data.validation),  # what fine-tuning begins at
            loss_scale=LossScale(config.dtype),
            spikes=LossSpikes(config.max_loss_sigmas),
        )
        self.pending: PendingOutcome | None = None
        self.objective = make_objective(
            run, identity["start"], self.data, self.model, world, folder, self.log
        )
        self.checkpoints = RunCheckpoints(
            run,
            world,
            folder,
            self.log,
            self.model,
            self.optimizer,
            self.average,
            identity,
            self.data.parents(),
        )
        self.checkpoints.restore(found, self.state)
        saver = self.checkpoints.saver
        self.watchdog = Watchdog(
            world.patient, config.step_timeout_seconds, self._report_hang, lambda: saver.progress
        )
        self.validation = Validation(config, self.data, self.model, self.objective, world, self.watchdog)
        peak = peak_flops(world.device)
        self.peak_flops = peak and peak * world.size
        flops = run.shape.flops_per_token(config.batches.sequence_length, frozen=config.lora is not None)
        self.flops_share = self.peak_flops and flops / self.peak_flops

    def run_to_the_end(self) -> bool:
        """Plan, rehearse, train, and leave `final/`. Returns False where a signal ended the run early."""
        step, num_steps = self.state.step, self.run.config.num_steps
        self._announce()
        if step < num_steps:
            self._prepare()
        with self.world.fail_together(interruptible=True):
            if self.world.is_main:
                self.log.begin(step, self.run.config.trackers, to_dict(self.run.config))
        with self.log.progress(step, num_steps), self.checkpoints, self.watchdog:
            try:
                finished = self.train()
            except (UserError, SystemExit):  # no fault of the device's: the log ends with the last step
                self.settle()
                raise
            with self.watchdog.patience("saving"):
                self.checkpoints.finish()
        self.log.draw()
        with self.world.fail_together():
            self.log.check()
        if finished:
            self.checkpoints.write_final(self.state, self.data.tokenizer)
        return finished

    def train(self) -> bool:
        """The one training loop: from the step after `state.step` to the last.

        Returns False where a signal ended it early.
        """
        config, world, state = self.run.config, self.world, self.state
        if state.validation_due:
            self.validate()
            state.note_best(self.checkpoints.saved_step)
        for step_input in self.inputs():
            step = step_input.step
            with world.fail_together():
                batches = step_input.batches()
                self.log.check()
                self.checkpoints.check()
            num_targets, stopping = self.agree(batches)
            if stopping:
                self.settle()
                self.save()
                return False
            _seed(config.seed, step, world)  # what a step draws depends on nothing before it
            # DDP and FSDP2 average gradients over the groups that read different rows; `layout.data` undoes
            # that.
            dloss = state.loss_scale.value * world.layout.data / num_targets
            sums: list[Tensor] = []
            for index, batch in enumerate(batches, start=1):
                self.watchdog.mark(step, f"micro-step {index} of {len(batches)}")
                sums.append(self.forward_backward(batch, dloss, last=index == len(batches)))
            self.watchdog.mark(step, "optimizer")
            means = torch.stack(sums).sum(dim=0).to(wide_float(world.device))
            means = world.sum_on_device(means) / num_targets
            clip = self.optimizer.measure_gradients(state.loss_scale.value)
            # The device judges the step, and the host hears of it later.
            judged = clip.only_if(means[0].isfinite() & (means[0] <= state.spikes.limit))
            lr = lr_at(step, config.num_steps, config.optimizer.peak_lr, config.optimizer.schedule)
            self.optimizer.step(lr, judged)
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update(judged.accepted)
            self.end_step(
                PendingOutcome(
                    step=step,
                    lr=lr,
                    num_targets=num_targets,
                    measures=self.objective.measures,
                    means=means,
                    gradient_norm=clip.norm,
                    accepted=judged.accepted,
                    micro_losses=torch.stack(sums)[:, 0],
                )
            )
        if self.checkpoints.saved_step is None:
            self.save()  # no step was left to do; final/ is written from a checkpoint of this run
        return not state.validation_due  # a signal cut the last one short

    def inputs(self) -> Iterator[StepInput]:
        """The steps to do. The log keeps how long the loop waited for their data."""
        steps = range(self.state.step + 1, self.run.config.num_steps + 1)
        rows = [self.run.rows(self.world.data_rank, index) for index in range(self.run.micro_steps)]
        inputs = self.data.inputs(steps, rows, self.prepared)
        for step in steps:
            self.watchdog.mark(step, "waiting for data")
            with self.log.meter.waiting():
                step_input = next(inputs)
            # Whoever has its data stands at a later mark than whoever still waits for it: the watchdog blames
            # the earliest.
            self.watchdog.mark(step, "counting targets")
            yield step_input

    def prepared(self, batch: Batch) -> Batch:
        """A micro-batch with all that the host can do for it before its turn."""
        return prepared(batch, self.model, self.world.device)

    def agree(self, batches: Sequence[Batch]) -> tuple[int, bool]:
        """The targets (or pairs) of a step over all processes, and whether a signal came to any of them."""
        mine = sum(batch.num_targets for batch in batches)
        targets, stopping = self.world.sum(mine, self.world.stop.received)
        return round(targets) // self.world.layout.tensor, stopping > 0

    def forward_backward(self, batch: Batch, dloss: float, last: bool) -> Tensor:
        """One micro-step.

        Gradients are exchanged in the last one of a step. Returns the sums of the objective.
        """
        batch = batch.to(self.world.device)
        with gradient_sync(self.parallel_model, enabled=last):
            loss, sums = self.objective(self.parallel_model, batch, dloss)
            (loss * dloss).backward()
        return sums

    def end_step(self, pending: PendingOutcome) -> None:
        """Take in and log the step before; this one too where something waits for it, such as a save."""
        config, step = self.run.config, pending.step
        self.watchdog.mark(step, "logging")
        self.settle()
        self.pending = pending
        saving = step % config.save_every == 0 or step == config.num_steps
        validating = self.data.validation and (saving or step % config.validate_every == 0)
        at_once = not runs_behind(self.world.device) or self.state.needs_outcome(config.max_skipped_steps)
        if at_once or saving or validating:
            self.settle()
        if validating:
            self.validate()
        if saving:
            self.save()

    def settle(self) -> None:
        """Take in and log the step that is pending, if one is."""
        if self.pending is None:
            return
        outcome, self.pending = self.pending.read(), None
        config, state, step = self.run.config, self.state, outcome.step
        state.end_step(outcome)
        mix = self.data.batches.mix(step) if len(self.data.stores) > 1 else None
        self.log.step(outcome, state.skipped_steps, mix, config.batches.batch_tokens, self.flops_share)
        if not outcome.accepted:
            report_skipped(outcome, self.run, self.data, self.world, self.log)
            if state.skipped_in_a_row >= config.max_skipped_steps:
                self._give_up(outcome)

    def validate(self) -> None:
        """The held-out loss of now. A signal cuts it short: it is due again when the run goes on."""
        step, result = self.state.step, self.validation.measure(self.state.step)
        self.state.end_validation(None if result is None else result.loss)
        if result is not None:
            self.log.write(step, "validation", **asdict(result))
            self.log.say(f"step {step}: validation loss {result.describe()}")
            self.log.draw()
        self.log.meter.read()  # validation takes no time of training's

    def save(self) -> None:
        """Begin a checkpoint of now, if there is none yet."""
        with self.watchdog.patience("saving"):
            stall = self.checkpoints.save(self.state)
        if stall is not None:
            self.log.write(self.state.step, "checkpoint", stall_seconds=round(stall, 4))
            self.log.meter.read()

    def _give_up(self, outcome: StepOutcome) -> None:
        """End the run with a checkpoint to inspect. Raises UserError."""
        self.save()
        with self.watchdog.patience("saving"):
            self.checkpoints.finish()
        with self.world.fail_together():
            checkpoint = self.folder.checkpoint(outcome.step)
            raise too_many_skipped(outcome, self.state.skipped_in_a_row, checkpoint)

    def _announce(self) -> None:
        """Keep config and tokenizer, and say what the run will do and need."""
        run, data = self.run, self.data
        with self.world.fail_together(interruptible=True):
            if not self.world.is_main:
                return
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.folder.config, to_dict(run.config))
            with atomic_folder(self.folder.tokenizer, replace=True) as temporary:
                save_tokenizer(temporary, data.tokenizer)
            plan = describe_plan(
                run.config,
                data.shares(),
                data.num_validation_tokens(),
                self.world.size,
                self.world.device,
                run.ops.name,
                self.peak_flops,
                run.num_trained,
            )
            self.log.say("\n".join([f"plan\n{plan}", *data.describe_conversations()]))

    def _prepare(self) -> None:
        """Before anything counts: a micro-step, which compiles, allocates, and settles the order in which DDP
        sums.

        A new run then rehearses all of its parts once (`lumi.training.preflight`).
        """
        config, run, world, step = self.run.config, self.run, self.world, self.state.step
        with world.fail_together():
            batch = self.prepared(self.data.batches.rows(step + 1, *run.rows(world.data_rank, 0)))

        def micro_step(last: bool) -> None:
            last = (
                last or run.micro_steps == 1
            )  # such a step has no memory for gradients that wait for the last one
            self.forward_backward(batch, 1.0, last)
            if last:
                self.optimizer.zero_grad()

        def save(folder: Path) -> float:
            with Saver(folder, world.rank, world.size, world.saving) as saver:
                stall = saver.begin(0, self.checkpoints.tensors(), {})
                with world.fail_together():
                    saver.wait()
            return stall

        rehearses = config.preflight and step == 0
        if rehearses or config.compile or world.size > 1:
            micro_step(True)
        if rehearses:
            validate = self.validation.rehearse if self.data.validation else None
            done = rehearse(micro_step, validate, save, self.folder.checkpoints, world)
            self.log.say(done.describe(run.micro_steps, config.num_steps))

    def _report_hang(self, message: str) -> None:
        write_status(self.folder.path, "failed", self.state.step, message=message)


def _seed(seed: int, step: int, world: World) -> None:
    """Seed what a step draws. torch.manual_seed would take 0.5 ms for devices that are not in use."""
    value = int(np.random.SeedSequence([seed, step, world.data_rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(value)
    if world.device.type == "cuda":
        torch.cuda.manual_seed(value)
    elif world.device.type == "mps":
        torch.mps.manual_seed(value)
