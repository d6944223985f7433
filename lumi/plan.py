"""What a run is about to do: parameters, tokens, steps, FLOPs and memory, by arithmetic, before step 1."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lumi.batches import BatchConfig
from lumi.kernels.linear_cross_entropy import chunk_rows, workspace_bytes
from lumi.model import ModelConfig
from lumi.run_config import TrainConfig


class Frozen(NamedTuple):
    """Of training under adapters: their parameters, the bytes of a frozen weight, and whether rows of tokens are trained."""

    num_adapter_parameters: int
    weight_bytes: int
    rows: bool


def describe_plan(
    config: TrainConfig,
    data: Sequence[tuple[str, float, int]],
    num_validation_tokens: int,
    num_processes: int,
    device: torch.device,
    kernels: str,
    peak_flops: float | None,
    num_trained: int | None = None,
) -> str:
    """The plan as a table.

    Args:
        data: per data folder its name, its share of the rows and its training tokens.
        kernels: the name of the operators in use.
        peak_flops: of all devices together, in FLOP/s; None where it is not known.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.
    """
    model, batches, narrow = config.model, config.batches, torch.finfo(getattr(torch, config.dtype)).bits // 8
    assert model is not None
    flops = model.flops_per_token(batches.sequence_length, frozen=num_trained is not None) * config.num_tokens
    frozen = None
    if num_trained is not None and config.lora is not None:
        frozen = Frozen(num_trained, 2 if config.lora.base_dtype == "bfloat16" else 4, bool(config.lora.tokens))
    memory = memory_estimate(model, batches, config.optimizer.kind, narrow, config.gradient_checkpointing, device.type, kernels, frozen)
    trained = "" if num_trained is None else f"; {num_trained:,} of adapters are trained ({num_trained / model.num_parameters:.2%})"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    shares = f"{processes} x {batches.micro_steps(num_processes)} micro-steps x {batches.micro_batch_size} rows x {batches.sequence_length}"
    epochs = [f"{name}: {w:.1%} of the rows, {n:,} tokens, {w * config.num_tokens / n:.2f} epochs" for name, w, n in data]
    rows = {
        "model": f"{model.num_parameters:,} parameters, {model.num_layers} layers of {model.model_dim}{trained}",
        "device": f"{num_processes} x {device.type}, {config.dtype}, {kernels} kernels",
        "tokens": f"{config.num_tokens:,} ({config.num_tokens / model.num_parameters:.1f} per parameter)",
        "steps": f"{config.num_steps:,} of {batches.batch_tokens:,} tokens: {shares}",
        "compute": f"{flops:.3g} FLOPs" + (f", {flops / peak_flops / 3600:.2f} h at peak" if peak_flops else ""),
        "memory": ", ".join(f"{part} {size / 2**20:,.0f} MiB" for part, size in memory.items()) + " (a process, estimated)",
        "data": "; ".join(epochs),
        "validation": f"{num_validation_tokens:,} tokens" if num_validation_tokens else "none: no validation split",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows.items())


def memory_estimate(
    model: ModelConfig,
    batches: BatchConfig,
    optimizer: str,
    compute_bytes: int,
    checkpointing: bool,
    device_type: str,
    kernels: str = "reference",
    frozen: Frozen | None = None,
) -> dict[str, int]:
    """Bytes one process needs to train, by part; arithmetic, not a measurement, and without what torch itself takes.

    Weights, gradients and optimizer state are float32; backward also keeps a copy of the layers' weights in a narrower compute dtype.
    For it a layer of the reference operators keeps about 4D + 2(H+G)K + 3F values a token in the compute dtype and 6D + 2(H+G)K + 3F
    in float32 (norms, rotation, SwiGLU), and a layer of the Triton operators the former and H + 2 in float32 (a sum per head and norm);
    with checkpointing only its input D. The loss of the reference holds the logits of one chunk of rows thrice (as they are, their float32
    log-softmax, their gradient) and its matrix's float32 gradient twice; that of Triton says itself what it takes. Under adapters only
    they have gradients and states; the matrices of tokens of which rows are trained are put together anew, and have a gradient.
    """
    triton = kernels == "triton"
    tokens = batches.micro_batch_size * batches.sequence_length
    heads, dim, mlp = 2 * (model.num_heads + model.kv_heads) * model.per_head, model.model_dim, model.mlp_dim
    wide = model.num_heads + 2 if triton else 6 * dim + heads + 3 * mlp
    per_layer = compute_bytes * (4 * dim + heads + 3 * mlp) + 4 * wide
    kept = compute_bytes * model.num_layers * dim + per_layer if checkpointing else model.num_layers * per_layer
    embeddings = model.vocab_size * model.model_dim * (1 if model.tied_embeddings else 2)
    adapters, weight_bytes, rows_trained = frozen or Frozen(0, 4, True)
    trained = adapters if frozen else model.num_parameters
    states = 2 * trained if optimizer == "adamw" else trained + (0 if frozen else embeddings)
    copies = model.num_parameters - embeddings if compute_bytes < weight_bytes else 0
    put_together = weight_bytes * embeddings if frozen and rows_trained else 0
    if triton:
        dtype, weight_dtype = (torch.float32 if size == 4 else torch.bfloat16 for size in (compute_bytes, weight_bytes))
        loss = workspace_bytes(tokens, dim, model.vocab_size, dtype, weight_dtype, True, rows_trained, device_type)
    else:
        rows = min(tokens, chunk_rows(model.vocab_size, device_type))
        loss = (4 + 2 * compute_bytes) * rows * model.vocab_size + (8 * model.vocab_size * dim if rows_trained else 0)
    parts = {
        "weights": weight_bytes * model.num_parameters + compute_bytes * copies + 4 * adapters + put_together,
        "gradients": 4 * trained,
        "optimizer": 4 * states,
        "activations": tokens * kept,
        "loss": loss,
    }
    return {**parts, "total": sum(parts.values())}
