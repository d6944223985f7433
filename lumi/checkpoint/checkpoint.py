"""Checkpoints that are whole or absent, written in pieces by all processes, and read back by any other number of them.

    step-00001000/
        model-00000.safetensors  optimizer-00000.safetensors   the pieces that process 0 wrote, by tensor name; and so on
        tensors.json     type, shape, and pieces (file, offset, shape) of every tensor of every group
        state.json       plain values, `step` among them
        manifest.json    every file's size and SHA-256; written last

Safetensors and JSON only: nothing on the load path can run code. `lumi.checkpoint.saver` writes them.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lumi.config import UserError, read_json, write_json
from lumi.host.storage import DamagedError, check_file, discard_folders, file_record
from lumi.host.tensor_files import SAFETENSORS_TYPES
from lumi.parallel.tensor_pieces import Box, check_cover, fill

FORMAT = 2


_NAME = re.compile(r"step-(\d{8})")


_TENSOR_FILE = re.compile(r"[a-z]+-\d{5}\.safetensors")


_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", "tensors.json"


REMEDY = "resume from another one: --resume-from-checkpoint PATH, or auto for the newest that is whole"


class SavedTensor(NamedTuple):
    """Where a tensor lies: its type as torch names it ("float32"), its whole shape, and the file and box of each piece."""

    dtype: str
    shape: tuple[int, ...]
    files: tuple[str, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened: `state` holds its plain values, the tensors stay on disk until they are asked for.

    groups: "model" and "optimizer", each with its tensors by name. records: size and SHA-256 of the tensor files.
    """

    path: Path
    state: dict[str, Any]
    groups: dict[str, dict[str, SavedTensor]]
    records: dict[str, dict[str, Any]]
    _opened: dict[str, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # files, mapped into memory

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the bytes of the tensor files with the manifest: of one share of the files, where `parts` processes share the work.

        Raises:
            DamagedError: naming the file that is corrupt, and what to do.
            OSError: one cannot be read now.
        """
        for name in sorted(self.records)[part::parts]:
            check_file(self.path / name, self.records[name], remedy=REMEDY)

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """The whole shapes of a group's tensors. Raises UserError where there is no such group."""
        return {name: saved.shape for name, saved in self._group(group).items()}

    def fill(self, group: str, targets: Mapping[str, Tensor]) -> None:
        """Read a group into tensors of the same names, in place: of a DTensor the part that this process holds.

        Raises:
            UserError: names, shapes or types are not those of the targets; then none of them was changed.
        """
        saved = self._group(group)
        remedy = "resume with the config that wrote it"
        for name in sorted(saved.keys() ^ targets.keys()):
            where = (
                "in the checkpoint, got none"
                if name in targets
                else f"in the model, got one of shape {saved[name].shape} only here"
            )
            raise UserError(f"{self.path}: {group} tensor {name!r} must be {where}; {remedy}")
        for name, target in targets.items():
            expected, got = (
                (_name_of(target.dtype), tuple(target.shape)),
                (saved[name].dtype, saved[name].shape),
            )
            if got != expected:
                raise UserError(
                    f"{self.path}: {group} tensor {name!r} must be {expected[0]} of shape {expected[1]}, got {got[0]} of {got[1]}; {remedy}"
                )
        with torch.no_grad():
            for name, target in targets.items():
                fill(target, saved[name].boxes, self._reader(name, saved[name]))

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
            raise UserError(
                f"{self.path}: must hold tensors of {group!r}, got {sorted(self.groups)}; {REMEDY}"
            )
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
                raise UserError(
                    f"{file}: must be a safetensors file with {name!r}: {error}; {REMEDY}"
                ) from error
            if (_name_of(part.dtype), shape) != (saved.dtype, box.shape):
                raise UserError(
                    f"{file}: {name!r} must be {saved.dtype} of {box.shape}, got {_name_of(part.dtype)} of {shape}; {REMEDY}"
                )
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
    """Read a checkpoint's JSON, every byte checked against the manifest, and look that its tensor files are there in their sizes.

    Their bytes are another matter: `Checkpoint.verify`.

    Raises:
        DamagedError: a file differs from the manifest, or that is none; names the file and what to do.
        UserError: there is no manifest, it is of another format, or it cannot be read now.
        OSError: likewise of another file.
    """
    path = Path(path)
    if not (path / _MANIFEST).is_file():
        raise UserError(
            f"{path}: must be a checkpoint folder with a manifest.json, and has none; pass .../checkpoints/step-XXXXXXXX"
        )
    records = _read_manifest(path / _MANIFEST)
    for name in (_STATE, _TENSORS):
        if name not in records:
            raise DamagedError(
                f"{path / _MANIFEST}: must give the size and SHA-256 of {name}, and does not: it is corrupt; {REMEDY}"
            )
        check_file(path / name, records.pop(name), remedy=REMEDY)
    groups = _read_tensors(path / _TENSORS)
    sizes = _bytes_by_file(groups)
    for file in sorted(sizes.keys() ^ records.keys()):
        raise DamagedError(
            f"{path / file}: must stand in both {_MANIFEST} and {_TENSORS}: one of them is corrupt; {REMEDY}"
        )
    for file, record in records.items():
        check_file(path / file, record, remedy=REMEDY, check_hash=False)
        if sizes[file] > record["size"]:  # before anybody allocates as much
            raise DamagedError(
                f"{path / file}: must hold {sizes[file]} bytes of tensors, got a file of {record['size']}; {REMEDY}"
            )
    return Checkpoint(path, _read_json(path / _STATE), groups, records)


def _bytes_by_file(groups: dict[str, dict[str, SavedTensor]]) -> Counter[str]:
    """Bytes of the pieces that lie in each file."""
    sizes: Counter[str] = Counter()
    for saved in (saved for group in groups.values() for saved in group.values()):
        for file, box in zip(saved.files, saved.boxes, strict=True):
            sizes[file] += getattr(torch, saved.dtype).itemsize * math.prod(box.shape)
    return sizes


def _read_json(path: Path) -> Any:
    """Raises DamagedError where it is not JSON, UserError where it cannot be read."""
    try:
        return read_json(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise DamagedError(f"{error}; {REMEDY}") from error


def _read_manifest(manifest: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by file name. Raises DamagedError where it is not as `seal_checkpoint` writes it, UserError for another format."""
    data = _read_json(manifest)
    if isinstance(data, dict) and data.get("format") != FORMAT and "files" in data:
        raise UserError(
            f"{manifest}: format must be {FORMAT}, got {data.get('format')!r}; resume with the version of Lumi that wrote it"
        )
    try:
        files = data["files"]
        whole = all(set(record) == {"size", "sha256"} for record in files.values())
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DamagedError(
            f"{manifest}: must give every file's size and SHA-256, and does not: it is corrupt; {REMEDY}"
        )
    return files


def _read_tensors(file: Path) -> dict[str, dict[str, SavedTensor]]:
    """The tensors of every group, their pieces checked to be all of them. Raises DamagedError naming the tensor where they are not."""
    data = _read_json(file)
    where = ""
    try:
        groups: dict[str, dict[str, SavedTensor]] = {}
        for group, tensors in data.items():
            groups[group] = {}
            for name, entry in tensors.items():
                where = f" {group} tensor {name!r}:"
                groups[group][name] = _saved_tensor(entry)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"{file}:{where} must tell where a tensor lies: {error}; {REMEDY}") from error
    return groups


def _saved_tensor(entry: dict[str, Any]) -> SavedTensor:
    """Raises ValueError, KeyError or TypeError where the entry of a tensor is not as the saver writes it."""
    boxes = tuple(Box(_lengths(piece["offset"]), _lengths(piece["shape"])) for piece in entry["pieces"])
    files = tuple(piece["file"] for piece in entry["pieces"])
    saved = SavedTensor(entry["dtype"], _lengths(entry["shape"]), files, boxes)
    if saved.dtype not in map(_name_of, SAFETENSORS_TYPES):
        raise ValueError(f"dtype must be a type of torch's, got {saved.dtype!r}")
    for name in files:
        if not _TENSOR_FILE.fullmatch(name):  # a path could lead anywhere
            raise ValueError(f"file must be the name of a tensor file beside it, got {name!r}")
    check_cover(saved.shape, boxes)
    return saved


def _lengths(values: list[int]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"shapes and offsets must be lists of integers, got {values}")
    return tuple(values)


def describe(tensor: Tensor) -> dict[str, Any]:
    """What `tensors.json` says of a tensor, before its pieces are known."""
    return {"dtype": _name_of(tensor.dtype), "shape": list(tensor.shape), "pieces": []}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_file(group: str, rank: int) -> str:
    """Name of the file of the pieces of `group` ("model" or "optimizer") that process `rank` writes."""
    return f"{group}-{rank:05d}.safetensors"


def seal_checkpoint(
    folder: Path,
    state: dict[str, Any],
    groups: dict[str, dict[str, dict[str, Any]]],
    records: dict[str, dict[str, Any]],
) -> None:
    """Write the JSON of a checkpoint beside its tensor files, the manifest last.

    Args:
        groups: what `describe` gave of every tensor by group and name, with `pieces` filled in: `file`, `offset`, `shape`.
        records: size and SHA-256 of the tensor files.

    Raises:
        ValueError: the pieces are not the whole of a tensor.
    """
    for tensors in groups.values():
        for entry in tensors.values():
            _saved_tensor(entry)
    write_json(folder / _STATE, state)
    write_json(folder / _TENSORS, groups)
    written = {name: file_record(folder / name) for name in (_STATE, _TENSORS)}
    write_json(folder / _MANIFEST, {"format": FORMAT, "files": written | dict(sorted(records.items()))})


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Raises OSError where the folder is there, but cannot be read now."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [
        Path(folder, name)
        for name in names
        if _NAME.fullmatch(name) and (Path(folder, name) / _MANIFEST).is_file()
    ]


def step_of(path: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: str | Path, keep_last: int, best: int | None) -> list[str]:
    """Delete all but the newest `keep_last` checkpoints and the one of step `best`; returns as `discard_folders`."""
    return discard_folders(
        folder, [path.name for path in list_checkpoints(folder)[:-keep_last] if step_of(path) != best]
    )
