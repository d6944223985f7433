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

Three changes to it may be combined, but for decay on the hyperball, where there is none:

- Hyperball (MuonH; Wen et al. 2025, "Fantastic Pretraining Optimizers and Where to Find Them 2.1"): each
  matrix keeps the Frobenius norm R that it began with, and the learning rate is the length of a step as a
  share of R. W = R * unit(W - lr * R * unit(update)).
- NorMuon (Li et al. 2025, arXiv:2510.05491): each row of the orthogonal matrix is divided by the root of a
  running mean of its squares. The whole then gets back the norm that it had.
- Cautious decay (Chen et al. 2025, arXiv:2510.12402): weights do not decay where the update pushes them away
  from zero.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lumi.host.devices import fast_bfloat16
from lumi.kernels.wide_float import wide_float
from lumi.model.compute_weights import WeightCopy, written_together
from lumi.parallel.tensor_pieces import piece

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic
_NUM_STEPS = 5
_EPS = 1e-7  # the least norm that a matrix is divided by
_ROW_EPS = 1e-8  # added to the root of a row's mean square
_STACK_ELEMENTS = 2**24  # of one stack at most: they keep a GPU busy in 256 MiB of temporary memory


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
        hyperball: bool = False,
        beta2: float | None = None,
        cautious_decay: bool = False,
    ):
        """
        Args:
            params: at least one matrix, all on one device.
            compute_dtype: the dtype that directions are orthogonalised and sent in. None: bfloat16 where
                the device multiplies it in hardware, float32 elsewhere.
            copies: those of `ComputeWeights`, by parameter: written with the parameters.
            hyperball: whether matrices keep their norms. None is zero then, and `weight_decay` has no effect.
            beta2: NorMuon's decay of the mean of a row's squares; None: Muon.
            cautious_decay: whether weights decay only where the update does not push them away from zero.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if compute_dtype is None:
            compute_dtype = torch.bfloat16 if fast_bfloat16(params[0].device) else torch.float32
        self.compute_dtype, self.copies = compute_dtype, copies or {}
        self.hyperball, self.beta2, self.cautious_decay = hyperball, beta2, cautious_decay
        for parameter in params:  # with the name and the zeros of torch.optim.Muon
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            if beta2 is not None:  # whole on every process
                zeros = torch.zeros(len(parameter), dtype=parameter.dtype, device=parameter.device)
                self.state[parameter]["row_squares"] = zeros
        for parameter, norm in zip(params, _norms(params), strict=True) if hyperball else ():
            self.state[parameter]["initial_norm"] = norm.clone()

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
            weight_decay = 0.0 if self.hyperball else group["weight_decay"]
            decay = (1 - one * (group["lr"] * weight_decay)).float()
            settings = group | {"accepted": accepted, "decay": decay}
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for stack in _stacks([p for p in parameters if not isinstance(p, DTensor)]):
                self._update_whole(stack, settings)
            in_parts = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
            size = dist.get_world_size() if in_parts else 1
            for first in range(0, len(in_parts), size):
                self._update_parts(in_parts[first : first + size], settings)

    def _update_whole(self, parameters: list[Tensor], settings: dict[str, Any]) -> None:
        """Update the matrices of one stack."""
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        num_wide = sum(not _is_tall(parameter) for parameter in parameters)  # they come first
        mean = _stacked(means, num_wide)
        gradient = _taken_in(mean, _stacked(gradients, num_wide), settings)
        torch._foreach_copy_(means, _apart(mean, num_wide))
        stack = gradient.lerp_(mean, settings["momentum"]).to(self.compute_dtype)
        del mean, gradient
        stack = orthogonalize(stack).to(parameters[0].dtype).mul_(settings["accepted"])
        wide, tall = stack[:num_wide], stack[num_wide:].mT
        for members, updates in ((parameters[:num_wide], wide), (parameters[num_wide:], tall)):
            if members and self._scales_rows:
                updates.mul_(self._scales(members, updates, settings))
        copied = [parameter for parameter in parameters if parameter in self.copies]
        with written_together([self.copies[parameter] for parameter in copied]) as rows:
            self._move(parameters, parameters, _apart(stack, num_wide), settings)
            if self.hyperball:
                self._hold_norms(parameters, parameters, settings)
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
            if self._scales_rows:
                scales = self._scales([parameter], whole[None], settings)[0].expand(len(whole), 1)
                update = update * scales[part.offset[0] :][: len(update)]
            self._move([parameter], [part.local], [update], settings)
        if self.hyperball:
            self._hold_norms(parameters, [part.local for part in parts], settings)

    @property
    def _scales_rows(self) -> bool:
        return self.hyperball or self.beta2 is not None

    def _scales(self, parameters: Sequence[Tensor], updates: Tensor, settings: dict[str, Any]) -> Tensor:
        """(count, rows or 1, 1): what to multiply orthogonal updates with, so that one of `lr` is left to do.

        Args:
            updates: (count, rows, columns), whole; zeros where the step is skipped.
        """
        states, accepted = [self.state[parameter] for parameter in parameters], settings["accepted"]
        dtype, (_, num_rows, num_columns) = parameters[0].dtype, updates.shape
        squares = torch.linalg.vector_norm(updates, dim=2, dtype=dtype).square()  # (count, rows)
        norms = squares.sum(dim=1, keepdim=True).sqrt()
        scales = torch.ones_like(norms)
        if self.beta2 is not None:
            means = torch.stack([state["row_squares"] for state in states])
            means.lerp_(torch.where(accepted, squares / num_columns, means), 1 - self.beta2)
            torch._foreach_copy_([state["row_squares"] for state in states], list(means.unbind()))
            scales = 1 / (means.sqrt() + _ROW_EPS)
            scales = scales * (
                norms / (squares * scales.square()).sum(dim=1, keepdim=True).sqrt().clamp(min=_EPS)
            )
        if self.hyperball:
            radii = torch.stack([state["initial_norm"] for state in states])[:, None]
            return (scales * (radii / norms.clamp(min=_EPS)))[:, :, None]
        return (scales * _size_of_adamw((num_rows, num_columns)))[:, :, None]

    def _move(
        self,
        parameters: Sequence[Tensor],
        held: list[Tensor],
        updates: list[Tensor],
        settings: dict[str, Any],
    ) -> None:
        """Decay what this process holds of matrices of one shape up to transposition, and add the updates."""
        decay = settings["decay"]
        if self.cautious_decay:
            decays = [torch.where(w * u < 0, 1.0, decay) for w, u in zip(held, updates, strict=True)]
            torch._foreach_mul_(held, decays)
        elif not self.hyperball:
            torch._foreach_mul_(held, decay)
        size = 1.0 if self._scales_rows else _size_of_adamw(parameters[0].shape)
        torch._foreach_add_(held, updates, alpha=-settings["lr"] * size)

    def _hold_norms(self, parameters: Sequence[Tensor], held: list[Tensor], settings: dict[str, Any]) -> None:
        """Bring matrices back to their norms. `held` is what this process holds of them."""
        radii = torch.stack([self.state[parameter]["initial_norm"] for parameter in parameters])
        factors = torch.where(settings["accepted"], radii / _norms(parameters).clamp(min=_EPS), 1.0)
        torch._foreach_mul_(held, list(factors.unbind()))

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


@torch.no_grad()
def _norms(matrices: Sequence[Tensor]) -> Tensor:
    """(count,) Frobenius norms. Of DTensors, all processes call it together."""
    norms = torch.stack(torch._foreach_norm([piece(matrix).local for matrix in matrices]))
    if isinstance(matrices[0], DTensor):
        shares = [1 / num_copies(matrix) for matrix in matrices if isinstance(matrix, DTensor)]
        squares = norms.double().square() * torch.tensor(shares, dtype=torch.float64, device=norms.device)
        dist.all_reduce(squares)
        norms = squares.sqrt().to(norms.dtype)
    return norms


def num_copies(tensor: DTensor) -> int:
    """How many processes hold the same part of a tensor."""
    sides = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(side) for side, p in sides if p.is_replicate())


def gathered(tensor: DTensor) -> Tensor:
    """The whole of a DTensor, on every process.

    FSDP2 cuts what tensor parallelism has cut before, so the sides of the mesh are gathered one by one.
    """
    placements = list(tensor.placements)
    for side in range(len(placements)):
        placements[side] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move every singular value close to one, by five Newton-Schulz steps.

    They end at about 0.7 - 1.2, and the singular vectors stay. A matrix of zeros stays zero.

    Args:
        matrices: (count, rows, columns), in the dtype to compute in.

    Returns:
        the same shape and dtype.
    """
    a, b, c = _COEFFICIENTS
    x = _as_wide(matrices)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_NUM_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if _is_tall(matrices) else x


