"""A LLaMA-style decoder (Touvron et al. 2023, arXiv:2302.13971).

`Transformer(config, ops)` takes tensors and knows no data, no optimizer and no device. It calls every
operator that has a fast version through the bundle `ops`. Weights are float32 masters; products run in
`compute_dtype`.

Shape letters: B batch, T query tokens, S key tokens, D model_dim, H query heads, G kv heads, K head_dim, F
mlp_dim, V vocab, N = B*T rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumi.kernels.bundle import DecodeAttention, Ops
from lumi.kernels.rope import rope_table
from lumi.model.compute_weights import ComputeWeights, JoinedWeights
from lumi.model.model_config import ModelConfig

Plans = Mapping[int | None, Any]  # plans of `ops.attention_plan`, by the windows of the layers


class LayerCache(Protocol):
    """Keys and values of one layer during generation (see `lumi.inference`)."""

    def attend(
        self,
        attention: DecodeAttention,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        positions_BT: Tensor,
        window: int | None,
    ) -> Tensor:
        """Store the new keys and values at their positions. Returns what the queries find, (B, T, H, K)."""
        ...


class Linear(nn.Module):
    """y = x W^T + b, mostly without b.

    The float32 masters are cast to the dtype of `x`, unless `joined` holds their values in it.
    """

    joined: JoinedWeights | None = None

    def __init__(self, in_features: int, out_features: int, ops: Ops, bias: bool = False):
        super().__init__()
        self.weight, self.ops = nn.Parameter(torch.empty(out_features, in_features)), ops
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None and self.joined.holds([self]):
            return self.joined.apply(x, self.ops.linear)[0]
        return self.ops.linear(x, self.weight, self.bias)


def apply_each(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Apply several linears to one input: by one product if their weights are joined."""
    first = linears[0]
    if isinstance(first, Linear) and first.joined is not None and first.joined.holds(linears):
        return first.joined.apply(x, first.ops.linear)
    return [linear(x) for linear in linears]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, size: int, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.ops = config.norm_eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum itself."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention of layer number `layer`, with rotary positions and grouped key-value heads.

    `project` applies the linears that share an input; LoRA puts its own in its place.
    """

    project: Callable[..., list[Tensor]]

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.ops, self.head_dim, self.project = ops, config.head_dim, apply_each
        self.window, self.has_rope = config.layer_window(layer), config.layer_has_rope(layer)
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.model_dim, q_dim, ops, config.qkv_bias)
        self.k_proj = Linear(config.model_dim, kv_dim, ops, config.qkv_bias)
        self.v_proj = Linear(config.model_dim, kv_dim, ops, config.qkv_bias)
        self.o_proj = Linear(q_dim, config.model_dim, ops)
        self.q_norm = RMSNorm(config.head_dim, config, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config, ops) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, context: "Context") -> Tensor:
        projected = self.project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTHK, k_BTGK, v_BTGK = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        if torch.is_grad_enabled() and (self.has_rope or self.q_norm is not None):
            # Backward keeps it. As columns of a product, it would also keep q and k before their rotation.
            v_BTGK = v_BTGK.contiguous()
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK.contiguous()), self.k_norm(k_BTGK.contiguous())
        if self.has_rope:
            q_BTHK, k_BTGK = self.ops.rope(q_BTHK, k_BTGK, context.cos, context.sin)
        if context.cache is None:
            out_BTHK = self.ops.attention(q_BTHK, k_BTGK, v_BTGK, context.plan)
        else:
            qkv, attention = (q_BTHK, k_BTGK, v_BTGK), self.ops.decode_attention
            out_BTHK = context.cache.attend(attention, *qkv, context.positions, self.window)
        return self.o_proj(out_BTHK.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202). `project` as in `Attention`."""

    project: Callable[..., list[Tensor]]

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.ops, self.project = ops, apply_each
        self.gate_proj = Linear(config.model_dim, config.mlp_dim, ops)
        self.up_proj = Linear(config.model_dim, config.mlp_dim, ops)
        self.down_proj = Linear(config.mlp_dim, config.model_dim, ops)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(*self.project(x_BTD, self.gate_proj, self.up_proj)))


