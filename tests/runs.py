"""Trainings of a few seconds in processes of their own: config, start, and what they leave."""

import os
import subprocess
import time
from pathlib import Path

from lumi.training.metrics import read_metrics

CONFIG = {
    "model": {
        "vocab_size": 384,
        "num_layers": 2,
        "model_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
        "max_positions": 128,
    },
    "batches": {"sequence_length": 32, "batch_tokens": 256, "micro_batch_size": 2},
    "optimizer": {"kind": "muon", "peak_lr": 0.01, "schedule": {"kind": "cosine", "warmup_steps": 0}},
    "num_steps": 12,
    "dtype": "float32",
    "validate_every": 4,
    "save_every": 4,
    "keep_last": 2,
    "preflight": False,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def merged(changes, base=CONFIG):
    data = dict(base)
    for key, value in changes.items():
        data[key] = merged(value, data.get(key, {})) if isinstance(value, dict) else value
    return data


def launch(command, expect=0):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def wait_for_step(metrics, step, *processes):
    """Wait until `step` or a later one is logged; the processes must be alive all the time."""
    deadline = time.monotonic() + 90
    while not (metrics.exists() and any(record["step"] >= step for record in read_metrics(metrics))):
        assert all(process.poll() is None for process in processes), "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def touch_picture(metrics, picture, title, unit):
    """What tests put in the place of `draw_loss`, which takes longer than most of their runs."""
    Path(picture).touch()


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]


def final_weights(folder):
    return (folder / "final" / "model.safetensors").read_bytes()
