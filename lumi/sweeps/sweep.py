"""`lumi sweep`: a search over settings of a training, in one folder.

sweep.json  base.json                    what is searched, and the config that is changed
trials/000-seed0/                        a run folder for each setting and seed, with train.log
results.json  results.md  results.png    the table and the picture so far

The run folders are the only state. Which settings a rung gives up follows from them, so a sweep that was
killed goes on by being called again.
"""

import contextlib
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lumi.config import UserError, differences, load_config, read_json, to_dict, write_json
from lumi.data.token_cache import open_or_tokenize
from lumi.formats.hub import local_folder
from lumi.host.devices import choose_device
from lumi.host.interruption import StopSignal
from lumi.host.locks import lock_file
from lumi.host.storage import check_output, make_folder
from lumi.host.workers import num_cores
from lumi.sweeps.results import Row, describe, make_rows, write_results
from lumi.sweeps.results_picture import draw_results
from lumi.sweeps.settings import Setting, make_settings
from lumi.sweeps.sweep_config import Contenders, Halving, SweepConfig
from lumi.sweeps.trial import Trial
from lumi.sweeps.trial_runner import TrialRunner
from lumi.tokenizer.loading import load_tokenizer

CALL = "sweep.json"  # records what the folder is the sweep of


class Sweep:
    """The settings of a sweep and their trials."""

    def __init__(self, config: SweepConfig, settings: Sequence[Setting], output_dir: Path):
        self.config, self.settings, self.output_dir = config, settings, output_dir
        self.given_up: dict[int, int] = {}  # the rung, by the setting's index
        self.trials = {
            setting.index: [
                Trial(setting, seed, output_dir / "trials" / f"{setting.index:03d}-seed{seed}")
                for seed in config.seeds
            ]
            for setting in settings
        }

    def run(self, runner: TrialRunner) -> None:
        """Train rung by rung, until the last settings are finished or the runner is over."""
        contenders = list(self.settings)
        if isinstance(self.config.search, Contenders):
            runner.run((self.trials[setting.index][0] for setting in contenders), None)
            if runner.is_over:
                return
            contenders = self._best_of_each()
        halving = self.config.halving
        for rung in (*(halving.rungs if halving else ()), None):
            # The first seed of all comes first: if the time is short, no setting is without a result.
            by_seed = zip(*(self.trials[setting.index] for setting in contenders), strict=True)
            runner.run((trial for trials in by_seed for trial in trials), rung)
            if runner.is_over:
                return
            if rung is not None and halving is not None:
                contenders = self._best(contenders, rung, halving)

    def _best_of_each(self) -> list[Setting]:
        """The setting of each contender that goes on to the other seeds; its others keep the first one."""
        best: dict[str, tuple[float, Setting]] = {}
        for setting in self.settings:
            loss = self.trials[setting.index][0].progress().result
            if loss is not None and loss < best.get(setting.contender, (math.inf, setting))[0]:
                best[setting.contender] = loss, setting
        kept = [setting for _, setting in best.values()]
        for setting in self.settings:
            if setting not in kept:
                del self.trials[setting.index][1:]
        return kept

    def _best(self, contenders: Sequence[Setting], rung: int, halving: Halving) -> list[Setting]:
        """Those that go on from a rung. A setting with a trial that failed counts as the worst."""
        ranked = sorted(contenders, key=lambda setting: self._loss_at(setting, rung))
        kept = ranked[: halving.survivors(len(ranked))]
        given_up = [setting for setting in contenders if setting not in kept]
        self.given_up |= {setting.index: rung for setting in given_up}
        print(f"step {rung}: {len(kept)} of {len(ranked)} settings go on", flush=True)
        return [setting for setting in contenders if setting in kept]

    def _loss_at(self, setting: Setting, step: int) -> float:
        found = [trial.progress() for trial in self.trials[setting.index]]
        if any(progress.status == "failed" for progress in found):
            return math.inf
        return statistics.fmean(progress.validations.get(step, math.inf) for progress in found)

    def write(self) -> list[Row]:
        """Write the table so far."""
        rows = make_rows(self.trials.values(), self.given_up)
        write_results(rows, self.output_dir)
        return rows


