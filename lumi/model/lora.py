"""Low-rank adaptation, put on a model from outside (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + s dropout(x) A^T B^T,   s = alpha / R

A bias of the frozen linear is added to y; it is frozen too.
rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) has s = alpha / sqrt(R).
W (O, I) is frozen. A (R, I) starts uniform within 1/sqrt(I) and B (O, R) at zero, so training starts at the
unchanged model. DoRA (Liu et al. 2024, arXiv:2402.09353) also trains the length m (O,) of every row
of W' = W + s B A, which starts at the length of W's row:

    y = m / |W'|_row * (x W^T + s dropout(x) A^T B^T),   |W'| is a constant in backward

Pre-training never sees the control tokens of a chat template, and the frozen rows of the embedding and of
`lm_head` cannot learn them. The rows of chosen tokens can therefore be trained beside the adapters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Which linears get an adapter, and how large it is.

    `targets` holds ends of their names, such as "q_proj"; "all-linear" means all but `lm_head`. `tokens`
    holds control pieces, such as "<|im_end|>": their rows in the embedding and in `lm_head` are trained too,
    which costs a gradient of both matrices.
    """

    # The rank R of an adapter.
    rank: int = 16
    # The adapter's product is multiplied by alpha / rank.
    alpha: float = 32.0
    # Dropout on an adapter's input, 0 to below 1.
    dropout: float = 0.0
    # Multiply by alpha / sqrt(rank) instead.
    rslora: bool = False
    # Also train the length of each row (DoRA).
    dora: bool = False
    targets: str | tuple[str, ...] = ALL_LINEAR
    tokens: tuple[str, ...] = ()
    # The dtype of the frozen matrices in training; a base that is loaded keeps its own.
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError("rank", "must be at least 1", got=self.rank)
        if not 0 < self.alpha < math.inf:
            raise UserError("alpha", "must be positive", got=self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError("dropout", "must be in [0, 1)", got=self.dropout)
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        if not self.targets:
            raise UserError("targets", f'must name linears, or be "{ALL_LINEAR}"', got="none")

    @property
    def scale(self) -> float:
        """The factor s of the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def token_ids(self, control_ids: Mapping[str, int]) -> list[int]:
        """The ids of `tokens`, in order. Raises UserError for one that is not among the control pieces."""
        if unknown := [piece for piece in self.tokens if piece not in control_ids]:
            expectation = f"must be control pieces of the tokenizer ({', '.join(control_ids)})"
            raise UserError("lora.tokens", expectation, got=repr(unknown[0]))
        return sorted({control_ids[piece] for piece in self.tokens})


class LoraLinear(Linear):
    """A frozen `Linear` with float32 parameters `lora_A`, `lora_B` and, with DoRA, `lora_magnitude`.

    It has the weight and the bias of the linear that it is put on.
    """

    def __init__(self, base: Linear, config: LoraConfig, ops: Ops):
        nn.Module.__init__(self)
        out_features, in_features = base.weight.shape
        device = base.weight.device
        self.config, self.ops, self.weight, self.bias = config, ops, base.weight, base.bias
        self.lora_A = nn.Parameter(torch.zeros(config.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        self.lora_magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1)) if config.dora else None

    @property
    def drops(self) -> bool:
        """Whether dropout is at work: the adapter's input then differs from the frozen matrix's."""
        return self.training and self.config.dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.drops:
            narrow = F.linear(F.dropout(x, self.config.dropout), self.lora_A.to(x.dtype))
            adapter = F.linear(narrow, self.lora_B.to(x.dtype))
            y = F.linear(x, self.weight.to(x.dtype)) + self.config.scale * adapter
        else:
            (y,) = self.ops.lora_linear(x, [self.weight], [self.lora_A], [self.lora_B], [self.config.scale])
        if self.lora_magnitude is not None:
            with torch.no_grad():
                length_O = self._sum().norm(dim=1)
            y = y * (self.lora_magnitude / length_O).to(x.dtype)
        return self.add_bias(y)

    def add_bias(self, y: Tensor) -> Tensor:
        """y + b; y where there is no b."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """The one matrix (O, I), float32, that computes the same as this module without dropout."""
        weight_OI = self._sum()
        if self.lora_magnitude is not None:
            weight_OI *= (self.lora_magnitude / weight_OI.norm(dim=1))[:, None]
        return weight_OI

    def _sum(self) -> Tensor:
        """W + s B A, float32; float64 stays float64."""
        # FSDP2 hands out parameters in the compute dtype.
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        weight, A, B = (tensor.to(wide) for tensor in (self.weight, self.lora_A, self.lora_B))
        return torch.addmm(weight, B, A, alpha=self.config.scale)


def apply_adapted(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Apply several linears to one input. One operator computes all adapters without dropout and DoRA."""
    adapted = [linear for linear in linears if isinstance(linear, LoraLinear)]
    joined = [linear for linear in adapted if not linear.drops and linear.lora_magnitude is None]
    if not joined:
        return apply_each(x, *linears)
    weights, As, Bs = (
        [getattr(linear, name) for linear in joined] for name in ("weight", "lora_A", "lora_B")
    )
    ys = iter(joined[0].ops.lora_linear(x, weights, As, Bs, [linear.config.scale for linear in joined]))
    return [linear.add_bias(next(ys)) if linear in joined else linear(x) for linear in linears]


class TrainedRows(nn.Module):
    """A parametrization of a frozen matrix (V, D): float32 parameters take the place of its rows `ids`."""

    ids: Tensor

    def __init__(self, weight: Tensor, ids: Sequence[int]):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[list(ids)].float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))


