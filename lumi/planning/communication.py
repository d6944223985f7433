"""What processes send each other in one step, counted from the config.

Of n bytes that k processes gather, scatter or sum, a ring sends n (k-1)/k from each for an all-gather or a
reduce-scatter, 2 n (k-1)/k for an all-reduce and n for a broadcast (Thakur, Rabenseifner & Gropp 2005). In
one step of M micro-steps, with L layers, c bytes a number in the compute dtype and r in the reduce dtype,
each process takes part in

    replicate only (DDP)   all-reduce of all gradients, r, once
    shard (FSDP2)          all-gather of each layer, c, in forward and again in backward of every micro-step,
                           and once of what is outside the layers; reduce-scatter of all gradients, r, once;
                           with replicate an all-reduce of the shards of gradients
    tensor                 per layer and micro-step: 4 all-gathers and 4 reduce-scatters of (B, T, D), c, half
                           of them in backward; 2 and 1 more where gradient checkpointing repeats a layer;
                           embedding and lm_head: all-gather in forward, reduce-scatter in backward, c, every
                           micro-step; all-reduce of the gradients of the layers' norms, once, and of the last
                           norm's, every micro-step
    muon in parts          all-gather of the layers' matrices in bfloat16, broadcast of their updates, once
"""

from typing import NamedTuple

from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout
from lumi.planning.cluster import group_size
from lumi.training.memory import compute_and_reduce_bytes, matrices_of_layers, parameters_held
from lumi.training.run_config import TrainConfig

FORWARD, BACKWARD, LAST_BACKWARD, NOTHING = "forward", "backward", "the last backward", "nothing"


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


def collectives(config: TrainConfig, layout: Layout) -> list[Collective]:
    """All communication of a step, except that of single numbers."""
    model = config.model
    assert model is not None
    if layout.shard == layout.tensor == 1:
        num_bytes = compute_and_reduce_bytes(config)[1] * model.num_parameters
        calls = [Collective("gradients", "all-reduce", "replicate", 1, num_bytes, LAST_BACKWARD)]
    else:
        calls = _of_shards(config, model, layout) + _of_tensors(config, model, layout)
        calls += _of_muon(model, layout) if config.optimizer.kind == "muon" else []
    return [call for call in calls if group_size(layout, call.side) > 1]


def _of_shards(config: TrainConfig, model: ModelConfig, layout: Layout) -> list[Collective]:
    narrow, wide = compute_and_reduce_bytes(config)
    layers, micro_steps = model.num_layers, config.batches.micro_steps(layout.data)
    layer, root = parameters_held(model, layout.shard, layout.tensor)
    inside, outside = layers * layout.shard * layer, layout.shard * root
    weights, times = narrow * micro_steps * inside, layers * micro_steps
    others, shards = narrow * micro_steps * outside, wide * layers * layer
    return [
        Collective("layers' weights, forward", "all-gather", "shard", times, weights, FORWARD),
        Collective("layers' weights, backward", "all-gather", "shard", times, weights, BACKWARD),
        Collective("other weights", "all-gather", "shard", micro_steps, others, NOTHING),
        Collective("layers' gradients", "reduce-scatter", "shard", layers, wide * inside, LAST_BACKWARD),
        Collective("other gradients", "reduce-scatter", "shard", 1, wide * outside, NOTHING),
        Collective("shards of gradients, layers", "all-reduce", "replicate", layers, shards, LAST_BACKWARD),
        Collective("shards of gradients, other", "all-reduce", "replicate", 1, wide * root, NOTHING),
    ]


def _of_tensors(config: TrainConfig, model: ModelConfig, layout: Layout) -> list[Collective]:
    narrow, wide = compute_and_reduce_bytes(config)
    batches, micro_steps = config.batches, config.batches.micro_steps(layout.data)
    values = narrow * batches.micro_batch_rows * batches.sequence_length * model.model_dim
    of_layer = (6, 5) if config.gradient_checkpointing else (4, 4)
    gathers, sums = (times * model.num_layers * micro_steps for times in of_layer)
    matrices = (1 if model.tied_embeddings else 2) * micro_steps
    embeddings = narrow * matrices * model.vocab_size * model.model_dim
    norms, norm_values = 2 * model.num_layers, 2 * model.num_layers * model.model_dim
    if model.qk_norm:
        norms, norm_values = 2 * norms, norm_values + 2 * model.num_layers * model.head_dim
    layers_norms = norm_values * (wide if micro_steps > 1 else narrow)
    norm_bytes = layers_norms + micro_steps * narrow * model.model_dim
    return [
        Collective("tokens' values", "all-gather", "tensor", gathers, gathers * values, NOTHING),
        Collective("tokens' values, summed", "reduce-scatter", "tensor", sums, sums * values, NOTHING),
        Collective("embedding and lm_head", "all-gather", "tensor", matrices, embeddings, NOTHING),
        Collective("their gradients", "reduce-scatter", "tensor", matrices, embeddings, NOTHING),
        Collective("norms' gradients", "all-reduce", "tensor", norms + micro_steps, norm_bytes, NOTHING),
    ]


def _of_muon(model: ModelConfig, layout: Layout) -> list[Collective]:
    shapes = matrices_of_layers(model)
    calls = sum(shapes.values())
    num_bytes = 2 * sum(rows * columns * count for (rows, columns), count in shapes.items())
    return [
        Collective("muon's matrices", "all-gather", "shard", calls, num_bytes // layout.tensor, NOTHING),
        Collective("muon's matrices, whole", "all-gather", "tensor", calls, num_bytes, NOTHING),
        Collective("muon's updates", "broadcast", "world", calls, num_bytes, NOTHING),
    ]