def sweep(
    sweep_file: Path,
    data_dirs: Sequence[str],
    tokenizer_dir: str,
    output_dir: Path,
    *,
    processes: int | None = None,
    device: str = "auto",
) -> int:
    """Run a sweep, or go on with it.

    Args:
        sweep_file: JSON of a `SweepConfig`.
        processes: trainings at a time; None: one for each GPU, or else for each core.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The exit code: 0; 1 where no trial has a result; 128 + the signal that ended it.

    Raises:
        UserError: something was given that cannot be, or the folder is another sweep's.
    """
    started = time.monotonic()
    config = load_config(SweepConfig, sweep_file)
    base = sweep_file.parent / config.config
    settings = _settings(config, base, sweep_file)
    device = choose_device(device)
    if processes is None:
        processes = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device) or num_cores()
    if processes < 1:
        raise UserError("--processes", "must be at least 1", got=processes)
    _check_data(data_dirs, tokenizer_dir, settings)
    call = to_dict(config) | {"base": read_json(base), "tokenizer_dir": _absolute(tokenizer_dir)}
    call["data_dirs"] = [_absolute(folder) for folder in data_dirs]
    with _claimed(output_dir, call), StopSignal() as stop:
        write_json(output_dir / "base.json", call["base"])
        minutes = config.budget.minutes
        deadline = None if minutes is None else started + 60 * minutes
        paths = ["--data-dirs", *data_dirs, "--tokenizer-dir", tokenizer_dir, "--device", device]
        arguments = ["--config", str(output_dir / "base.json"), *paths]
        whole = Sweep(config, settings, output_dir)
        num_trials = len(settings) * len(config.seeds)
        print(f"{_plan(config, len(settings))}, {min(processes, num_trials)} at a time")

        def report(trial: Trial, event: str) -> None:
            print(f"{trial.folder.name}  {trial.setting.name}  {event}", flush=True)
            if event != "begun":
                whole.write()

        runner = TrialRunner(arguments, processes, device, stop, deadline, report)
        whole.run(runner)
        return _finish(whole, runner)


def _settings(config: SweepConfig, base: Path, sweep_file: Path) -> list[Setting]:
    try:
        return make_settings(config, base)
    except UserError as error:
        raise error.within(str(sweep_file)) from error


def _check_data(data_dirs: Sequence[str], tokenizer_dir: str, settings: Sequence[Setting]) -> None:
    """Raises UserError for data that would make every trial fail. Corpus folders are tokenized here, once."""
    tokenizer = load_tokenizer(local_folder(Path(tokenizer_dir), weights=False))
    stores = [open_or_tokenize(folder, tokenizer) for folder in data_dirs]
    if not any(store.has_split("validation") for store in stores):
        expectation = "must have a validation split, which the settings are compared by"
        raise UserError("--data-dirs", expectation, got=" ".join(data_dirs))
    for setting in settings:
        model = setting.config.model
        if model is not None and tokenizer.vocab_size > model.vocab_size:
            expectation = f"must be at least the tokenizer's {tokenizer.vocab_size} pieces"
            raise UserError("model.vocab_size", expectation, got=model.vocab_size)


@contextlib.contextmanager
def _claimed(output_dir: Path, call: dict[str, Any]) -> Iterator[None]:
    """Hold the folder of this sweep. Raises UserError where it is another's, or one is at work there."""
    check_output(output_dir, renamed=False)
    path = output_dir / CALL
    if path.is_file():
        if changed := _changes(read_json(path), call):
            got = f"other arguments ({'; '.join(changed[:3])})"
            remedy = "choose another --output-dir, or remove that one; only budget may change"
            raise UserError(f"{output_dir}:", "must be of the same sweep", got=got, remedy=remedy)
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        got = f"{output_dir}, which holds something else"
        raise UserError("--output-dir", "must be new, or a sweep's", got=got)
    make_folder(output_dir)
    try:
        lock = lock_file(output_dir / ".lock", 0.0, print)
    except BlockingIOError as error:
        got = f"{output_dir}, which {error.strerror} is writing to"
        raise UserError("--output-dir", "must be a folder that no sweep is at work in", got=got) from error
    try:
        write_json(path, call)
        yield
    finally:
        os.close(lock)


def _changes(before: Any, call: dict[str, Any]) -> list[str]:
    if not isinstance(before, dict):
        return [f"{CALL} holds no object"]
    return differences(before | {"budget": None}, call | {"budget": None})


def _finish(whole: Sweep, runner: TrialRunner) -> int:
    """Show what there is. Returns the exit code."""
    rows = whole.write()
    print(f"\n{describe(rows)}")
    if any(row.bits_per_byte is not None for row in rows):
        draw_results(rows, whole.output_dir / "results.png")
        print(f"wrote {whole.output_dir}/results.json, results.md and results.png")
    if number := runner.stop.received:
        print(f"stopped by {signal.Signals(number).name}; the same command goes on")
        return 128 + number
    if runner.is_over:
        print(f"the {whole.config.budget.minutes:g} minutes are over; the same command goes on")
        return 0
    return 0 if any(row.bits_per_byte is not None for row in rows) else 1


def _plan(config: SweepConfig, num_settings: int) -> str:
    settings, num_seeds = _count(num_settings, "setting"), len(config.seeds)
    if not isinstance(config.search, Contenders):
        return f"{settings} x {_count(num_seeds, 'seed')}"
    plan = f"{settings} of {_count(len(config.search.grids), 'contender')} x 1 seed"
    return plan if num_seeds == 1 else f"{plan}, then the best of each x {num_seeds - 1} more"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _absolute(path: str) -> str:
    """An existing path as it is from everywhere; anything else, such as a name on the hub, as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
