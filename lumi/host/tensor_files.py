"""Safetensors files: written with their hash and fsynced, and read."""

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
    """Write tensors as safetensors and fsync the file.

    The library would neither hash the bytes as they pass nor release Python to other threads meanwhile.

    Args:
        metadata: beside `{"format": "pt"}`, which other readers expect.
        moved: called from time to time, as long as the writing advances.

    Returns:
        the file's record, as `lumi.host.storage.file_record`.
    """
    # Wide types first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    digest, unsynced = hashlib.sha256(prefix), 0
    with open(path, "wb") as file:
        file.write(prefix)
        for name in names:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
                unsynced += len(chunk)
                if unsynced >= _CHUNK_BYTES:  # else memory takes everything, and the last fsync takes hours
                    file.flush()
                    os.fsync(file.fileno())
                    unsynced = 0
                moved()
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(prefix) + end, "sha256": digest.hexdigest()}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError if it is not one."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}:", f"must be a safetensors file: {error}") from error
