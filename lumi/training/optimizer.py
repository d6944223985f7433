"""Parameter groups, AdamW, Muon (torch's own), gradient clipping, and the learning rate as a function of the step.

Parameters are plain tensors or, in parts on several processes, DTensors; then all processes call everything here together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lumi.kernels.adamw import adamw
from lumi.kernels.global_norm import global_norm
from lumi.kernels.native import native_device
from lumi.training.muon import ShardedMuon
from lumi.training.schedule import CosineSchedule, WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`adamw` (Loshchilov & Hutter 2019, arXiv:1711.05101) for everything, or `muon` (Jordan et al. 2024) for the matrices of the
    layers, scaled to AdamW's update size (Liu et al. 2025, arXiv:2502.16982), and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    peak_lr: float = 1e-3
    weight_decay: float = 0.1  # on matrices only; norms have none
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    max_grad_norm: float = 1.0
    schedule: CosineSchedule | WarmupStableDecay = field(default_factory=CosineSchedule)

    def __post_init__(self):
        for name in ("peak_lr", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


class AdamW(torch.optim.Optimizer):
    """AdamW by `lumi.kernels.adamw`: all parameters in one operator, gradients clipped as they are read. Its states bear the names of
    torch's AdamW; `step` is on the CPU, where the bias corrections are made."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        norm: Tensor | None = None,
        max_norm: float = math.inf,
        loss_scale: float = 1.0,
    ) -> None:
        """One update of every parameter that has a gradient, clipped by `norm`, `max_norm` and `loss_scale` as `adamw` has them. Groups
        may differ in weight decay alone."""
        members = [
            (p, self.state[p], group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not members:
            return
        torch._foreach_add_([state["step"] for _, state, _ in members], 1)
        by_step: dict[int, list[tuple[Tensor, dict[str, Tensor], float]]] = {}
        for member in members:
            by_step.setdefault(int(member[1]["step"]), []).append(member)
        group = self.param_groups[0]
        for number, alike in by_step.items():  # one, unless some parameters had no gradient in some steps
            parameters, states, weight_decays = zip(*alike, strict=True)
            adamw(
                _own(parameters),
                _own([parameter.grad for parameter in parameters]),
                _own([state["exp_avg"] for state in states]),
                _own([state["exp_avg_sq"] for state in states]),
                weight_decays=weight_decays,
                step=number,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                norm=norm,
                max_norm=max_norm,
                loss_scale=loss_scale,
            )


class Optimizer:
    """The optimizers of one model behind one `step`; their states have names, so that a checkpoint needs no pickle."""

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.config = config
        self.measured: tuple[Tensor, float, float] | None = (
            None  # the gradients' norm, their loss scale, the norm without it
        )
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("model must have parameters that require gradients, got none")
        matrices = {name: p for name, p in self.named.items() if p.ndim >= 2}
        vectors = [p for p in self.named.values() if p.ndim < 2]
        hidden = (
            {name: p for name, p in matrices.items() if name.startswith("layers.")}
            if config.kind == "muon"
            else {}
        )
        rest = [p for name, p in matrices.items() if name not in hidden]
        groups = [
            {"params": rest, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups:
            # What compiled code cannot take (a GPU without ours, another dtype) gets torch's fused kernel on every device: the plain-torch
            # definition of ours would be many launches.
            native = native_device(_own(list(self.named.values()))) is not None
            adamw_class = AdamW if native else partial(torch.optim.AdamW, fused=True)
            self.optimizers.append(
                adamw_class(groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), eps=config.eps)
            )
        if hidden:
            sharded = any(isinstance(p, DTensor) for p in hidden.values())
            muon_class: Any = (
                ShardedMuon if sharded else partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
            )
            settings = {
                "lr": config.peak_lr,
                "weight_decay": config.weight_decay,
                "momentum": config.muon_momentum,
            }
            self.optimizers.append(muon_class(list(hidden.values()), **settings))
        for optimizer in self.optimizers:
            _allocate_states(optimizer)

    def clip_gradients(self, loss_scale: float = 1.0) -> float:
        """Have the next `step` take `loss_scale` out of all gradients and scale them so that their joint L2 norm is at most
        `max_grad_norm`. It does so as it reads them: until then they stay as they are.

        Returns:
            The norm before clipping; where it is not finite the next `step` does nothing.
        """
        norm = _whole_norm([p.grad for p in self.named.values() if p.grad is not None])
        self.measured = norm, loss_scale, float(norm) / loss_scale
        return self.measured[2]

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`, on gradients as they are or, after `clip_gradients`, clipped."""
        clip: dict[str, Any] = {}
        factor = 1.0
        if self.measured is not None:
            norm, loss_scale, value = self.measured
            self.measured = None
            if not math.isfinite(value):
                return
            clip = {"norm": norm, "max_norm": self.config.max_grad_norm, "loss_scale": loss_scale}
            factor = min(1.0, self.config.max_grad_norm / value if value > 0 else 1.0) / loss_scale
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if isinstance(optimizer, AdamW):
                optimizer.step(**clip)
                continue
            if factor != 1.0:
                torch._foreach_mul_(
                    _own(
                        [
                            p.grad
                            for group in optimizer.param_groups
                            for p in group["params"]
                            if p.grad is not None
                        ]
                    ),
                    factor,
                )
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.measured = None
        for parameter in self.named.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor as `parameter name/state name`; a resume writes into them."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.named.items()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }


def _allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Zeros, as the first step would make them: memory is taken at once, and a checkpoint of any step has the same tensors."""
    moments = (
        ("exp_avg", "exp_avg_sq")
        if isinstance(optimizer, AdamW | torch.optim.AdamW)
        else ("momentum_buffer",)
    )
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        state = optimizer.state[parameter]
        if "exp_avg" in moments:
            state["step"] = torch.zeros(
                (), device="cpu" if isinstance(optimizer, AdamW) else parameter.device
            )
        state |= {moment: torch.zeros_like(parameter, requires_grad=False) for moment in moments}


def _own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, in the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _whole_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients, of which each process may have parts: float64 scalar on their device, the same on all."""
    shared: dict[int, list[Tensor]] = {}  # by the number of processes that hold the same part
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            return global_norm(gradients)  # whole on every process
        copies = math.prod(
            gradient.device_mesh.size(side) for side, p in enumerate(gradient.placements) if p.is_replicate()
        )
        shared.setdefault(copies, []).append(gradient.to_local())
    if not shared:
        return global_norm([])
    squares = torch.stack([global_norm(parts) ** 2 / copies for copies, parts in shared.items()]).sum()
    dist.all_reduce(squares)
    return squares.sqrt()
