"""Parameter groups, AdamW, and gradient clipping; the optimizers of one model behind one `step`.

Parameters are plain tensors, or DTensors whose parts lie on several processes. With DTensors, all processes
call everything here together.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lumi.config import UserError
from lumi.kernels.adamw import adamw
from lumi.kernels.global_norm import global_norm
from lumi.kernels.native import native_device
from lumi.model.compute_weights import WeightCopy, written_together
from lumi.parallel.tensor_pieces import num_copies
from lumi.training.muon import Muon
from lumi.training.optimizer_config import OptimizerConfig


class AdamW(torch.optim.Optimizer):
    """AdamW by `lumi.kernels.adamw`: one operator updates all parameters and clips gradients as it reads.

    The states have the names of torch's AdamW. `copies` are those of `ComputeWeights`, which are written with
    their parameters.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        copies: Mapping[Tensor, WeightCopy],
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.copies = copies

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        norm: Tensor | None = None,
        max_norm: float = math.inf,
        loss_scale: float = 1.0,
    ) -> None:
        """Update every parameter that has a gradient. Groups may differ in learning rate and weight decay.

        Args:
            norm, max_norm, loss_scale: what clips the gradients, as in `lumi.kernels.adamw`.
        """
        alike: defaultdict[tuple[float, bool], list[tuple[Tensor, dict[str, Tensor], float]]]
        alike = defaultdict(list)  # one operator has one rate, and copies of all parameters or of none
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    member = p, self.state[p], group["weight_decay"]
                    alike[group["lr"], p in self.copies].append(member)
        group = self.param_groups[0]
        for (lr, copied), members in alike.items():
            parameters, states, weight_decays = zip(*members, strict=True)
            copies = [self.copies[parameter] for parameter in parameters] if copied else []
            with written_together(copies) as rows:
                adamw(
                    _own(parameters),
                    _own([parameter.grad for parameter in parameters]),
                    _own([state["exp_avg"] for state in states]),
                    _own([state["exp_avg_sq"] for state in states]),
                    [state["step"] for state in states],
                    weight_decays=weight_decays,
                    lr=lr,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    norm=norm,
                    max_norm=max_norm,
                    loss_scale=loss_scale,
                    copies=rows or None,
                )


@dataclass(frozen=True)
class Clip:
    """The gradients of one step as `measure_gradients` found them, for the `step` that clips them.

    All tensors are scalars on the gradients' device. Nobody waits for them.

    Args:
        scaled_norm: their joint L2 norm, still times the loss scale; float64. If it is not finite, the step
            updates nothing.
        loss_scale: the factor that the loss had in backward.
    """

    scaled_norm: Tensor
    loss_scale: float

    @property
    def norm(self) -> Tensor:
        """The joint L2 norm without the loss scale, float64; not finite where a gradient is not."""
        return self.scaled_norm / self.loss_scale

    @property
    def accepted(self) -> Tensor:
        """Whether the step updates anything, bool."""
        return self.scaled_norm.isfinite()

    def only_if(self, condition: Tensor) -> "Clip":
        """The same, of a step that updates nothing unless the condition, a bool, holds too."""
        return replace(self, scaled_norm=torch.where(condition, self.scaled_norm, math.nan))

    def factor(self, max_norm: float) -> Tensor:
        """What to multiply the gradients with, float32."""
        shrinking = (max_norm / (self.scaled_norm / self.loss_scale)).clamp(max=1.0)
        return (shrinking / self.loss_scale).float()


