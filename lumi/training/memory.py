"""What a process needs to train, in bytes, by arithmetic."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from lumi.data.batches import BatchConfig
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.linear_cross_entropy import chunk_rows, workspace_bytes
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout
from lumi.training.run_config import TrainConfig


class Frozen(NamedTuple):
    """Of training under adapters: their parameters, the bytes of a frozen weight, and whether rows of tokens are trained."""

    num_adapter_parameters: int
    weight_bytes: int
    rows: bool


def compute_and_reduce_bytes(config: TrainConfig) -> tuple[int, int]:
    """Bytes of a number of the compute dtype, and of one that goes to other processes to be summed."""
    reduces_narrow = config.dtype == "bfloat16" and config.parallel.reduce_dtype == "bfloat16"
    return torch.finfo(getattr(torch, config.dtype)).bits // 8, 2 if reduces_narrow else 4


def memory_of(
    config: TrainConfig, layout: Layout, device_type: str, kernels: str, num_trained: int | None = None
) -> dict[str, int]:
    """`memory_estimate` of a config.

    Args:
        kernels: the name of the operators in use.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.
    """
    narrow, reduce_bytes = compute_and_reduce_bytes(config)
    frozen, kind, checkpointing = None, config.optimizer.kind, config.gradient_checkpointing
    if num_trained is not None and config.lora is not None:
        frozen = Frozen(
            num_trained, 2 if config.lora.base_dtype == "bfloat16" else 4, bool(config.lora.tokens)
        )
    assert config.model is not None
    return memory_estimate(
        config.model,
        config.batches,
        kind,
        narrow,
        checkpointing,
        device_type,
        kernels,
        frozen,
        layout,
        reduce_bytes,
    )


def parameters_held(model: ModelConfig, shard: int = 1, tensor: int = 1) -> tuple[int, int]:
    """Parameters of one layer, and of all that is outside the layers, on the process that holds the most.

    Tensor parallelism gives each process rows or columns of a matrix, as `lumi.parallel.tensor_parallel` has it, and every norm whole; of what
    is then there FSDP2 gives it its share of the rows.
    """
    with torch.device("meta"):
        parameters = dict(Transformer(replace(model, num_layers=1), REFERENCE).named_parameters())
    layer = root = 0
    for name, parameter in parameters.items():
        in_layer, rows, columns = (
            name.startswith("layers."),
            len(parameter),
            parameter.numel() // len(parameter),
        )
        if parameter.ndim == 2 and in_layer and not name.endswith(("o_proj.weight", "down_proj.weight")):
            rows //= tensor
        elif parameter.ndim == 2:
            columns //= tensor
        held = math.ceil(rows / shard) * columns
        layer, root = (layer + held, root) if in_layer else (layer, root + held)
    return layer, root


def memory_estimate(
    model: ModelConfig,
    batches: BatchConfig,
    optimizer: str,
    compute_bytes: int,
    checkpointing: bool,
    device_type: str,
    kernels: str = "reference",
    frozen: Frozen | None = None,
    layout: Layout = Layout(1, 1, 1),  # noqa: B008 (a tuple)
    reduce_bytes: int = 4,
) -> dict[str, int]:
    """Bytes the fullest process needs to train, by part; arithmetic, not a measurement, and without what torch itself takes.

    Weights, gradients and optimizer state are float32; backward also keeps a copy of the layers' weights in a narrower compute dtype.
    For it a layer of the reference operators keeps about 4D + 2(H+G)K + 3F values a token in the compute dtype and 6D + 2(H+G)K + 3F
    in float32 (norms, rotation, SwiGLU), and a layer of the Triton operators the former and H + 2 in float32 (a sum per head and norm);
    with checkpointing only its input D. The loss of the reference holds the logits of one chunk of rows thrice (as they are, their float32
    log-softmax, their gradient) and its matrix's float32 gradient twice; that of Triton says itself what it takes. Under adapters only
    they have gradients and states; the matrices of tokens of which rows are trained are put together anew, and have a gradient.

    Several processes. DDP holds all gradients once more in its buckets. FSDP2 holds float32 shards of weights, gradients and states; of
    weights `gathered` in the compute dtype there are two layers at a time (one at work, one on its way) and all outside the layers, and
    of their gradients one layer in the compute dtype and one on its way in the reduce dtype; in a step of several micro-steps the
    `whole gradients` of all parameters wait for the last one in the reduce dtype. With replicas the shards of gradients that they have
    summed in a narrower reduce dtype stay, as `reduced`, until backward ends. Tensor parallelism by t divides all of it but the
    norms, and a token's values but the 2D that attention and MLP take, which are gathered; embedding and lm_head are gathered whole, in
    the compute dtype.
    """
    triton = kernels == "triton"
    tokens = batches.micro_batch_rows * batches.sequence_length
    parts = _held(model, batches, optimizer, compute_bytes, frozen, layout, reduce_bytes)
    parts["activations"] = tokens * _kept_per_token(
        model, compute_bytes, checkpointing, triton, layout.tensor
    )
    weight_bytes = compute_bytes if _is_sharded(layout) else frozen.weight_bytes if frozen else 4
    rows_trained = frozen is None or frozen.rows
    parts["loss"] = _loss_bytes(
        model, tokens // layout.tensor, compute_bytes, weight_bytes, rows_trained, device_type, triton
    )
    return {**parts, "total": sum(parts.values())}


def _is_sharded(layout: Layout) -> bool:
    return layout.shard > 1 or layout.tensor > 1


def _held(
    model: ModelConfig,
    batches: BatchConfig,
    optimizer: str,
    compute_bytes: int,
    frozen: Frozen | None,
    layout: Layout,
    reduce_bytes: int,
) -> dict[str, int]:
    """Weights, gradients, states, and what is there of them for a time."""
    adapters, weight_bytes, rows_trained = frozen or Frozen(0, 4, True)
    layer, root = parameters_held(model, layout.shard, layout.tensor)
    held, own_adapters = model.num_layers * layer + root, math.ceil(adapters / layout.shard)
    trained = own_adapters if frozen else held
    states = (
        2 * trained
        if optimizer == "adamw"
        else trained + (0 if frozen else root - math.ceil(model.model_dim / layout.shard))
    )
    parts = {
        "weights": weight_bytes * held + 4 * own_adapters,
        "gradients": 4 * trained,
        "optimizer": 4 * states,
    }
    embeddings = model.vocab_size * model.model_dim * (1 if model.tied_embeddings else 2)
    if frozen and rows_trained:
        parts["weights"] += weight_bytes * embeddings
    if not _is_sharded(layout):
        parts["weights"] += compute_bytes * (held - embeddings) if compute_bytes < weight_bytes else 0
        return parts | ({"buckets": 4 * trained} if layout.replicate > 1 else {})
    layer, root = parameters_held(model, 1, layout.tensor)
    if batches.micro_steps(layout.data) > 1:
        parts["whole gradients"] = reduce_bytes * (adapters if frozen else model.num_layers * layer + root)
    if layout.replicate > 1 and reduce_bytes < 4:
        parts["reduced"] = reduce_bytes * trained
    gathered = compute_bytes * (2 * layer + root + (embeddings if layout.tensor > 1 else 0))
    return parts | {"gathered": gathered + (0 if frozen else (compute_bytes + reduce_bytes) * layer)}


def _kept_per_token(
    model: ModelConfig, compute_bytes: int, checkpointing: bool, triton: bool, tensor: int
) -> int:
    """Bytes that backward finds of a token of a micro-batch on one of `tensor` processes."""
    heads, dim, mlp = (
        2 * (model.num_heads + model.num_kv_heads) * model.head_dim,
        model.model_dim,
        model.mlp_dim,
    )
    wide = model.num_heads + 2 if triton else 6 * dim + heads + 3 * mlp
    whole = 2 * dim if tensor > 1 else 0
    per_layer = (
        compute_bytes * whole + (compute_bytes * (4 * dim - whole + heads + 3 * mlp) + 4 * wide) // tensor
    )
    return (
        compute_bytes * model.num_layers * dim // tensor + per_layer
        if checkpointing
        else model.num_layers * per_layer
    )


def _loss_bytes(
    model: ModelConfig,
    tokens: int,
    compute_bytes: int,
    weight_bytes: int,
    rows_trained: bool,
    device_type: str,
    triton: bool,
) -> int:
    """What the loss of `tokens` tokens takes; its matrix comes with `weight_bytes` a number."""
    vocab, dim = model.vocab_size, model.model_dim
    if triton:
        dtype, weight_dtype = (
            torch.float32 if size == 4 else torch.bfloat16 for size in (compute_bytes, weight_bytes)
        )
        return workspace_bytes(tokens, dim, vocab, dtype, weight_dtype, True, rows_trained, device_type)
    rows = min(tokens, chunk_rows(vocab, device_type))
    return (4 + 2 * compute_bytes) * rows * vocab + (8 * vocab * dim if rows_trained else 0)
