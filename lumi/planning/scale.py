"""Training on many GPUs, on paper: memory, communication, time and checkpoints of a config, by arithmetic. Nothing here was measured
unless the figures that go in were.

What goes over the wire, of n bytes that k processes gather, scatter or sum: a ring sends n (k-1)/k from each for an all-gather or a
reduce-scatter, 2 n (k-1)/k for an all-reduce and n for a broadcast (Thakur, Rabenseifner & Gropp 2005). In one step of M micro-steps, with
L layers, c bytes a number of the compute dtype and r of the reduce dtype, each process takes part in

    replicate only (DDP)   all-reduce of all gradients, r, once
    shard (FSDP2)          all-gather of each layer, c, in forward and again in backward of every micro-step, and once of what is outside
                           the layers; reduce-scatter of all gradients, r, once; with replicate an all-reduce of the shards of gradients
    tensor                 per layer and micro-step: 4 all-gathers and 4 reduce-scatters of (B, T, D), c, half of them in backward, and 2
                           and 1 more where gradient checkpointing does a layer over; embedding and lm_head: all-gather in forward,
                           reduce-scatter in backward, c, every micro-step; all-reduce of the gradients of the layers' norms,
                           once, and of the last norm's, every micro-step
    muon in parts          all-gather of the layers' matrices in bfloat16 and broadcast of their updates, once

Processes lie on the nodes by rank: those of a `tensor` group side by side, then `shard`, then `replicate`. A group inside a node uses
NVLink. In a group over several nodes every member's network card works for the group, so its ring goes at the speed of all cards that it
has in a node, and of NVLink at most. Latency is not counted: small models on many nodes are slower than this says.

Time: products take FLOPs / (mfu x peak), where `mfu` is what one GPU reaches by itself, as `metrics.jsonl` shows it; a third of it is
forward's; checkpointing does the layers' forward once more. What FSDP2 and DDP move for the layers runs beside the products and costs only
what is longer than they are; for backward FSDP2's sums beside the last micro-step's. All else stops the GPU: what is outside the layers,
tensor parallelism, Muon's matrices. AdamW reads and writes 28 bytes a parameter; Muon's products are five Newton-Schulz turns of one
matrix after the other, for `lumi.training.muon` has all processes wait for the one whose turn it is.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lumi.config import UserError
from lumi.host.devices import GPUS
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout
from lumi.training.memory import compute_and_reduce_bytes, parameters_held
from lumi.training.run_config import TrainConfig

FORWARD, BACKWARD, LAST_BACKWARD, NOTHING = "forward", "backward", "the last backward", "nothing"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a plan. Bandwidths are of one direction, as data sheets have them; `link_share` is what is reached of them."""

    nodes: int
    gpus_per_node: int
    gpu: str = "H100"  # a name in lumi.host.devices.GPUS
    mfu: float = 0.45  # of one GPU by itself, without recomputation
    network_gbps: float = 400.0  # gigabits/s that each GPU sends to other nodes
    nvlink_gbps: float | None = None  # gigabits/s that each GPU sends inside its node; None: the data sheet's
    link_share: float = 0.8
    disk_gb_per_second: float = 5.0  # gigabytes/s that the shared disk takes from all nodes together
    host_gb_per_second: float = 20.0  # gigabytes/s from each GPU to its host's memory

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError("gpu", f"must be one of {', '.join(GPUS)}", got=repr(self.gpu))
        for name in ("nodes", "gpus_per_node"):
            if (value := getattr(self, name)) < 1:
                raise UserError(name, "must be at least 1", got=value)
        for name in ("mfu", "link_share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(name, "must be above 0 and at most 1", got=value)
        for name in ("network_gbps", "nvlink_gbps", "disk_gb_per_second", "host_gb_per_second"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(name, "must be positive", got=value)

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes, which is processes."""
        return self.nodes * self.gpus_per_node

    @property
    def flops(self) -> float:
        """What one GPU reaches by itself, in FLOP/s."""
        return self.mfu * GPUS[self.gpu].flops

    def bandwidth(self, layout: Layout, side: str) -> tuple[float, bool]:
        """Bytes/s that each process of a group sends in a ring, and whether the group reaches over several nodes."""
        stride = {"tensor": 1, "shard": layout.tensor, "replicate": layout.tensor * layout.shard, "world": 1}[
            side
        ]
        ranks = group_size(layout, side)
        nvlink = GPUS[self.gpu].link_bandwidth if self.nvlink_gbps is None else self.nvlink_gbps * 1e9 / 8
        if self.nodes == 1 or self.gpus_per_node % (stride * ranks) == 0:
            return self.link_share * nvlink, False
        cards = min(ranks, max(1, self.gpus_per_node // stride))
        return self.link_share * min(nvlink, cards * self.network_gbps * 1e9 / 8), True


class Collective(NamedTuple):
    """One kind of communication in a step."""

    name: str
    kind: str  # all-gather, reduce-scatter, all-reduce, broadcast
    side: str  # of the mesh: replicate, shard, tensor; or world
    calls: int  # in a step
    num_bytes: int  # of what is gathered, scattered, summed or broadcast in all these calls
    beside: str  # the work that hides it

    def sent_bytes(self, layout: Layout) -> float:
        """What each process sends in a step."""
        ranks = group_size(layout, self.side)
        share = (ranks - 1) / ranks
        return self.num_bytes * {"all-reduce": 2 * share, "broadcast": float(ranks > 1)}.get(self.kind, share)


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


def group_size(layout: Layout, side: str) -> int:
    """Processes of one group along a side of the mesh; "world": all of them."""
    return layout.data * layout.tensor if side == "world" else getattr(layout, side)


def collectives(config: TrainConfig, layout: Layout) -> list[Collective]:
    """All that the processes say to each other in a step, but for single numbers."""
    model = config.model
    assert model is not None
    _, reduce_bytes = compute_and_reduce_bytes(config)
    if layout.shard == layout.tensor == 1:
        calls = [
            Collective(
                "gradients", "all-reduce", "replicate", 1, reduce_bytes * model.num_parameters, LAST_BACKWARD
            )
        ]
    else:
        calls = _of_shards(config, model, layout) + _of_tensors(config, model, layout)
        calls += _of_muon(model, layout) if config.optimizer.kind == "muon" else []
    return [call for call in calls if group_size(layout, call.side) > 1]


def _of_shards(config: TrainConfig, model: ModelConfig, layout: Layout) -> list[Collective]:
    narrow, reduce_bytes = compute_and_reduce_bytes(config)
    layers, micro_steps = model.num_layers, config.batches.micro_steps(layout.data)
    layer, root = parameters_held(model, layout.shard, layout.tensor)
    inside, outside, times = layers * layout.shard * layer, layout.shard * root, layers * micro_steps
    return [
        Collective(
            "layers' weights, forward", "all-gather", "shard", times, narrow * micro_steps * inside, FORWARD
        ),
        Collective(
            "layers' weights, backward", "all-gather", "shard", times, narrow * micro_steps * inside, BACKWARD
        ),
        Collective(
            "other weights", "all-gather", "shard", micro_steps, narrow * micro_steps * outside, NOTHING
        ),
        Collective(
            "layers' gradients", "reduce-scatter", "shard", layers, reduce_bytes * inside, LAST_BACKWARD
        ),
        Collective("other gradients", "reduce-scatter", "shard", 1, reduce_bytes * outside, NOTHING),
        Collective(
            "shards of gradients, layers",
            "all-reduce",
            "replicate",
            layers,
            reduce_bytes * layers * layer,
            LAST_BACKWARD,
        ),
        Collective("shards of gradients, other", "all-reduce", "replicate", 1, reduce_bytes * root, NOTHING),
    ]


def _of_tensors(config: TrainConfig, model: ModelConfig, layout: Layout) -> list[Collective]:
    narrow, reduce_bytes = compute_and_reduce_bytes(config)
    micro_steps, batches, again = (
        config.batches.micro_steps(layout.data),
        config.batches,
        config.gradient_checkpointing,
    )
    values = narrow * batches.micro_batch_rows * batches.sequence_length * model.model_dim
    gathers, scatters = ((4 + more * again) * model.num_layers * micro_steps for more in (2, 1))
    matrices = (1 if model.tied_embeddings else 2) * micro_steps
    embeddings = narrow * matrices * model.vocab_size * model.model_dim
    norms = 2 * model.num_layers * (1 + model.qk_norm)
    norm_values = 2 * model.num_layers * (model.model_dim + model.qk_norm * model.head_dim)
    norm_bytes = (
        norm_values * (reduce_bytes if micro_steps > 1 else narrow) + micro_steps * narrow * model.model_dim
    )
    return [
        Collective("tokens' values", "all-gather", "tensor", gathers, gathers * values, NOTHING),
        Collective(
            "tokens' values, summed", "reduce-scatter", "tensor", scatters, scatters * values, NOTHING
        ),
        Collective("embedding and lm_head", "all-gather", "tensor", matrices, embeddings, NOTHING),
        Collective("their gradients", "reduce-scatter", "tensor", matrices, embeddings, NOTHING),
        Collective("norms' gradients", "all-reduce", "tensor", norms + micro_steps, norm_bytes, NOTHING),
    ]


def _of_muon(model: ModelConfig, layout: Layout) -> list[Collective]:
    shapes = matrices_of_layers(model)
    calls, num_bytes = (
        sum(shapes.values()),
        2 * sum(rows * columns * count for (rows, columns), count in shapes.items()),
    )
    return [
        Collective("muon's matrices", "all-gather", "shard", calls, num_bytes // layout.tensor, NOTHING),
        Collective("muon's matrices, whole", "all-gather", "tensor", calls, num_bytes, NOTHING),
        Collective("muon's updates", "broadcast", "world", calls, num_bytes, NOTHING),
    ]


def matrices_of_layers(model: ModelConfig) -> Counter[tuple[int, int]]:
    """How many matrices of each shape the layers hold: what Muon trains."""
    with torch.device("meta"):
        layer = Transformer(replace(model, num_layers=1), REFERENCE).layers
    shapes = Counter((len(p), p.shape[1]) for p in layer.parameters() if p.ndim == 2)
    return Counter({shape: model.num_layers * count for shape, count in shapes.items()})


def step_time(config: TrainConfig, layout: Layout, cluster: Cluster) -> StepTime:
    """How long a step takes, without reading data, validation and checkpoints."""
    model, micro_steps = config.model, config.batches.micro_steps(layout.data)
    assert model is not None
    attention = 6 * model.num_heads * model.head_dim * config.batches.sequence_length
    layer_flops = model.num_layers * (6 * parameters_held(model)[0] + attention)
    tokens = config.batches.batch_tokens / cluster.num_gpus
    products = tokens * model.flops_per_token(config.batches.sequence_length) / cluster.flops
    again = tokens * layer_flops / 3 / cluster.flops if config.gradient_checkpointing else 0.0
    seconds = dict.fromkeys((FORWARD, BACKWARD, LAST_BACKWARD, NOTHING), 0.0)
    for call in collectives(config, layout):
        seconds[call.beside] += call.sent_bytes(layout) / cluster.bandwidth(layout, call.side)[0]
    work, gathering = (products * 2 / 3 + again) / micro_steps, seconds[BACKWARD] / micro_steps
    exposed = seconds[NOTHING] + max(0.0, seconds[FORWARD] - products / 3)
    exposed += (micro_steps - 1) * max(0.0, gathering - work) + max(
        0.0, gathering + seconds[LAST_BACKWARD] - work
    )
    return StepTime(
        products, again, optimizer_seconds(config, layout, cluster), sum(seconds.values()), exposed
    )


def optimizer_seconds(config: TrainConfig, layout: Layout, cluster: Cluster) -> float:
    """How long the update of the weights takes."""
    model = config.model
    assert model is not None
    layer, root = parameters_held(model, layout.shard, layout.tensor)
    held = root + (model.num_layers * layer if config.optimizer.kind == "adamw" else 0)
    seconds = 28 * held / GPUS[cluster.gpu].memory_bandwidth
    if config.optimizer.kind == "muon":
        sides = [(min(shape), max(shape), count) for shape, count in matrices_of_layers(model).items()]
        flops = sum(5 * (4 * short**2 * long + 2 * short**3) * count for short, long, count in sides)
        matrices = sum(matrices_of_layers(model).values())
        shared = (
            math.ceil(matrices / cluster.num_gpus) / matrices
            if layout.shard > 1 or layout.tensor > 1
            else 1.0
        )
        seconds += shared * flops / cluster.flops
    return seconds


def checkpoint_bytes(config: TrainConfig) -> int:
    """Size of a checkpoint: float32 weights, and two states of each; one of those that Muon trains."""
    model = config.model
    assert model is not None
    of_muon = sum(rows * columns * count for (rows, columns), count in matrices_of_layers(model).items())
    return 12 * model.num_parameters - (4 * of_muon if config.optimizer.kind == "muon" else 0)
