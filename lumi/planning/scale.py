"""Time and checkpoints of training on many GPUs, by arithmetic; nothing is measured but what goes in.

Products take FLOPs / (mfu x peak); `mfu` is what one GPU reaches by itself, as `metrics.jsonl` shows it. A
third of that time is forward's, and gradient checkpointing repeats the layers' forward. FSDP2 and DDP move
layers while the products run, so moving them costs only the time by which it is longer; the sums of FSDP2 run
beside the last micro-step's backward.
Everything else stops the GPU: what is outside the layers, tensor parallelism, Muon's matrices. AdamW reads
and writes 28 bytes a parameter. Muon's products are five Newton-Schulz turns of one matrix after the other:
in `lumi.training.muon` all processes wait for the one whose turn it is.
"""

import math
from typing import NamedTuple

from lumi.host.devices import GPUS
from lumi.parallel.layout import Layout
from lumi.planning.cluster import Cluster
from lumi.planning.communication import (
    BACKWARD,
    FORWARD,
    LAST_BACKWARD,
    NOTHING,
    collectives,
)
from lumi.training.memory import matrices_of_layers, parameters_held, rows_of_matrices
from lumi.training.run_config import TrainConfig


class StepTime(NamedTuple):
    """Seconds of one step. `communication` is all of it, `exposed` what the GPU waits for."""

    products: float
    recomputation: float
    optimizer: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """The step from end to end."""
        return self.products + self.recomputation + self.optimizer + self.exposed


def step_time(config: TrainConfig, layout: Layout, cluster: Cluster) -> StepTime:
    """How long a step takes, without reading data, validation and checkpoints."""
    model, micro_steps = config.model, config.batches.micro_steps(layout.data)
    assert model is not None
    attention = model.attention_flops_per_token(config.batches.sequence_length)
    layer_flops = model.num_layers * 6 * parameters_held(model)[0] + attention
    tokens = config.batches.batch_tokens / cluster.num_gpus
    products = tokens * model.flops_per_token(config.batches.sequence_length) / cluster.flops
    again = tokens * layer_flops / 3 / cluster.flops if config.gradient_checkpointing else 0.0
    seconds = dict.fromkeys((FORWARD, BACKWARD, LAST_BACKWARD, NOTHING), 0.0)
    for call in collectives(config, layout):
        seconds[call.beside] += call.sent_bytes(layout) / cluster.bandwidth(layout, call.side)[0]
    backward, gathering = (products * 2 / 3 + again) / micro_steps, seconds[BACKWARD] / micro_steps
    exposed = seconds[NOTHING] + max(0.0, seconds[FORWARD] - products / 3)
    exposed += (micro_steps - 1) * max(0.0, gathering - backward)
    exposed += max(0.0, gathering + seconds[LAST_BACKWARD] - backward)
    update = optimizer_seconds(config, layout, cluster)
    return StepTime(products, again, update, sum(seconds.values()), exposed)


def optimizer_seconds(config: TrainConfig, layout: Layout, cluster: Cluster) -> float:
    """How long the update of the weights takes."""
    model = config.model
    assert model is not None
    layer, root = parameters_held(model, layout.shard, layout.tensor)
    held = root + (model.num_layers * layer if config.optimizer.kind == "adamw" else 0)
    seconds = 28 * held / GPUS[cluster.gpu].memory_bandwidth
    if config.optimizer.kind == "muon":
        shapes = matrices_of_layers(model)
        sides = [(min(shape), max(shape), count) for shape, count in shapes.items()]
        flops = sum(5 * (4 * short**2 * long + 2 * short**3) * count for short, long, count in sides)
        share, matrices = 1.0, sum(shapes.values())
        if layout.shard > 1 or layout.tensor > 1:
            share = math.ceil(matrices / cluster.num_gpus) / matrices
        seconds += share * flops / cluster.flops
    return seconds


def checkpoint_bytes(config: TrainConfig) -> int:
    """Size of a checkpoint: float32 weights, and two states of each; one state where Muon trains it.

    A moving average is as large as the weights.
    """
    model = config.model
    assert model is not None
    numbers = (4 if config.final == "ema" else 3) * model.num_parameters
    if config.optimizer.kind == "muon":
        matrices = matrices_of_layers(model)
        numbers -= sum(rows * columns * count for (rows, columns), count in matrices.items())
    if config.optimizer.muon_beta2 is not None:
        numbers += rows_of_matrices(model)
    return 4 * numbers