class Layer(nn.Module):
    """One block: attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.model_dim, config, ops)
        self.attention = Attention(config, ops, layer)
        self.mlp_norm = RMSNorm(config.model_dim, config, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x_BTD: Tensor, context: "Context") -> Tensor:
        normed_BTD, x_BTD = self.mlp_norm.add(x_BTD, self.attention(self.attention_norm(x_BTD), context))
        return x_BTD + self.mlp(normed_BTD)


@dataclass(frozen=True)
class Context:
    """What a layer needs in one forward pass. All but `plan` and `cache` is the same for all layers."""

    positions: Tensor  # (B, T) int64
    cos: Tensor  # (B, T, K) float32
    sin: Tensor
    plan: Any  # from `ops.attention_plan`
    cache: LayerCache | None


class Transformer(nn.Module):
    """The language model.

    Args:
        config: its shape.
        ops: its operators, see `lumi.kernels.bundle`.
        compute_dtype: of activations and matrix products; weights stay float32.
        gradient_checkpointing: keep only each layer's input and recompute the rest in backward
            (Chen et al. 2016, arXiv:1604.06174).

    Attributes:
        z_loss: weight of log(sum of exp(logits))^2 in the loss of a token, in training alone
            (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        compute_dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.config, self.ops = config, ops
        self.compute_dtype, self.gradient_checkpointing = compute_dtype, gradient_checkpointing
        self.token_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.model_dim), freeze=False
        )
        self.windows = [config.layer_window(layer) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(Layer(config, ops, layer) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.model_dim, config, ops)
        self.lm_head = None if config.tied_embeddings else Linear(config.model_dim, config.vocab_size, ops)
        self.compute_weights: ComputeWeights | None = None
        self.z_loss = 0.0

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix from hidden states to logits: `lm_head`, or the embedding if they are tied."""
        return self.token_embedding.weight if self.lm_head is None else self.lm_head.weight

    def join_weights(self) -> "Transformer":
        """Hold weights as products read them (`lumi.model.compute_weights`): float32 masters under bfloat16
        products, and all that have the compute dtype.

        To be called when weights are on their device and adapters in place, but not before FSDP2. Frozen
        masters of another dtype are cast at every use, and so are all under float16.
        """
        groups: list[tuple[Linear | nn.Embedding, ...]] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            attention, mlp = layer.attention, layer.mlp
            groups += [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)]
            groups += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
        output = (self.token_embedding if self.lm_head is None else self.lm_head,)
        joined = {}
        for modules in (*groups, output):
            if self._joins(modules):
                joined[modules] = JoinedWeights(modules, self.compute_dtype)
            for module in modules:
                if isinstance(module, Linear):
                    module.joined = joined.get(modules)
        self.compute_weights = ComputeWeights(list(joined.values()), joined.get(output))
        return self

    def _joins(self, modules: Sequence[nn.Module]) -> bool:
        if not all(type(module) in (Linear, nn.Embedding) for module in modules):
            return False  # an adapter's, or with trained rows
        weights = [module.get_parameter("weight") for module in modules]
        if all(weight.dtype == self.compute_dtype for weight in weights):
            return len(weights) > 1
        masters = all(weight.dtype == torch.float32 and weight.requires_grad for weight in weights)
        return masters and self.compute_dtype == torch.bfloat16

    def init_weights(self, seed: int) -> "Transformer":
        """Set every parameter to its value in `initial_weights`."""
        with torch.no_grad():
            for name, value in self.initial_weights(seed):
                self.get_parameter(name).copy_(value)
        return self

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Names and random values, one parameter at a time. A seed gives the same weights on every device.

        Values are float32 on the CPU: Normal(0, 0.02), divided by sqrt(2 layers) for the two projections into
        the residual stream (GPT-2). Norms are one, biases zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                make = torch.zeros if name.endswith(".bias") else torch.ones
                yield name, make(parameter.shape)
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            yield name, torch.randn(parameter.shape, generator=generator) * std

    def attention_plans(
        self, cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device | str
    ) -> Plans:
        """What attention needs to know of the documents of a batch, for each of the layers' windows.

        Arguments and errors as of `kernels.attention_plan`. The plans may be moved to another device.
        """
        return {
            window: self.ops.attention_plan(cu_seqlens, batch, length, device, window)
            for window in set(self.windows)
        }

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | Plans | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """The last layer's hidden states, normalised.

        Args:
            tokens: (B, T) int64.
            positions: (B, T) int64, of each token in its document; None: 0 .. T-1 in every row.
            documents: (documents + 1,) int32, the offsets of the packed documents in the B*T tokens; or what
                `attention_plans` made of them; None: each row is one document.
            cache: one `LayerCache` per layer, which attention then reads; `documents` must be None.

        Returns:
            (B, T, D) in `compute_dtype`.
        """
        batch, length = tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(batch, length)
        if self.compute_weights is not None and not self.compute_weights.refresh():
            self.join_weights()
        cos, sin = rope_table(
            positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        if cache is not None:
            documents = dict.fromkeys(self.windows)
        elif documents is None or isinstance(documents, Tensor):
            documents = self.attention_plans(documents, batch, length, tokens.device)
        contexts = {window: Context(positions, cos, sin, plan, None) for window, plan in documents.items()}
        x_BTD = self.token_embedding(tokens).to(self.compute_dtype)
        for index, layer in enumerate(self.layers):
            context = contexts[self.windows[index]]
            if cache is not None:
                context = replace(context, cache=cache[index])
            if self.gradient_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, context, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, context)
        return self.final_norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) float32 logits from (..., D) hidden states."""
        return self.ops.linear(hidden, self.output_weight).float()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | Plans | None = None,
        expected_dloss: float = 1.0,
        per_token: bool = False,
    ) -> Tensor:
        """The summed next-token loss of a batch, in nats, float32; or (B, T), that of each token.

        Args:
            tokens, positions, documents: as for `hidden`.
            targets: (B, T) int64, already shifted; -100 is not trained.
            expected_dloss: the summed loss's gradient that makes backward cheapest.
            per_token: for losses that are no sum over the tokens. What is not trained is 0, and there is no
                z-loss.
        """
        hidden_ND = self.hidden(tokens, positions, documents).flatten(0, 1)
        copy_VD = None
        if self.compute_weights is not None and self.compute_weights.output is not None:
            copy_VD = self.compute_weights.output.values
        operands = hidden_ND, self.output_weight, targets.flatten()
        if per_token:
            return self.ops.token_losses(*operands, copy_VD=copy_VD).view_as(targets)
        z_loss = self.z_loss if self.training else 0.0
        return self.ops.linear_cross_entropy(
            *operands, z_loss=z_loss, expected_dloss=expected_dloss, copy_VD=copy_VD
        )
