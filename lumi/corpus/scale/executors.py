"""Stages of work on datatrove's executors: tasks on this machine, or array jobs of Slurm.

No other file imports datatrove. Its own pool of processes waits for ever when one of them is killed, and its
manager process outlives a killed parent. So a task here runs in a process of `Workers`, without that pool.
"""

import contextlib
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from lumi.command_line import extra
from lumi.config import UserError
from lumi.corpus.scale.prepare import Executor, parse_sbatch
from lumi.corpus.scale.stages import Stage, tasks_of_stages
from lumi.host.progress import progress_bar
from lumi.host.workers import Workers, num_cores

with extra("scale"), open(os.devnull, "w") as _nowhere, contextlib.redirect_stderr(_nowhere):
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.utils.logging import logger

logger.remove()  # it would print to stderr; each task has a log file of its own


class TaskWork(Protocol):
    """What is to be done: `folder` holds the plan that every task reads, `logs` a folder for each stage."""

    @property
    def folder(self) -> Path: ...

    @property
    def logs(self) -> Path: ...


Load = Callable[[str], TaskWork]  # the folder of a plan -> the work, of a module so that it can be sent


class Step:
    """A stage as a step of datatrove's pipelines. Slurm's jobs get it as a pickle, so it holds only names.

    Args:
        stage, run: its name and its function.
        load, folder: how and from where a task reads the work.
        console: where the stage's own warnings go; None: to stderr, as datatrove's messages do.
    """

    def __init__(
        self,
        stage: str,
        run: Callable[[Any, int, int], None],
        load: Load,
        folder: Path,
        console: TextIO | None = None,
    ) -> None:
        self.stage, self.run, self.load, self.folder, self.console = stage, run, load, str(folder), console

    def __repr__(self) -> str:
        return f"{self.stage} {self.folder}"

    def __call__(self, _data: Any, rank: int, world_size: int) -> None:
        with contextlib.redirect_stderr(self.console or sys.stderr):
            self.run(self.load(self.folder), rank, world_size)


class _LocalTask(LocalPipelineExecutor):
    """One task in this process."""

    def run(self) -> None:
        self._run_for_rank(self.local_rank_offset)


def run_stages(
    work: TaskWork, stages: Mapping[str, Stage], load: Load, executor: Executor, output: Path
) -> bool:
    """Run all stages, which make `output`. Returns False if they were submitted to Slurm, and says so.

    Arguments and errors as those of `run_locally` and `submit`.
    """
    num_tasks, num_workers = executor.num_tasks, executor.num_workers
    if executor.kind == "slurm":
        jobs = submit(work, stages, load, num_tasks, num_workers, parse_sbatch(executor.sbatch))
        print(f"Slurm has jobs {', '.join(jobs)}; the last makes {output}; logs: {work.logs}")
        return False
    run_locally(work, stages, load, num_tasks, num_workers or num_cores())
    return True


def run_locally(
    work: TaskWork, stages: Mapping[str, Stage], load: Load, num_tasks: int, num_workers: int
) -> None:
    """Run all stages in processes, one stage after the other, a progress line for each.

    Args:
        stages: by their names, in their order.
        load: how a task reads the work from its folder.
        num_tasks: into how many tasks a stage is cut.
        num_workers: tasks at a time.

    Raises:
        UserError: that of a task. All others are ended then.
    """
    with Workers(_run_task, (load, work.folder), min(num_workers, num_tasks)) as workers:
        try:
            for name, count in tasks_of_stages(stages, work, num_tasks).items():
                run = stages[name].run
                with progress_bar(name, " tasks", total=count) as bar:
                    for _ in workers.map((name, run, rank, count) for rank in range(count)):
                        bar.update()
        except BaseException:
            for process in multiprocessing.active_children():  # a task may last for hours
                process.terminate()
            raise


def _run_task(shared: tuple[Load, Path], task: tuple[str, Callable[[Any, int, int], None], int, int]) -> None:
    (load, folder), (stage, run, rank, count) = shared, task
    executor = _LocalTask(
        [Step(stage, run, load, folder, console=sys.stderr)],
        tasks=count,
        local_tasks=1,
        local_rank_offset=rank,
        logging_dir=str(load(str(folder)).logs / stage),
        skip_completed=False,  # a task knows which of its files are there, also from another number of tasks
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            executor.run()
        finally:
            logger.remove()


class _SlurmStage(SlurmPipelineExecutor):
    """An array job for a stage, without the job that would add up datatrove's statistics: there are none."""

    def launch_merge_stats(self) -> None:
        pass


def submit(
    work: TaskWork,
    stages: Mapping[str, Stage],
    load: Load,
    num_tasks: int,
    num_workers: int | None,
    options: Mapping[str, str],
) -> list[str]:
    """Submit an array job for each stage, which waits for the one before; the numbers of the jobs.

    Args:
        stages, load: as in `run_locally`.
        num_tasks: into how many tasks a stage is cut.
        num_workers: tasks of an array that run at a time; None: as many as Slurm lets.
        options: of sbatch, by name: partition, time and others.

    Raises:
        UserError: sbatch refuses a job, or there is none.
    """
    jobs: list[_SlurmStage] = []
    for stage, count in tasks_of_stages(stages, work, num_tasks).items():
        jobs.append(
            _SlurmStage(
                [Step(stage, stages[stage].run, load, work.folder)],
                tasks=count,
                time=options["time"],
                partition=options["partition"],
                workers=num_workers or -1,
                job_name=f"lumi-{stage}",
                qos=None,
                env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
                sbatch_args=dict(options),
                depends=jobs[-1] if jobs else None,
                logging_dir=str(work.logs / stage),
                skip_completed=False,
            )
        )
    try:
        jobs[-1].run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            "--executor slurm",
            "must run where sbatch takes jobs",
            got=error,
            remedy="run it on a login node, with --sbatch options that the cluster knows",
        ) from error
    return [job.job_id for job in jobs]
