"""What a run is about to do: parameters, tokens, steps, FLOPs and memory, by arithmetic, before step 1."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lumi.parallel.layout import describe_layout
from lumi.training.memory import memory_of
from lumi.training.run_config import TrainConfig


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
    model, batches, layout = config.model, config.batches, config.parallel.layout(num_processes)
    assert model is not None
    flops = model.flops_per_token(batches.sequence_length, frozen=num_trained is not None) * config.num_tokens
    memory = memory_of(config, layout, device.type, kernels, num_trained)
    other = replace(config, gradient_checkpointing=not config.gradient_checkpointing)
    activations = memory_of(other, layout, device.type, kernels, num_trained)["activations"] / 2**20
    otherwise = f"{'with' if other.gradient_checkpointing else 'without'} checkpointing activations {activations:,.0f} MiB"
    trained = (
        ""
        if num_trained is None
        else f"; {num_trained:,} of adapters are trained ({num_trained / model.num_parameters:.2%})"
    )
    readers = ("group", "groups") if layout.tensor > 1 else ("process", "processes")
    processes = f"{layout.data} {readers[layout.data > 1]}"
    shares = f"{processes} x {batches.micro_steps(layout.data)} micro-steps x {batches.micro_batch_rows} rows x {batches.sequence_length}"
    epochs = [
        f"{name}: {w:.1%} of the rows, {n:,} tokens, {w * config.num_tokens / n:.2f} epochs"
        for name, w, n in data
    ]
    rows = {
        "model": f"{model.num_parameters:,} parameters, {model.num_layers} layers of {model.model_dim}{trained}",
        "device": f"{num_processes} x {device.type}, {config.dtype}, {kernels} kernels",
        **({"layout": describe_layout(layout)} if num_processes > 1 else {}),
        "tokens": f"{config.num_tokens:,} ({config.num_tokens / model.num_parameters:.1f} per parameter)",
        "steps": f"{config.num_steps:,} of {batches.batch_tokens:,} tokens: {shares}",
        "compute": f"{flops:.3g} FLOPs"
        + (f", {flops / peak_flops / 3600:.2f} h at peak" if peak_flops else ""),
        "memory": ", ".join(f"{part} {size / 2**20:,.0f} MiB" for part, size in memory.items())
        + f" (a process, estimated; {otherwise})",
        "data": "; ".join(epochs),
        "validation": f"{num_validation_tokens:,} tokens"
        if num_validation_tokens
        else "none: no validation split",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows.items())
