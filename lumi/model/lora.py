"""Low-rank adaptation, put on a model from outside (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + s dropout(x) A^T B^T,   s = alpha / R   (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(R))

W (O, I) is frozen; A (R, I) begins uniform within 1/sqrt(I) and B (O, R) at zero, so that training begins at the model as it was.
DoRA (Liu et al. 2024, arXiv:2402.09353) also trains the length m (O,) of every row of W' = W + s B A, beginning at W's own:

    y = m / |W'|_row * (x W^T + s dropout(x) A^T B^T),   |W'| taken as a constant in backward

Pre-training has never seen a chat template's control tokens, and frozen rows of the embedding and of `lm_head` cannot learn them: the
rows of single tokens can be trained beside the adapters.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lumi.config import UserError
from lumi.kernels.bundle import Ops
from lumi.model.transformer import MLP, Attention, Linear, Transformer, apply_each

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears get how large an adapter. `targets`: ends of their names, such as "q_proj"; "all-linear": all but `lm_head`.
    `tokens`: control pieces, such as "<|im_end|>", whose rows in the embedding and in `lm_head` are trained too; that costs a gradient of
    both matrices."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: str | tuple[str, ...] = ALL_LINEAR
    tokens: tuple[str, ...] = ()
    base_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the frozen matrices in training; loaded, a base is as it is
    )

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        if not self.targets:
            raise ValueError(f'targets must name linears, or be "{ALL_LINEAR}", got none')

    @property
    def scale(self) -> float:
        """The factor s of the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(Linear):
    """A frozen `Linear` with an adapter: float32 parameters `lora_A`, `lora_B` and, for DoRA, `lora_magnitude`."""

    def __init__(self, base: Linear, config: LoraConfig, ops: Ops):
        nn.Module.__init__(self)
        out_features, in_features = base.weight.shape
        device = base.weight.device
        self.config, self.ops, self.weight = config, ops, base.weight
        self.lora_A = nn.Parameter(torch.zeros(config.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        self.lora_magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1)) if config.dora else None

    @property
    def drops(self) -> bool:
        """Whether dropout gives the adapter another input than the frozen matrix has."""
        return self.training and self.config.dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.drops:
            narrow = F.linear(F.dropout(x, self.config.dropout), self.lora_A.to(x.dtype))
            y = F.linear(x, self.weight.to(x.dtype)) + self.config.scale * F.linear(
                narrow, self.lora_B.to(x.dtype)
            )
        else:
            (y,) = self.ops.lora_linear(x, [self.weight], [self.lora_A], [self.lora_B], [self.config.scale])
        if self.lora_magnitude is None:
            return y
        with torch.no_grad():
            length_O = self._sum().norm(dim=1)
        return y * (self.lora_magnitude / length_O).to(x.dtype)

    def merged_weight(self) -> Tensor:
        """The matrix (O, I) that alone computes what this module computes without dropout, float32."""
        weight_OI = self._sum()
        if self.lora_magnitude is not None:
            weight_OI *= (self.lora_magnitude / weight_OI.norm(dim=1))[:, None]
        return weight_OI

    def _sum(self) -> Tensor:
        wide = torch.promote_types(
            self.lora_B.dtype, torch.float32
        )  # FSDP2 hands out parameters in the compute dtype
        return torch.addmm(
            self.weight.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.config.scale
        )


