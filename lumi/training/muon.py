"""Muon (Jordan et al. 2024) for matrices that FSDP2 or tensor parallelism hold in parts.

An update is orthogonal only as a whole matrix. Momentum stays where its part is; the processes take turns in owning a matrix: its parts
are gathered in bfloat16, in which it is orthogonalised anyway, its owner does the work, and every process gets its part of the result.
They work at the same time, on as many matrices as there are processes, and none holds more than two whole. Moved: 2 bytes for each
element there and back.

With the same gradients the update is that of `torch.optim.Muon`, whose settings these are.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lumi.parallel.tensor_pieces import piece

_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of Jordan's quintic, which brings singular values near 1 in five turns
_TURNS = 5


class ShardedMuon(torch.optim.Optimizer):
    """Muon over DTensors, scaled to AdamW's update size (Liu et al. 2025, arXiv:2502.16982); all processes step together."""

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        size = dist.get_world_size()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for first in range(0, len(parameters), size):
                self._round(parameters[first : first + size], group)

    def _round(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update as many matrices as there are processes: all work at the same time, each on one."""
        own = None
        for owner, parameter in enumerate(parameters):
            whole = gathered(self._direction(parameter, group["momentum"]))
            if owner == dist.get_rank():
                own = whole
        if own is not None:  # after all are gathered: nobody waits for another's products
            own = orthogonalize(own)
        for owner, parameter in enumerate(parameters):
            if owner != dist.get_rank() or own is None:
                whole = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
            else:
                whole = own
            dist.broadcast(whole, src=owner)
            held = piece(parameter)
            held.local.mul_(1 - group["lr"] * group["weight_decay"])
            held.local.add_(held.part_of(whole), alpha=-group["lr"] * 0.2 * math.sqrt(max(whole.shape)))

    def _direction(self, parameter: Tensor, momentum: float) -> DTensor:
        """Nesterov's, from the gradient and the momentum, which takes it in."""
        mean, grad = self.state[parameter]["momentum_buffer"], parameter.grad
        assert grad is not None
        mean.lerp_(grad, 1 - momentum)
        direction = grad.lerp(mean, momentum).bfloat16()
        assert isinstance(direction, DTensor)
        return direction


def gathered(tensor: DTensor) -> Tensor:
    """All of a DTensor on every process, one side of the mesh after the other: FSDP2 has cut what tensor parallelism had cut before."""
    placements = list(tensor.placements)
    for side in range(len(placements)):
        placements[side] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def orthogonalize(matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """The nearest matrix, roughly, whose singular values are one: five Newton-Schulz turns.

    Args:
        matrix: (rows, columns).

    Returns:
        contiguous bfloat16 of the same shape.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=eps)
    for _ in range(_TURNS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).contiguous()
