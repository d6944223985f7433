"""`lumi prepare --executor`: the corpus of `lumi.corpus.prepare`, made by many tasks."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lumi.config import UserError
from lumi.corpus.evaluation_sets import read_evaluation_sets
from lumi.corpus.folder import Manifest, read_manifest
from lumi.corpus.output_folder import (
    discard_caches,
    earlier_corpus,
    full_disk_refused,
    interruptible,
    is_up_to_date,
    lock,
)
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.report import print_made, print_up_to_date, print_warnings
from lumi.corpus.scale.work import Work, load_work, plan_work
from lumi.corpus.source_outcomes import source_keys


def parse_sbatch(options: str) -> dict[str, str]:
    """`--partition=cpu --time=8:00:00 --exclusive` -> names and values. Raises UserError."""
    form, found = "must hold options as --name=value", {}
    try:
        given = shlex.split(options)
    except ValueError as error:
        raise UserError("--sbatch", form, got=f"{options!r}: {error}") from error
    for option in given:
        name, _, value = option.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name):
            raise UserError("--sbatch", form, got=option)
        found[name.removeprefix("--")] = value
    missing = [f"--{name}=..." for name in ("partition", "time") if not found.get(name)]
    if missing:
        raise UserError("--sbatch", f"must hold {' and '.join(missing)}", got=repr(options))
    return found


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Where the tasks run.

    Args:
        kind: in processes of this machine, or as array jobs of Slurm.
        num_tasks: into how many tasks each stage is cut.
        num_workers: tasks at a time; None: one for each usable core, on Slurm as many as it lets.
        sbatch: options of sbatch for Slurm's jobs.
    """

    kind: Literal["local", "slurm"]
    num_tasks: int
    num_workers: int | None = None
    sbatch: str = ""

    def __post_init__(self) -> None:
        for option, value in (("--tasks", self.num_tasks), ("--num-workers", self.num_workers)):
            if value is not None and value < 1:
                raise UserError(option, "must be at least 1", got=value)
        if self.kind == "slurm":
            parse_sbatch(self.sbatch)
        elif self.sbatch:
            raise UserError("--sbatch", "must be left out with --executor local", got=repr(self.sbatch))


def prepare_in_tasks(
    config: PrepareConfig, output_dir: str | Path, executor: Executor, *, use_cache: bool = False
) -> Manifest | None:
    """Make a corpus folder: the same bytes as `lumi.corpus.prepare`, for any number of tasks.

    Args:
        config, output_dir: as there.
        executor: where the tasks run.
        use_cache: go on from what an earlier or interrupted run left; otherwise begin anew.

    Returns:
        The manifest; None if the work was submitted to Slurm, whose last job makes the corpus.

    Raises:
        UserError: as there; datatrove is not installed; a dataset of the hub has a budget; sbatch refuses.
    """
    from lumi.corpus.scale import executors  # needs datatrove, and takes seconds
    from lumi.corpus.scale.stages import STAGES

    folder = Path(output_dir).absolute()
    sets = read_evaluation_sets(config.decontamination)
    work = plan_work(folder, config, source_keys(config, sets), sets)
    with interruptible(writes=True), full_disk_refused(folder):
        old = earlier_corpus(folder, config, use_cache)
        with lock(folder):
            if use_cache and old is not None and is_up_to_date(folder, old, work.inputs_key):
                print_up_to_date(folder, old)
                return old
            if not use_cache:
                _discard(work)
            work.save(sets)
            if not executors.run_stages(work, STAGES, load_work, executor, folder):
                return None
    manifest = read_manifest(folder)
    assert manifest is not None
    print_warnings(manifest)
    print_made(Path(output_dir), manifest)
    return manifest


def _discard(work: Work) -> None:
    discard_caches(work.output, work.caches)
    for folder in (work.folder, work.logs):
        shutil.rmtree(folder, ignore_errors=True)