def apply_adapted(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Several linears of one input, those of them in one operator that have an adapter and neither dropout at work nor DoRA."""
    joined = [
        linear
        for linear in linears
        if isinstance(linear, LoraLinear) and not linear.drops and linear.lora_magnitude is None
    ]
    if not joined:
        return apply_each(x, *linears)
    weights, As, Bs = (
        [getattr(linear, name) for linear in joined] for name in ("weight", "lora_A", "lora_B")
    )
    ys = iter(joined[0].ops.lora_linear(x, weights, As, Bs, [linear.config.scale for linear in joined]))
    return [next(ys) if linear in joined else linear(x) for linear in linears]


class TrainedRows(nn.Module):
    """A parametrization of a frozen matrix (V, D): its rows `ids` are float32 parameters of their own, which begin as they were."""

    ids: Tensor

    def __init__(self, weight: Tensor, ids: Sequence[int]):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[list(ids)].float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))


def add_lora(model: Transformer, config: LoraConfig, seed: int = 0, token_ids: Sequence[int] = ()) -> None:
    """Freeze a model and put adapters on its linears, in place; only they, and the rows of tokens, have `requires_grad` afterwards.

    Args:
        token_ids: of `config.tokens`.
        seed: of the A's, drawn on the CPU in the order of the model's modules.

    Raises:
        UserError: a target names no linear of the model, or `lm_head`.
    """
    wrap(model, find_targets(model, config.targets), config, token_ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapters(model):
            bound = 1 / math.sqrt(module.lora_A.shape[1])
            module.lora_A.copy_((2 * torch.rand(module.lora_A.shape, generator=generator) - 1) * bound)


def wrap(model: Transformer, names: Sequence[str], config: LoraConfig, token_ids: Sequence[int] = ()) -> None:
    """Freeze a model, with its matrices in `base_dtype`, put an adapter of zeros on each of the linears `names`, and free rows."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(getattr(torch, config.base_dtype))
    for name in names:
        owner, attribute = _owner(model, name)
        base = getattr(owner, attribute)
        assert isinstance(base, Linear)
        setattr(owner, attribute, LoraLinear(base, config, model.ops))
        owner.project = apply_adapted
    for module in token_matrices(model).values() if token_ids else ():
        parametrize.register_parametrization(module, "weight", TrainedRows(module.weight, token_ids))


def _owner(model: Transformer, name: str) -> tuple[Attention | MLP, str]:
    """The module that has the linear `name`, and the attribute that it is there."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    assert isinstance(owner, Attention | MLP)
    return owner, attribute


def find_targets(model: Transformer, targets: str | Sequence[str]) -> list[str]:
    """The names of the linears that `targets` mean, in the model's order. Raises UserError as `add_lora`."""
    linears = [
        name for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"
    ]
    found: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = [name for name in linears if target == ALL_LINEAR or f".{name}".endswith(f".{target}")]
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            why = " (the loss is fused with it)" if target == "lm_head" else ""
            raise UserError(
                f'lora.targets must be "{ALL_LINEAR}" or end the names of linears ({known}), got {target!r}{why}'
            )
        found.update(matches)
    return [name for name in linears if name in found]


def token_matrices(model: Transformer) -> dict[str, nn.Embedding | Linear]:
    """The modules whose `weight` has a row for each token, by name: the embedding, and `lm_head` where it is one of its own."""
    return {
        name: module
        for name in ("token_embedding", "lm_head")
        if (module := getattr(model, name)) is not None
    }


def trained_rows(module: nn.Module) -> TrainedRows | None:
    """The rows of one of `token_matrices` that are trained, if any are."""
    return module.parametrizations.weight[0] if parametrize.is_parametrized(module) else None  # type: ignore[union-attr,index,return-value]


def settle_rows(model: Transformer) -> None:
    """Write trained rows into their matrices, in place: in training every pass puts both together, which would slow generation down."""
    for matrix in filter(parametrize.is_parametrized, token_matrices(model).values()):
        parametrize.remove_parametrizations(matrix, "weight", leave_parametrized=True)
        matrix.weight.requires_grad_(False)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted linears and their names, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def merge_lora(model: Transformer) -> None:
    """Put a plain linear of the merged matrix in every adapted one's place, in float32 (float64 stays float64); nothing is frozen then."""
    for name, module in list(adapters(model)):
        owner, attribute = _owner(model, name)
        with torch.no_grad():
            merged = Linear(module.weight.shape[1], module.weight.shape[0])
            merged.weight = nn.Parameter(module.merged_weight())
        setattr(owner, attribute, merged)
        owner.project = apply_each
    settle_rows(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: all parameters, or the adapters where there are any."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `trained_tensors` gave. Raises UserError where names or shapes are not this model's."""
    ours = trained_tensors(model)
    for name in ours | tensors:
        expected, got = (
            tuple(group[name].shape) if name in group else "nothing" for group in (ours, tensors)
        )
        if expected != got:
            raise UserError(
                f"the checkpoint must hold {expected} for {name}, got {got}; resume with the config that wrote it"
            )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(tensors[name])
