"""A checkpoint of a few numbers, saved, opened and tampered with."""

import json

import torch

from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.checkpoint.saver import Saver
from lumi.host.storage import file_record


def save(folder, step=1, value=1):
    """Save a checkpoint of two groups; returns its path."""
    tensors = {
        "model": {"w": torch.full((3, 5), float(value)), "v": torch.arange(3)},
        "optimizer": {"w/step": torch.tensor(2.0)},
    }
    with Saver(folder) as saver:
        saver.begin(step, tensors, {"note": value})
    return folder / f"step-{step:08d}"


def load(path):
    """Open a checkpoint, every byte checked."""
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    return checkpoint


def rewrite(path, name, change):
    """Change a JSON file of a checkpoint, and make the manifest fit, as a skilled forger would."""
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))
    if name != "manifest.json":
        record = {name: file_record(path / name)}
        rewrite(path, "manifest.json", lambda manifest: manifest["files"].update(record))
