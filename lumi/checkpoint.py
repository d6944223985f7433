"""Checkpoints that are whole or absent, and exact resume.

    step-00001000/
        model.safetensors  optimizer.safetensors  state.json
        manifest.json      every file's size and SHA-256; written last

Safetensors and JSON only: nothing on the load path can run code.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lumi.config import UserError, read_json, write_json
from lumi.storage import TEMPORARY_PREFIX, atomic_folder, check_file, file_record

_NAME = re.compile(r"step-(\d{8})")
_REMEDY = "delete this checkpoint and resume from an older one: --resume-from-checkpoint PATH"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by file (`model`, `optimizer`) and plain JSON values (`step` among them)."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(folder: str | Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-XXXXXXXX`, atomically: a kill at any moment leaves the earlier checkpoints whole.

    Returns its path. Raises UserError where the disk is full or cannot be written.
    """
    path = Path(folder) / f"step-{step:08d}"
    try:
        with atomic_folder(path, replace=True) as temporary:  # a run resumed from an earlier step writes this one again
            for name, tensors in checkpoint.tensors.items():
                save_tensors(temporary / f"{name}.safetensors", tensors)
            write_json(temporary / "state.json", {"step": step, **checkpoint.state})
            files = sorted(file.name for file in temporary.iterdir())
            write_json(temporary / "manifest.json", {"format": 1, "files": {name: file_record(temporary / name) for name in files}})
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be written: {reason}; earlier checkpoints are intact, resume from them") from error
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint back, every byte checked against the manifest.

    Raises:
        UserError: if the manifest is missing or any file differs from it; names the file and what to do.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: must be a checkpoint folder with a manifest.json, and has none; pass .../checkpoints/step-XXXXXXXX")
    records = _records(path / "manifest.json")
    for name, record in records.items():
        check_file(path / name, record, remedy=_REMEDY)
    tensors = {Path(name).stem: load_tensors(path / name) for name in records if name.endswith(".safetensors")}
    return Checkpoint(tensors, read_json(path / "state.json"))


def _records(manifest: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by file name. Raises UserError where the manifest is not as `save_checkpoint` writes it."""
    data = read_json(manifest)
    try:
        files = data["files"]
        whole = data["format"] == 1 and all(set(record) == {"size", "sha256"} for record in files.values())
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{manifest}: must give every file's size and SHA-256, and does not: it is corrupt; {_REMEDY}")
    return files


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name) and (path / "manifest.json").is_file()]
    return sorted(found)


def step_of(path: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: str | Path, keep_last: int, best: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one of step `best`."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if step_of(path) != best:
            discard_checkpoint(path)


def discard_checkpoint(path: Path) -> None:
    """Delete a checkpoint: at any moment it is whole, or litter that is swept."""
    litter = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-discarded")
    os.rename(path, litter)
    shutil.rmtree(litter)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, in the order of their names, with what others expect in the metadata, and `metadata`."""
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    path.touch()
    mode = path.stat().st_mode  # follows the umask; safetensors would leave the file readable by its owner alone
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError if it is not one."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: must be a safetensors file: {error}") from error