def add_lora(model: Transformer, config: LoraConfig, seed: int = 0, token_ids: Sequence[int] = ()) -> None:
    """Freeze a model and put adapters on its linears, in place. Only they and the tokens' rows get gradients.

    Args:
        seed: of the initial A's, drawn on the CPU in the order of the model's modules.
        token_ids: the ids of `config.tokens`.

    Raises:
        UserError: a target names no linear of the model, or names `lm_head`.
    """
    wrap(model, find_targets(model, config.targets), config, token_ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapters(model):
            bound = 1 / math.sqrt(module.lora_A.shape[1])
            module.lora_A.copy_((2 * torch.rand(module.lora_A.shape, generator=generator) - 1) * bound)


def wrap(
    model: Transformer,
    names: Sequence[str],
    config: LoraConfig,
    token_ids: Sequence[int] = (),
    own: Mapping[str, LoraConfig] | None = None,
) -> None:
    """Freeze a model in `base_dtype`, put zero adapters on the linears `names`, free the tokens' rows.

    Args:
        own: the configs of linears that have another one than `config`, by name.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(getattr(torch, config.base_dtype))
    for name in names:
        owner, attribute = _owner(model, name)
        base = getattr(owner, attribute)
        assert isinstance(base, Linear)
        setattr(owner, attribute, LoraLinear(base, (own or {}).get(name, config), model.ops))
        owner.project = apply_adapted
    for module in token_matrices(model).values() if token_ids else ():
        parametrize.register_parametrization(module, "weight", TrainedRows(module.weight, token_ids))


def _owner(model: Transformer, name: str) -> tuple[Attention | MLP, str]:
    """The module that holds the linear `name`, and the name of its attribute there."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    assert isinstance(owner, Attention | MLP)
    return owner, attribute


def find_targets(model: Transformer, targets: str | Sequence[str]) -> list[str]:
    """Names of the linears that `targets` select, in the model's order. Raises UserError as `add_lora`."""
    linears = [
        name for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"
    ]
    found: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = [name for name in linears if target == ALL_LINEAR or f".{name}".endswith(f".{target}")]
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            why = " (the loss is fused with it)" if target == "lm_head" else ""
            expectation = f'must be "{ALL_LINEAR}" or end the names of linears ({known})'
            raise UserError("lora.targets", expectation, got=f"{target!r}{why}")
        found.update(matches)
    return [name for name in linears if name in found]


def token_matrices(model: Transformer) -> dict[str, nn.Embedding | Linear]:
    """The modules whose `weight` has a row for each token, by name: the embedding and an untied `lm_head`."""
    modules = {"token_embedding": model.token_embedding}
    return modules if model.lm_head is None else modules | {"lm_head": model.lm_head}


def replace_token_matrices(model: Transformer, embedding: Tensor, output: Tensor | None) -> None:
    """Give a model other matrices (V, D) of tokens, in place: another number of them, or no longer tied.

    Args:
        output: of `lm_head`; None: the embedding, tied.
    """
    vocab_size, model_dim = embedding.shape
    model.token_embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
    model.lm_head = None
    if output is not None:
        model.lm_head = Linear(model_dim, vocab_size, model.ops)
        model.lm_head.weight = nn.Parameter(output)
    model.config = replace(model.config, vocab_size=vocab_size, tied_embeddings=output is None)


def trained_rows(module: nn.Module) -> TrainedRows | None:
    """The trained rows of one of `token_matrices`; None where there are none."""
    if not parametrize.is_parametrized(module):
        return None
    rows = module.get_submodule("parametrizations.weight.0")
    assert isinstance(rows, TrainedRows)
    return rows


def settle_rows(model: Transformer) -> None:
    """Write trained rows into their matrices, in place. Until then every pass joins both, at some cost."""
    for matrix in filter(parametrize.is_parametrized, token_matrices(model).values()):
        parametrize.remove_parametrizations(matrix, "weight", leave_parametrized=True)
        matrix.weight.requires_grad_(False)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted linears with their names, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def merge_lora(model: Transformer) -> None:
    """Replace each adapted linear by a plain one with the merged matrix. No parameter is frozen afterwards.

    The model is float32 then; a model in float64 stays float64.
    """
    for name, module in list(adapters(model)):
        owner, attribute = _owner(model, name)
        with torch.no_grad():
            merged = Linear(module.weight.shape[1], module.weight.shape[0], module.ops)
            merged.weight, merged.bias = nn.Parameter(module.merged_weight()), module.bias
        setattr(owner, attribute, merged)
        owner.project = apply_each
    settle_rows(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name: all of them, or the adapters and tokens' rows."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
