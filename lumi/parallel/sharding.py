"""The model among the processes: torch's DDP, FSDP2 and tensor parallelism."""

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lumi.model.transformer import Transformer
from lumi.parallel.tensor_parallel import tensor_parallel
from lumi.parallel.tensor_pieces import piece
from lumi.parallel.world import World


def parallelize(
    model: Transformer,
    world: World,
    reduce_dtype: str = "bfloat16",
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> nn.Module:
    """Share a model among the processes, in place. All of them call the result together.

    A gradient is the mean over the `layout.data` groups. FSDP2 keeps float32 shards of the weights, gathers
    those of each layer in the model's compute dtype when its turn comes, and sums gradients in the reduce
    dtype. If that is the compute dtype, the gradients of inner micro-steps also add up in it.

    Args:
        model: whole, the same on all processes; or on the "meta" device, without values.
        reduce_dtype: "bfloat16" or "float32", for sums of gradients between processes; float32 unless the
            model computes in bfloat16.
        weights: for a model without values: by the parameters' names. No process ever holds more than its own
            part and one of these tensors.

    Returns:
        what to call: the model itself, or DDP around it.
    """
    narrow = reduce_dtype == "bfloat16" and model.compute_dtype == torch.bfloat16
    sharded = world.mesh is not None and (world.layout.shard > 1 or world.layout.tensor > 1)
    if sharded:
        _shard(model, world, torch.bfloat16 if narrow else torch.float32)
    if weights is None:
        model.to(world.device)
    else:
        model.to_empty(device=world.device)
        for name, value in weights:
            held = piece(model.get_parameter(name))
            held.local.copy_(held.part_of(value))
    if sharded:
        return model
    model.join_weights()
    if world.mesh is None:
        return model
    wrapped = DistributedDataParallel(model)
    if narrow:
        wrapped.register_comm_hook(world.size, _reduce_in_bfloat16)
    return wrapped


def _shard(model: Transformer, world: World, reduce_dtype: torch.dtype) -> None:
    """Tensor parallelism, then FSDP2 layer by layer, in place."""
    assert world.mesh is not None
    if world.layout.tensor > 1:
        tensor_parallel(model, world.mesh["tensor"])
    mesh = world.mesh["replicate", "shard"] if world.layout.replicate > 1 else world.mesh["shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _reduce_in_bfloat16(num_processes: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for the mean of a bucket of gradients; torch has one for NCCL only."""
    gradients = bucket.buffer()
    sent = (gradients / num_processes).bfloat16()
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: gradients.copy_(done.value()[0]))


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Reduce gradients in this micro-step's backward, or (`enabled=False`) leave it to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward gathered; the parameters are this process's parts again."""
    if isinstance(model, FSDPModule):
        model.reshard()
