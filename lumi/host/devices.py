"""The GPUs that people train on, by NVIDIA's data sheets: what MFU is measured against, and what a plan on paper reckons with."""

import re
from typing import NamedTuple

import torch

from lumi.config import UserError


class Gpu(NamedTuple):
    """Figures of a data sheet; of a GPU that comes in several forms, the one on the fastest board (SXM)."""

    flops: float  # dense bfloat16 peak, FLOP/s
    memory_bytes: int  # the GB of a data sheet are GiB
    memory_bandwidth: float  # bytes/s
    link_bandwidth: (
        float  # bytes/s that it sends to the GPUs of its node: NVLink, or PCIe 4.0 x16 where it has none
    )


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


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (CPUs among them)."""
    return named_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak_flops(name: str) -> float | None:
    """The peak of a device by its name, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu.flops for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name)), None)


def choose_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is CUDA where there is one. Raises UserError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            '--device must be "cpu" or "auto" on this machine, got "cuda": torch sees no CUDA device'
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
