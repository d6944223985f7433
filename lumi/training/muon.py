"""Muon (Jordan et al. 2024): momentum whose direction is made orthogonal.

The update is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`: Nesterov momentum, five
Newton-Schulz steps, decoupled weight decay, and a size that matches AdamW's (Liu et al. 2025,
arXiv:2502.16982).

Whole matrices of one shape are stacked and orthogonalised together, tall ones as their transpose. A GPU
then runs a few large products instead of many small ones.

A matrix in parts is a DTensor of FSDP2 or tensor parallelism. Only a whole matrix can be made orthogonal,
so the processes take turns in owning one. Momentum stays in parts. The parts of the direction are gathered
in the compute dtype, the owner orthogonalises the whole, and every process receives the result. As many
matrices as processes are in work at the same time, and no process holds more than two of them whole. Each
element is sent once there and once back.

NorMuon (Li et al. 2025, arXiv:2510.05491) may be added: each row of the orthogonal matrix is divided by the
root of a running mean of its squares. The whole then gets back the norm that it had.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lumi.host.devices import fast_bfloat16
from lumi.kernels.wide_float import wide_float
from lumi.model.compute_weights import WeightCopy, written_together
from lumi.parallel.tensor_pieces import gathered, piece
from lumi.training.orthogonalization import LEAST_NORM, apart, is_tall, orthogonalize, stacked, stacks

_ROW_EPS = 1e-8  # added to the root of a row's mean square


class Muon(torch.optim.Optimizer):
    """Muon over matrices, plain tensors or DTensors. With DTensors, all processes step together."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float,
        compute_dtype: torch.dtype | None = None,
        copies: Mapping[Tensor, WeightCopy] | None = None,
        beta2: float | None = None,
    ):
        """
        Args:
            params: at least one matrix, all on one device.
            compute_dtype: the dtype that directions are orthogonalised and sent in. None: bfloat16 where
                the device multiplies it in hardware, float32 elsewhere.
            copies: those of `ComputeWeights`, by parameter: written with the parameters.
            beta2: NorMuon's decay of the mean of a row's squares; None: Muon.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if compute_dtype is None:
            compute_dtype = torch.bfloat16 if fast_bfloat16(params[0].device) else torch.float32
        self.compute_dtype, self.copies = compute_dtype, copies or {}
        self.beta2 = beta2
        for parameter in params:  # with the name and the zeros of torch.optim.Muon
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            if beta2 is not None:  # whole on every process
                zeros = torch.zeros(len(parameter), dtype=parameter.dtype, device=parameter.device)
                self.state[parameter]["row_squares"] = zeros

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, accepted: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient. It never waits for the device.

        Args:
            accepted: bool scalar on the device; where it is False, nothing changes. None: it is True.
        """
        if accepted is None:
            accepted = torch.ones((), dtype=torch.bool, device=self.param_groups[0]["params"][0].device)
        for group in self.param_groups:
            one = accepted.to(wide_float(accepted.device))  # or zero
            decay = (1 - one * (group["lr"] * group["weight_decay"])).float()
            settings = group | {"accepted": accepted, "decay": decay}
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for stack in stacks([p for p in parameters if not isinstance(p, DTensor)]):
                self._update_whole(stack, settings)
            in_parts = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
            size = dist.get_world_size() if in_parts else 1
            for first in range(0, len(in_parts), size):
                self._update_parts(in_parts[first : first + size], settings)

    def _update_whole(self, parameters: list[Tensor], settings: dict[str, Any]) -> None:
        """Update the matrices of one stack."""
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        num_wide = sum(not is_tall(parameter) for parameter in parameters)  # they come first
        mean = stacked(means, num_wide)
        gradient = _taken_in(mean, stacked(gradients, num_wide), settings)
        torch._foreach_copy_(means, apart(mean, num_wide))
        stack = gradient.lerp_(mean, settings["momentum"]).to(self.compute_dtype)
        del mean, gradient
        stack = orthogonalize(stack).to(parameters[0].dtype).mul_(settings["accepted"])
        wide, tall = stack[:num_wide], stack[num_wide:].mT
        for members, updates in ((parameters[:num_wide], wide), (parameters[num_wide:], tall)):
            if members and self.beta2 is not None:
                updates.mul_(self._scales(members, updates, settings))
        copied = [parameter for parameter in parameters if parameter in self.copies]
        with written_together([self.copies[parameter] for parameter in copied]) as rows:
            self._move(parameters, apart(stack, num_wide), parameters[0].shape, settings)
            if rows:
                torch._foreach_copy_(rows, copied)

    def _update_parts(self, parameters: list[DTensor], settings: dict[str, Any]) -> None:
        """Update one matrix in parts for each process: process i owns the i-th."""
        own = None
        for owner, parameter in enumerate(parameters):
            whole = gathered(self._direction(parameter, settings))
            if owner == dist.get_rank():
                own = whole
        if own is not None:  # only now, after the last gather, so that nobody waits for another's products
            own = orthogonalize(own[None])[0].mul(settings["accepted"]).contiguous()
        parts = [piece(parameter) for parameter in parameters]
        for owner, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
            if owner == dist.get_rank() and own is not None:
                whole = own
            else:
                whole = torch.empty(parameter.shape, dtype=self.compute_dtype, device=parameter.device)
            dist.broadcast(whole, src=owner)
            update = part.part_of(whole)
            if self.beta2 is not None:
                scales = self._scales([parameter], whole[None], settings)[0].expand(len(whole), 1)
                update = update * scales[part.offset[0] :][: len(update)]
            self._move([part.local], [update], parameter.shape, settings)

    def _scales(self, parameters: Sequence[Tensor], updates: Tensor, settings: dict[str, Any]) -> Tensor:
        """(count, rows, 1): what NorMuon multiplies orthogonal updates with.

        Args:
            updates: (count, rows, columns), whole; zeros where the step is skipped.
        """
        assert self.beta2 is not None
        held = [self.state[parameter]["row_squares"] for parameter in parameters]
        dtype = parameters[0].dtype
        squares = torch.linalg.vector_norm(updates, dim=2, dtype=dtype).square()  # (count, rows)
        means = torch.stack(held)
        taken_in = torch.where(settings["accepted"], squares / updates.shape[2], means)
        means.lerp_(taken_in, 1 - self.beta2)
        torch._foreach_copy_(held, list(means.unbind()))
        scales = 1 / (means.sqrt() + _ROW_EPS)
        norms = squares.sum(dim=1, keepdim=True).sqrt()
        scaled = (squares * scales.square()).sum(dim=1, keepdim=True).sqrt()
        return (scales * (norms / scaled.clamp(min=LEAST_NORM)))[:, :, None]

    def _move(
        self, held: list[Tensor], updates: list[Tensor], shape: torch.Size, settings: dict[str, Any]
    ) -> None:
        """Decay what this process holds of matrices of one shape up to transposition, and add the updates."""
        torch._foreach_mul_(held, settings["decay"])
        torch._foreach_add_(held, updates, alpha=-settings["lr"] * _size_of_adamw(shape))

    def _direction(self, parameter: DTensor, settings: dict[str, Any]) -> DTensor:
        """Nesterov's direction in the compute dtype, after the momentum has taken in the gradient."""
        mean, gradient = self.state[parameter]["momentum_buffer"], parameter.grad
        assert isinstance(gradient, DTensor)
        own_mean, own = mean.to_local(), gradient.to_local()
        own.copy_(_taken_in(own_mean, own, settings))
        direction = gradient.lerp(mean, settings["momentum"]).to(self.compute_dtype)
        assert isinstance(direction, DTensor)
        return direction


def _taken_in(mean: Tensor, gradient: Tensor, settings: dict[str, Any]) -> Tensor:
    """Take a gradient into the mean, in place. Returns the gradient; the mean itself where the step is
    skipped, for a mean that takes in itself stays as it is."""
    gradient = torch.where(settings["accepted"], gradient, mean)
    mean.lerp_(gradient, 1 - settings["momentum"])
    return gradient


def _size_of_adamw(shape: Sequence[int]) -> float:
    """The factor that gives an orthogonal update the root mean square of AdamW's."""
    return 0.2 * math.sqrt(max(shape))
