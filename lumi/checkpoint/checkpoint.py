"""Checkpoints: whole or absent, written in pieces by all processes, readable by any other number of them.

    step-00001000/
        model-00000.safetensors  optimizer-00000.safetensors   the pieces of process 0; and so on
        tensors.json  state.json  manifest.json                see `lumi.checkpoint.manifest`

Safetensors and JSON only: nothing on the load path can run code. `lumi.checkpoint.saver` writes them.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lumi.checkpoint.manifest import MANIFEST, REMEDY, Groups, SavedTensor, dtype_name, read_contents
from lumi.config import UserError
from lumi.host.provenance import Parent
from lumi.host.storage import check_file, discard_folders, sha256_file
from lumi.parallel.tensor_pieces import fill

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: `state` holds its plain values, the tensors stay on disk until they are read.

    groups: "model" and "optimizer", each with its tensors by name. records: size and SHA-256 of the tensor
    files.
    """

    path: Path
    state: dict[str, Any]
    groups: Groups
    records: dict[str, dict[str, Any]]
    _opened: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # mapped into memory

    @property
    def as_parent(self) -> Parent:
        """The checkpoint as what something is made from. Its manifest holds the hashes of all it has."""
        return Parent("checkpoint", self.path, sha256_file(self.path / MANIFEST))

    def verify(self, part: int = 0, parts: int = 1, group: str = "") -> None:
        """Compare the bytes of the tensor files with the manifest: of all, of one share, of one group.

        Raises:
            DamagedError: naming the file that is corrupt, and what to do.
            OSError: one cannot be read now.
        """
        names = [name for name in sorted(self.records) if name.startswith(group)]
        for name in names[part::parts]:
            check_file(self.path / name, self.records[name], remedy=REMEDY)

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """The whole shapes of a group's tensors. Raises UserError where there is no such group."""
        return {name: saved.shape for name, saved in self._group(group).items()}

    def fill(self, group: str, targets: Mapping[str, Tensor]) -> None:
        """Read a group into tensors of the same names, in place; of a DTensor the part of this process.

        Raises:
            UserError: names, shapes or types are not those of the targets; then none of them was changed.
        """
        saved = self._group(group)
        self._check_targets(group, saved, targets)
        with torch.no_grad():
            for name, target in targets.items():
                fill(target, saved[name].boxes, self._reader(name, saved[name]))

    def _check_targets(
        self, group: str, saved: dict[str, SavedTensor], targets: Mapping[str, Tensor]
    ) -> None:
        remedy = "resume with the config that wrote it"
        for name in sorted(saved.keys() ^ targets.keys()):
            subject = f"{self.path}: {group} tensor {name!r}"
            if name in targets:
                raise UserError(subject, "must be in the checkpoint", got="none", remedy=remedy)
            only = f"one of shape {saved[name].shape} only here"
            raise UserError(subject, "must be in the model", got=only, remedy=remedy)
        for name, target in targets.items():
            expected, shape = dtype_name(target.dtype), tuple(target.shape)
            if (saved[name].dtype, saved[name].shape) != (expected, shape):
                raise UserError(
                    f"{self.path}: {group} tensor {name!r}",
                    f"must be {expected} of shape {shape}",
                    got=f"{saved[name].dtype} of {saved[name].shape}",
                    remedy=remedy,
                )

    def read(self, group: str, name: str) -> Tensor:
        """One whole tensor, on the CPU. Raises KeyError where there is none of that name."""
        saved = self._group(group)[name]
        tensor = torch.empty(saved.shape, dtype=getattr(torch, saved.dtype))
        fill(tensor, saved.boxes, self._reader(name, saved))
        return tensor

    def tensors(self, group: str) -> Mapping[str, Tensor]:
        """A group's tensors by name, each read when it is asked for and then forgotten."""
        return _ReadOnDemand(self, group)

    def _group(self, group: str) -> dict[str, SavedTensor]:
        if group not in self.groups:
            subject, got = f"{self.path}:", sorted(self.groups)
            raise UserError(subject, f"must hold tensors of {group!r}", got=got, remedy=REMEDY)
        return self.groups[group]

    def _reader(self, name: str, saved: SavedTensor) -> Callable[[int, tuple[slice, ...]], Tensor]:
        """Reads a part of a piece: by its index and slices."""

        def read_slice(index: int, slices: tuple[slice, ...]) -> Tensor:
            file, box = self.path / saved.files[index], saved.boxes[index]
            try:
                if file.name not in self._opened:
                    self._opened[file.name] = safetensors.safe_open(file, framework="pt")
                view = self._opened[file.name].get_slice(name)
                shape, part = tuple(view.get_shape()), view[slices]
            except (safetensors.SafetensorError, OSError) as error:
                expectation = f"must be a safetensors file with {name!r}: {error}"
                raise UserError(f"{file}:", expectation, remedy=REMEDY) from error
            dtype = dtype_name(part.dtype)
            if (dtype, shape) != (saved.dtype, box.shape):
                subject, expectation = f"{file}: {name!r}", f"must be {saved.dtype} of {box.shape}"
                raise UserError(subject, expectation, got=f"{dtype} of {shape}", remedy=REMEDY)
            return part

        return read_slice


class _ReadOnDemand(Mapping[str, Tensor]):
    def __init__(self, checkpoint: Checkpoint, group: str):
        self._checkpoint, self._group, self._shapes = checkpoint, group, checkpoint.shapes(group)

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read(self._group, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: check its JSON against the manifest, and the sizes of its tensor files.

    The bytes of the tensor files are not read here: `Checkpoint.verify` does that.

    Raises:
        DamagedError: a file differs from the manifest, or is malformed; names the file and what to do.
        UserError: there is no manifest, it is of another format, or it cannot be read now.
        OSError: another file cannot be read now.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        expectation = "must be a checkpoint folder with a manifest.json, and has none"
        raise UserError(f"{path}:", expectation, remedy="pass .../checkpoints/step-XXXXXXXX")
    contents = read_contents(path)
    return Checkpoint(path, contents.state, contents.groups, contents.records)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Raises OSError where a folder cannot be read now."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    paths = [Path(folder, name) for name in names if _NAME.fullmatch(name)]
    return [path for path in paths if (path / MANIFEST).is_file()]


def step_of(path: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: str | Path, keep_last: int, best: int | None) -> list[str]:
    """Delete all checkpoints except the newest `keep_last` and step `best`; returns as `discard_folders`."""
    old = list_checkpoints(folder)[:-keep_last]
    return discard_folders(folder, [path.name for path in old if step_of(path) != best])
