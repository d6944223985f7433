"""How much memory is left."""

import contextlib
import os
from pathlib import Path

import torch

USABLE = 0.9  # of the free memory: estimates leave out torch itself, fragmentation and short peaks
# The two generations of control groups: folder, limit, use, and the pages of files within it, which make way.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that one process may take; None where the system does not say.

    On a GPU: what is free on it. On a CPU: its share of what the machine, or its container, has left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: list[int] = []
    with contextlib.suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for folder, limit, use, pages in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            held = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            cached = sum(int(held.get(kind, 0)) for kind in pages)
            free.append(int(Path(folder, limit).read_text()) - int(Path(folder, use).read_text()) + cached)
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if free else None
