"""The JSON of a checkpoint: what stands in each file, and how a checkpoint is read and sealed.

tensors.json     type, shape, and pieces (file, offset, shape) of every tensor of every group
state.json       plain values, `step` among them
manifest.json    every file's size and SHA-256; written last
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumi.config import UserError, read_json, write_json
from lumi.host.storage import DamagedError, check_file, file_record
from lumi.host.tensor_files import SAFETENSORS_TYPES
from lumi.parallel.tensor_pieces import Box, check_cover

FORMAT = 2
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.json"
REMEDY = "resume from another one: --resume-from-checkpoint PATH, or auto for the newest that is whole"
_TENSOR_FILE = re.compile(r"[a-z]+-\d{5}\.safetensors")


class SavedTensor(NamedTuple):
    """Where a tensor lies: its dtype ("float32"), its whole shape, and the file and box of each piece."""

    dtype: str
    shape: tuple[int, ...]
    files: tuple[str, ...]
    boxes: tuple[Box, ...]


Groups = dict[str, dict[str, SavedTensor]]  # by group ("model", "optimizer") and tensor name


class Contents(NamedTuple):
    """What the JSON of a checkpoint says. `records`: size and SHA-256 of the tensor files, by name."""

    state: dict[str, Any]
    groups: Groups
    records: dict[str, dict[str, Any]]


def read_contents(folder: Path) -> Contents:
    """Read the JSON files, check every byte against the manifest, and compare the sizes of tensor files.

    Raises:
        DamagedError: a file differs from the manifest, or is malformed; names the file and what to do.
        UserError: the manifest is of another format, or cannot be read now.
        OSError: another file cannot be read now.
    """
    records = read_manifest(folder / MANIFEST)
    for name in (STATE, TENSORS):
        if name not in records:
            expectation = f"must give the size and SHA-256 of {name}, and does not: it is corrupt"
            raise DamagedError(f"{folder / MANIFEST}:", expectation, remedy=REMEDY)
        check_file(folder / name, records.pop(name), remedy=REMEDY)
    groups = _read_tensors(folder / TENSORS)
    sizes = _bytes_by_file(groups)
    for file in sorted(sizes.keys() ^ records.keys()):
        expectation = f"must stand in both {MANIFEST} and {TENSORS}: one of them is corrupt"
        raise DamagedError(f"{folder / file}:", expectation, remedy=REMEDY)
    for file, record in records.items():
        check_file(folder / file, record, remedy=REMEDY, check_hash=False)
        if sizes[file] > record["size"]:  # found before anybody allocates as much
            expectation = f"must hold {sizes[file]} bytes of tensors"
            got = f"a file of {record['size']}"
            raise DamagedError(f"{folder / file}:", expectation, got=got, remedy=REMEDY)
    return Contents(_read_json(folder / STATE), groups, records)


def _bytes_by_file(groups: Groups) -> Counter[str]:
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
        raise DamagedError(error.subject, error.expectation, got=error.got, remedy=REMEDY) from error


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by file name.

    Raises:
        DamagedError: the manifest is not as `seal_checkpoint` writes it.
        UserError: it is of another format.
    """
    data = _read_json(path)
    if isinstance(data, dict) and data.get("format") != FORMAT and "files" in data:
        remedy = "resume with the version of Lumi that wrote it"
        raise UserError(f"{path}: format", f"must be {FORMAT}", got=repr(data.get("format")), remedy=remedy)
    try:
        files = data["files"]
        whole = all(set(record) == {"size", "sha256"} for record in files.values())
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        expectation = "must give every file's size and SHA-256, and does not: it is corrupt"
        raise DamagedError(f"{path}:", expectation, remedy=REMEDY)
    return files


def _read_tensors(path: Path) -> Groups:
    """The tensors of every group. Raises DamagedError naming the first one that its pieces do not cover."""
    data = _read_json(path)
    where = ""
    try:
        groups: Groups = {}
        for group, tensors in data.items():
            groups[group] = {}
            for name, entry in tensors.items():
                where = f" {group} tensor {name!r}:"
                groups[group][name] = _saved_tensor(entry)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        subject = f"{path}:{where}"
        raise DamagedError(subject, f"must tell where a tensor lies: {error}", remedy=REMEDY) from error
    return groups


def _saved_tensor(entry: dict[str, Any]) -> SavedTensor:
    """Raises ValueError, KeyError or TypeError where the entry of a tensor is not as the saver writes it."""
    boxes = tuple(Box(_lengths(piece["offset"]), _lengths(piece["shape"])) for piece in entry["pieces"])
    files = tuple(piece["file"] for piece in entry["pieces"])
    saved = SavedTensor(entry["dtype"], _lengths(entry["shape"]), files, boxes)
    if saved.dtype not in map(dtype_name, SAFETENSORS_TYPES):
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


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """What `tensors.json` says of a tensor, before its pieces are known."""
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "pieces": []}


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
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
        groups: the `describe_tensor` of every tensor by group and name, with `pieces` filled in: `file`,
            `offset`, `shape`.
        records: size and SHA-256 of the tensor files.

    Raises:
        ValueError: the pieces are not the whole of a tensor.
    """
    for tensors in groups.values():
        for entry in tensors.values():
            _saved_tensor(entry)
    write_json(folder / STATE, state)
    write_json(folder / TENSORS, groups)
    written = {name: file_record(folder / name) for name in (STATE, TENSORS)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": written | dict(sorted(records.items()))})
