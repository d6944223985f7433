"""A training from start to end: signals, the group, the folder, the trainer, the exit code."""

import contextlib
import signal

from tqdm import tqdm

from lumi.host.interruption import Interrupted, StopSignal
from lumi.parallel.process_group import process_group
from lumi.parallel.world import World
from lumi.training.resolved_run import resolve_run
from lumi.training.run_config import Paths, TrainConfig
from lumi.training.run_folder import RunFolder
from lumi.training.run_status import Status, write_status
from lumi.training.trainer import Trainer


def train(config: TrainConfig, paths: Paths, device: str = "auto") -> int:
    """Run a training from start to end on this process's share.

    Returns:
        The process's exit code: 0, or 128 + the signal that ended it.

    Raises:
        UserError: on the main process; SystemExit with code 2 on the others.
    """
    with (
        contextlib.ExitStack() as at_the_end,
        StopSignal() as stop,
        process_group(device, config.parallel, stop, config.step_timeout_seconds) as world,
        RunFolder(paths.output_dir) as folder,
    ):
        trainer: Trainer | None = None
        claimed = finished = False

        def report(status: Status, **more: str) -> None:
            if world.is_main and claimed:
                write_status(folder.path, status, trainer.state.step if trainer else 0, **more)

        try:
            run = resolve_run(config, paths, world)
            _claim(folder, paths.resume, world)
            claimed = True
            with world.fail_together():
                report("running")
            trainer = Trainer(run, world, folder)
            # When signals end the process again, and the status is written.
            at_the_end.callback(trainer.log.finish_tracking)
            finished = trainer.run_to_the_end()
        except Interrupted:
            pass
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk has no room for that either
                report("failed", message=str(error))
            raise
        number = 0 if finished else max(world.gather(stop.received))
        name = signal.Signals(number).name if number else ""
        if world.is_main and not finished:
            after = f" after step {trainer.state.step}" if trainer else ""
            tqdm.write(f"stopped by {name}{after}; go on with --resume-from-checkpoint auto")
        with (
            world.fail_together()
        ):  # torchrun ends the others when one process leaves: first the status is written
            if finished:
                report("finished")
            else:
                report("preempted", signal=name)
        return 128 + number if number else 0


def _claim(folder: RunFolder, resume: str | None, world: World) -> None:
    with world.fail_together(interruptible=True):
        if world.is_main:
            for name in folder.claim(resume, tqdm.write):
                tqdm.write(f"removed {name}, left by a run that was interrupted")
