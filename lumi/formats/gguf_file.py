"""GGUF files: metadata and tensors, read from a file that anybody may have made, and written.

The `gguf` package reads and writes the container and the quantised types. It is an extra.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lumi.config import UserError
from lumi.host.storage import DamagedError

Kind = TypeVar("Kind", bool, int, float, str)
SUFFIX = ".gguf"
GGUF = "gguf"  # the kind of artefact
_ENTRIES = 2**22  # names and values; the largest vocabularies have two million
_MAGIC, _HEAD = b"GGUF", 8  # bytes, the version included
_WHOLE, _REMEDY = "must be a whole GGUF file of version 2 or 3", "download or copy it again"


def library() -> Any:
    """The `gguf` package. Raises UserError where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        remedy = "install it: pip install 'lumi-train[gguf]', or pip install gguf"
        raise UserError("GGUF files need the package gguf, which is not installed", remedy=remedy) from error
    return gguf


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX and not Path(path).is_dir()


@dataclass(frozen=True)
class GgufFile:
    """A file that was opened. Tensors stay on disk until they are asked for.

    Attributes:
        metadata: plain values by key; arrays are lists.
        tensors: as the library has them, by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def value(self, key: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """A value of the metadata.

        Raises:
            UserError: it is of another type, or it is missing and there is no default.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: {key} is missing in the metadata", remedy=_REMEDY)
        if type(value) is not kind:
            expectation = f"must be of the type {kind.__name__}"
            raise UserError(f"{self.path}: {key}", expectation, got=repr(value)[:60], remedy=_REMEDY)
        return value

    def list(self, key: str, kind: type[Kind]) -> list[Kind]:
        """An array of the metadata. Raises UserError as `value`."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            expectation = f"must be an array of the type {kind.__name__}"
            raise UserError(f"{self.path}: {key}", expectation, got=repr(value)[:60], remedy=_REMEDY)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as torch has it."""
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32. Raises UserError for a type that cannot be read, and for infinities."""
        found, gguf = self.tensors[name], library()
        where = f"{self.path}: {name}"
        try:
            values = gguf.quants.dequantize(found.data, found.tensor_type)
        except NotImplementedError as error:
            expectation = "must be of a type that the package gguf can read"
            raise UserError(where, expectation, got=found.tensor_type.name) from error
        if not np.isfinite(values).all():
            raise UserError(where, "must hold finite numbers", got="others", remedy=_REMEDY)
        return torch.tensor(values).reshape(self.shape(name))


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file.

    Raises:
        DamagedError: it is no such file, or it is truncated or damaged.
        UserError: it is not for this machine, or it is one of several parts.
    """
    library()
    try:
        reader = _reader_class()(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, OverflowError, ArithmeticError, TypeError, RecursionError) as error:
        got = _fault_of_head(path) or (str(error) if isinstance(error, _FaultError) else "a damaged file")
        raise DamagedError(f"{path}:", _WHOLE, got=got, remedy=_REMEDY) from error
    if reader.byte_order != "I":
        expectation, remedy = "must be of this machine's byte order", "convert it by gguf-convert-endian"
        raise UserError(f"{path}:", expectation, got="the other one", remedy=remedy)
    if metadata.get("split.count", 0) not in (0, 1):
        remedy = "join the parts by `llama-gguf-split --merge`"
        raise UserError(f"{path}:", "must hold the whole model", got="one part of several", remedy=remedy)
    return GgufFile(Path(path), metadata, {tensor.name: tensor for tensor in reader.tensors})


def check_whole(path: str | Path) -> None:
    """Compare a file with its format. Without the package only its first bytes are looked at.

    Raises:
        DamagedError: it is no GGUF file, or it is truncated or damaged.
        OSError: it cannot be read.
    """
    if got := _fault_of_head(path):
        raise DamagedError(f"{path}:", _WHOLE, got=got, remedy=_REMEDY)
    try:
        open_gguf(path)
    except DamagedError:
        raise
    except UserError:  # the package is missing, or the file is whole and not for us
        return


def _fault_of_head(path: str | Path) -> str:
    """What is wrong with a file's first bytes, in our words: the libraries' are about their arrays."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(_MAGIC[: len(head)]):
        return "a file of another kind"
    if len(head) < _HEAD:
        return "a file that ends too early"
    version = min(int.from_bytes(head[len(_MAGIC) :], order) for order in ("little", "big"))
    return "" if version in (2, 3) else f"a file of version {version}"


class _FaultError(ValueError):
    """What is wrong with a file, found by us."""


def _reader_class() -> Any:
    class Reader(library().GGUFReader):  # type: ignore[misc]
        """The library's reader takes what lies behind the end of a file as empty, for as long as a count in
        the file says."""

        entries = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.entries += 1
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise _FaultError("a file that ends too early")
            if self.entries > _ENTRIES:
                raise _FaultError(f"more than {_ENTRIES} entries")
            return super()._get(offset, dtype, count, override_order)

    return Reader


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    plan: Mapping[str, tuple[tuple[int, ...], str]],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a GGUF file.

    Args:
        metadata: whole numbers are written as 32 bits without sign, others as float32, lists as arrays.
        plan: shape and type of each tensor by name, in the order of the file.
        tensor: makes a tensor. One at a time is in memory.
    """
    gguf = library()
    writer = gguf.GGUFWriter(path, architecture)
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
    for name, (shape, kind) in plan.items():
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_of(shape, kind), raw)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, kind) in plan.items():
            writer.write_tensor_data(encode(tensor(name), kind))


def bytes_of(shape: tuple[int, ...], kind: str) -> int:
    """The bytes of a tensor in a file."""
    gguf = library()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def encode(tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor's values as a type of GGUF."""
    gguf = library()
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found when it is decoded
        values: np.ndarray = gguf.quants.quantize(
            tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind]
        )
    return values


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """A tensor in float32 as it is read back from a type of GGUF."""
    gguf = library()
    values = gguf.quants.dequantize(encode(tensor, kind), gguf.GGMLQuantizationType[kind])
    return torch.tensor(values).reshape(tensor.shape)