class Optimizer:
    """The optimizers of one model behind one `step`.

    Every state tensor has a name, so that a checkpoint needs no pickle. A model's joined weights are written
    with their masters.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        """Raises UserError where the config gives a rate or decay to a part that is not trained."""
        self.config = config
        weights = getattr(model, "compute_weights", None)
        self.copies: Mapping[Tensor, WeightCopy] = {} if weights is None else weights.copies()
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("model must have parameters that require gradients, got none")
        in_muon = {name for name, p in self.named.items() if config.kind == "muon" and _is_hidden(name, p)}
        rest = {name: p for name, p in self.named.items() if name not in in_muon}
        self.optimizers: list[torch.optim.Optimizer] = []
        groups = _groups(rest, config)
        if groups:
            self.optimizers.append(self._adamw(groups))
        if in_muon:
            matrices = [p for name, p in self.named.items() if name in in_muon]
            self.optimizers.append(
                Muon(
                    matrices,
                    lr=config.peak_lr,
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                    copies=self.copies,
                    beta2=config.muon_beta2,
                )
            )

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Our AdamW where compiled code takes all parameters, else torch's fused one; states are allocated.

        The plain-torch definition of ours would take many launches on a GPU.
        """
        lr, betas, eps = self.config.peak_lr, (self.config.beta1, self.config.beta2), self.config.eps
        native = native_device(_own(list(self.named.values()))) is not None
        make = partial(AdamW, copies=self.copies) if native else partial(torch.optim.AdamW, fused=True)
        optimizer: torch.optim.Optimizer = make(groups, lr=lr, betas=betas, eps=eps)
        # Zeros, as the first step would make them. They take their memory at once, and a checkpoint of any
        # step has the same tensors.
        for parameter in (parameter for group in groups for parameter in group["params"]):
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return optimizer

    def measure_gradients(self, loss_scale: float = 1.0) -> Clip:
        """Measure the joint L2 norm of all gradients, without waiting for it. They stay as they are.

        Args:
            loss_scale: the factor that the loss had in backward.
        """
        norm = _whole_norm([p.grad for p in self.named.values() if p.grad is not None])
        return Clip(norm, loss_scale)

    def step(self, lr: float, clip: Clip | None = None) -> None:
        """Make one update with learning rate `lr`, of some parameters times their ratio.

        Args:
            clip: takes the loss scale out of the gradients and limits their norm to `max_grad_norm`. A norm
                that is not finite updates nothing; the device sees to that. None: gradients are used as they
                are.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)
            if isinstance(optimizer, AdamW) and clip is not None:
                optimizer.step(
                    norm=clip.scaled_norm, max_norm=self.config.max_grad_norm, loss_scale=clip.loss_scale
                )
                continue
            if clip is not None:
                parameters = (p for group in optimizer.param_groups for p in group["params"])
                gradients = _own([p.grad for p in parameters if p.grad is not None])
                if gradients:
                    torch._foreach_mul_(gradients, clip.factor(self.config.max_grad_norm))
            accepted = None if clip is None else clip.accepted
            if isinstance(optimizer, Muon):
                optimizer.step(accepted=accepted)
            else:  # torch's, which a scaler of gradients tells by this name to skip
                optimizer.found_inf = None if accepted is None else (~accepted).float()  # type: ignore
                optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
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


def _groups(named: Mapping[str, Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's parameters, grouped by what the config says of their rate and their decay.

    Raises UserError where the config says it of a part that is not trained.
    """
    ratios = {part: getattr(config, f"{part}_lr_ratio") for part in ("embedding", "head", "norm")}
    of_part = {name: _part(name, parameter) for name, parameter in named.items()}
    for part, ratio in ratios.items():
        if ratio != 1 and part not in of_part.values():
            raise UserError(f"optimizer.{part}_lr_ratio", f"must be 1 where no {part} is trained", got=ratio)
    if not config.decay_embedding and "embedding" not in of_part.values():
        raise UserError("optimizer.decay_embedding must be true where no embedding is trained, got false")
    alike: defaultdict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, part in of_part.items():
        decays = part != "norm" and (part != "embedding" or config.decay_embedding)
        alike[ratios.get(part, 1.0), config.weight_decay if decays else 0.0].append(named[name])
    return [
        {"params": parameters, "lr_ratio": lr_ratio, "weight_decay": weight_decay}
        for (lr_ratio, weight_decay), parameters in alike.items()
    ]


def _part(name: str, parameter: Tensor) -> str:
    """The part of a model whose rate and decay a parameter has."""
    if parameter.ndim < 2:
        return "norm"  # or a bias
    return {"token_embedding": "embedding", "lm_head": "head"}.get(name.partition(".")[0], "layers")


def _is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether Muon may train it: a matrix of the layers."""
    return parameter.ndim >= 2 and name.startswith("layers.")


def _own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, in the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _whole_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients, whole or in parts: a float64 scalar, the same everywhere."""
    shared: dict[int, list[Tensor]] = {}  # by the number of processes that hold the same part
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            return global_norm(gradients)  # whole on every process
        shared.setdefault(num_copies(gradient), []).append(gradient.to_local())
    if not shared:
        return global_norm([])
    squares = torch.stack([global_norm(parts) ** 2 / copies for copies, parts in shared.items()]).sum()
    dist.all_reduce(squares)
    return squares.sqrt()
