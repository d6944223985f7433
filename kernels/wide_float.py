"""The widest floating type that a device has: for sums and factors that deserve more than float32."""

import torch

WITHOUT_FLOAT64 = {"mps"}


def wide_float(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs, which have nothing wider."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