def _stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices to orthogonalise together: of one shape up to transposition, the tall ones last."""
    alike: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for parameter in sorted(parameters, key=_is_tall):
        alike[tuple(sorted(parameter.shape))].append(parameter)
    for shape, members in alike.items():
        count = max(1, _STACK_ELEMENTS // math.prod(shape))
        yield from (members[first : first + count] for first in range(0, len(members), count))


def _stacked(matrices: Sequence[Tensor], num_wide: int) -> Tensor:
    """Matrices of one shape up to transposition, the tall ones last, as one stack of wide ones."""
    halves = [torch.stack(list(half)) for half in (matrices[:num_wide], matrices[num_wide:]) if half]
    return halves[0] if num_wide == len(matrices) else torch.cat([_as_wide(half) for half in halves])


def _apart(stack: Tensor, num_wide: int) -> list[Tensor]:
    """The matrices of `_stacked`."""
    return [*stack[:num_wide].unbind(), *stack[num_wide:].mT.contiguous().unbind()]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _as_wide(matrices: Tensor) -> Tensor:
    """Transposed where there are more rows than columns, so that the products of rows with rows are small."""
    return matrices.mT if _is_tall(matrices) else matrices


def _size_of_adamw(shape: Sequence[int]) -> float:
    """The factor that gives an orthogonal update the root mean square of AdamW's."""
    return 0.2 * math.sqrt(max(shape))
