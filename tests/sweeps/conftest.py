import json

import numpy as np
import pytest
import trial_processes
from runs import CONFIG, merged
from written_runs import train_record, write_run

from lumi.config import from_dict
from lumi.sweeps.law_runs import LawRun
from lumi.sweeps.scaling_law import Law
from lumi.sweeps.settings import make_settings
from lumi.sweeps.sweep_config import SweepConfig
from lumi.training.run_config import TrainConfig


@pytest.fixture
def sweep_file(tmp_path):
    """Writes a sweep of learning rates; keywords are changes to it, `base` one to the training config."""

    def sweep_file(rates=(0.001, 0.01), base=None, **changes):
        (tmp_path / "base.json").write_text(json.dumps(merged(base or {}, CONFIG)))
        grid = {"kind": "grid", "values": {"optimizer.peak_lr": list(rates)}}
        path = tmp_path / "sweep.json"
        path.write_text(json.dumps({"config": "base.json", "search": grid} | changes))
        return path

    return sweep_file


@pytest.fixture
def settings_of(sweep_file):
    """The settings of a sweep; arguments as `sweep_file`."""

    def settings_of(*arguments, **changes):
        path = sweep_file(*arguments, **changes)
        config = from_dict(SweepConfig, json.loads(path.read_text()))
        return make_settings(config, path.parent / config.config)

    return settings_of


@pytest.fixture
def pretending(monkeypatch):
    """Trials are those of `trial_processes`."""
    import lumi.sweeps.trial_runner

    monkeypatch.setattr(lumi.sweeps.trial_runner, "begin", trial_processes.begin)


@pytest.fixture
def finished_run(tmp_path):
    """Writes the folder of a finished pre-training; returns its path and its number of parameters."""

    def finished_run(name, dim, steps, bits, held_out_bytes=999, folder=tmp_path, **changes):
        model = {"model_dim": dim, "mlp_dim": 2 * dim}
        config = merged({"num_steps": steps, "model": model, "batches": {"batch_tokens": 4096}} | changes)
        last = {"step": steps, "kind": "validation", "loss": 2.0, "bits_per_byte": bits}
        records = [train_record(steps, 2.0, tokens=4096 * steps), last | {"bytes": held_out_bytes}]
        path = write_run(folder / name, records, config)
        return path, from_dict(TrainConfig, config).model.num_parameters

    return finished_run


@pytest.fixture
def true_law():
    return Law(*map(np.float64, (0.8, 80.0, 0.34, 90.0, 0.28)))


@pytest.fixture
def law_runs(true_law):
    """Nine runs of the true law, with noise, at 5 FLOPs for each parameter and token."""
    generator, runs = np.random.default_rng(1), []
    for size in (10**6, 10**7, 10**8):
        for tokens in (10**8, 10**9, 10**10):
            loss = true_law.loss(size, tokens) * np.exp(generator.normal(0, 1e-3))
            common = {"path": None, "held_out_bytes": 9, "setting": "", "flops": 5.0 * size * tokens}
            runs.append(LawRun(num_parameters=size, tokens=tokens, bits_per_byte=float(loss), **common))
    return runs
