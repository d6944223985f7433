"""Run folders and sweeps -> the runs that a scaling law is fitted to."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lumi.config import UserError, from_dict, to_dict
from lumi.reporting.recorded_run import RecordedRun, read_runs
from lumi.sweeps.scaling_law import Points
from lumi.sweeps.sweep import CALL
from lumi.training.run_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LawRun:
    """A finished pre-training.

    Attributes:
        num_parameters: all of them, embeddings too.
        tokens: of training, repeated ones counted again.
        bits_per_byte: held out, at the end.
        held_out_bytes: that it was measured on.
        flops: of the whole training.
        setting: the config without its seed, as text.
    """

    path: Path
    num_parameters: int
    tokens: int
    bits_per_byte: float
    held_out_bytes: int
    flops: float
    setting: str

    @property
    def flops_per_product(self) -> float:
        """FLOPs for each parameter and token."""
        return self.flops / (self.num_parameters * self.tokens)


def find_runs(paths: Sequence[Path]) -> tuple[list[LawRun], int]:
    """The finished runs of run folders and sweeps, and how many trials of sweeps are not finished.

    Raises:
        UserError: a path is neither, a run is not finished or no pre-training, or runs were measured on
            different held-out text.
    """
    folders: list[Path] = []
    trials: set[Path] = set()
    for path in paths:
        inside = sorted((path / "trials").glob("*/metrics.jsonl")) if (path / CALL).is_file() else []
        folders += [file.parent for file in inside] or [path]
        trials |= {file.parent.resolve() for file in inside}
    recorded = read_runs(folders)
    left_out = [run for run in recorded if run.status != "finished" and run.path.resolve() in trials]
    runs = [_law_run(run) for run in recorded if run not in left_out]
    for run in runs[1:]:
        if run.held_out_bytes != runs[0].held_out_bytes:
            expectation = (
                f"must be measured on the {runs[0].held_out_bytes:,} held-out bytes of {runs[0].path}"
            )
            raise UserError(f"{run.path}:", expectation, got=f"{run.held_out_bytes:,} bytes")
    return runs, len(left_out)


def best_of_each(runs: Sequence[LawRun]) -> list[LawRun]:
    """The runs of the best setting for each size and number of tokens, by the mean of its seeds.

    The law is that of training done well: a learning rate that was too high says nothing of the size.
    """
    groups: dict[tuple[int, int], dict[str, list[LawRun]]] = {}
    for run in runs:
        settings = groups.setdefault((run.num_parameters, run.tokens), {})
        settings.setdefault(run.setting, []).append(run)
    best = [min(settings.values(), key=_mean_loss) for settings in groups.values()]
    return [run for group in best for run in group]


def points_of(runs: Sequence[LawRun]) -> Points:
    """The runs as what a law is fitted to."""
    columns = [(run.num_parameters, run.tokens, run.bits_per_byte) for run in runs]
    return Points(*np.array(columns, dtype=np.float64).reshape(-1, 3).T)


def _mean_loss(runs: Sequence[LawRun]) -> float:
    return statistics.fmean(run.bits_per_byte for run in runs)


def _law_run(run: RecordedRun) -> LawRun:
    if run.status != "finished":
        remedy = "let it go on, or leave it out"
        raise UserError(f"{run.path}:", "must be a finished run", got=run.status, remedy=remedy)
    if run.config is None:
        raise UserError(f"{run.path}:", "must have its config.json")
    config = from_dict(TrainConfig, dict(run.config), str(run.path / "config.json"))
    if config.model is None or config.lora is not None or config.dpo is not None:
        raise UserError(f"{run.path}:", "must be a pre-training, without lora and dpo")
    tokens = int(_figure(run, "tokens"))
    flops_per_token = config.model.flops_per_token(config.batches.sequence_length)
    return LawRun(
        path=run.path,
        num_parameters=config.model.num_parameters,
        tokens=tokens,
        bits_per_byte=_figure(run, "validation_bits_per_byte"),
        held_out_bytes=int(_figure(run, "validation_bytes")),
        flops=float(flops_per_token * tokens),
        setting=json.dumps(_without_seed(to_dict(config))),
    )


def _figure(run: RecordedRun, name: str) -> float:
    if name not in run.figures:
        what = name.removeprefix("validation_").replace("_", " ")
        where = "its last validation" if name.startswith("validation_") else "metrics.jsonl"
        raise UserError(f"{run.path}:", f"must have {what} in {where}", got="none")
    return run.figures[name]


def _without_seed(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key != "seed"}
