"""Tile sizes of the attention kernels: `attention_tiles.json` has them by architecture, head dim and kernel.

`python benchmarks/tune_attention.py` measures the candidates on the GPU at hand and writes that GPU's rows.
An architecture without rows uses those of the newest one before it. Head dims below 64 use the rows of 64:
they are right but not tuned. float32 has its own rows, for all architectures: its products run outside the
tensor cores, for checks and not for speed.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lumi.kernels.native import capability

TABLE = Path(__file__).with_suffix(".json")
_FLOAT32 = {
    "fwd": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1, "DESCRIPTORS": False},
    "dkdv": {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1, "DESCRIPTORS": False},
    "dq": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": False},
}
_DELTA_TILE = 1024  # elements of a program of the delta kernel: 8 for each of its 128 threads
_INTERPRETER = 90


Row = dict[str, Any]


@cache
def table() -> dict[str, dict[str, dict[str, Row]]]:
    """Architecture -> "64" or "128" (the widest head dim) -> kernel -> row. Changes hold for this process."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def rows_of(arch: int) -> str:
    """The table's key for an architecture: itself, or the newest one before it.

    sm_120 has the shared memory of sm_89, not of sm_100.
    """
    known = [int(key) for key in table()]
    kin = [key for key in known if (key >= 120) == (arch >= 120)] or [key for key in known if key <= 89]
    return str(max((key for key in kin if key <= arch), default=min(known)))


def architecture(device: torch.device) -> int:
    """Compute capability as in sm_90; Triton's interpreter takes the tiles of sm_90."""
    if device.type != "cuda":
        return _INTERPRETER
    major, minor = capability(device)
    return 10 * major + minor


def tile(kernel: str, K: int, dtype: torch.dtype, arch: int) -> Row:
    """Block sizes, warps and stages of one kernel.

    Args:
        kernel: "fwd", "delta", "dkdv" or "dq".
        K: head dim, at most 128.
        dtype: of q.
        arch: from `architecture`.

    Returns:
        keyword arguments of the launch, `maxnreg` among them where a row limits a thread's registers. BLOCK_K
        is K's next power of two, at least 16.
    """
    block_k = max(1 << (K - 1).bit_length(), 16)
    if kernel == "delta":
        return {"BLOCK_M": _DELTA_TILE // block_k, "BLOCK_K": block_k, "num_warps": 4}
    if dtype == torch.float32:
        return {**_FLOAT32[kernel], "BLOCK_K": block_k}
    row = table()[rows_of(arch)]["64" if block_k <= 64 else "128"][kernel]
    return {**row, "BLOCK_K": block_k}
