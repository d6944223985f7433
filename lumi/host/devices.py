"""Devices: which one a command uses, what it is good at, and the data sheets of common GPUs.

Model FLOP/s utilisation (MFU) is measured against these data sheets, and `lumi plan` estimates with them.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch

from lumi.config import UserError


class Gpu(NamedTuple):
    """Figures of NVIDIA's data sheet. A GPU sold on several boards is listed with its fastest one (SXM)."""

    flops: float  # dense bfloat16 peak, FLOP/s
    memory_bytes: int  # the GB of a data sheet are GiB
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s sent to GPUs of the same node, over NVLink or else PCIe 4.0 x16


GPUS = {
    "A100": Gpu(312e12, 80 * 2**30, 2.039e12, 300e9),
    "H100": Gpu(989e12, 80 * 2**30, 3.35e12, 450e9),
    "H200": Gpu(989e12, 141 * 2**30, 4.8e12, 450e9),
    "B200": Gpu(2250e12, 180 * 2**30, 8e12, 900e9),
    "L4": Gpu(121e12, 24 * 2**30, 300e9, 32e9),
    "L40": Gpu(181e12, 48 * 2**30, 864e9, 32e9),
    "L40S": Gpu(362e12, 48 * 2**30, 864e9, 32e9),
    "RTX 4090": Gpu(165e12, 24 * 2**30, 1.008e12, 32e9),
}


BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # CPU instructions that multiply bfloat16 matrices


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None where it is unknown, as for every CPU."""
    return named_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak_flops(name: str) -> float | None:
    """The peak of a device by its name, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu.flops for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name)), None)


def choose_device(name: str) -> str:
    """Resolve --device to "cpu", "cuda" or "mps"; "auto" is CUDA where there is one, else the CPU.

    Nobody has tested Apple's GPUs ("mps"), so they are taken by name alone.

    Raises:
        UserError: torch sees no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available.get(name, True):
        got = f'"{name}": torch sees no {name.upper()} device'
        raise UserError("--device", 'must be "cpu" or "auto" on this machine', got=got)
    return name


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware.

    True for CUDA from capability 8.0 (A100) and for CPUs with AVX512-BF16 or AMX-BF16; False where it is
    unknown. A CPU without these instructions emulates the product, many times slower than in float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not BFLOAT16_FLAGS.isdisjoint(cpu_flags())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name, such as "AMD EPYC"; None where it is unknown."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        return None
    return found[1] if found else None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The CPU's instruction sets by their Linux names, such as "avx2"; empty where they are unknown."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        ask_torch = getattr(torch.cpu, "get_capabilities", None)  # newer versions have it
        return {name for name, has in ask_torch().items() if has is True} if ask_torch else set()
    return set(flags[1].split()) if flags else set()
