"""Safetensors files: written with their SHA-256 and fsynced, and read."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lumi.config import UserError

_CHUNK_BYTES = 2**28  # written, synced and reported at a time: minutes on the slowest disks

SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    moved: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a safetensors file and fsync it.

    Unlike the library, this hashes the bytes as it writes them, and other threads run meanwhile.

    Args:
        metadata: added to `{"format": "pt"}`, which other readers expect.
        moved: called after every chunk that is written.

    Returns:
        the file's record, as `lumi.host.storage.file_record` gives it.
    """
    # Wide types come first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    prefix = _header({name: tensors[name] for name in names}, metadata or {})
    digest, size, unsynced = hashlib.sha256(prefix), len(prefix), 0
    with open(path, "wb") as file:
        file.write(prefix)
        for name in names:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            size += len(data)
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
                unsynced += len(chunk)
                # Without this, memory takes the whole file at once, and the last fsync blocks for hours.
                if unsynced >= _CHUNK_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    unsynced = 0
                moved()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """How the file begins: the header's length and the header, JSON with each tensor's type, shape, place."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError if it is not one."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}:", f"must be a safetensors file: {error}") from error
