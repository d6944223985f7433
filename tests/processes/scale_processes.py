"""Two processes that train small models in every layout, for test_communication.py.

`case_server.py` starts them. They count what they hold and send, where torch dispatches its operators.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from saver_processes import fork, joined
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import lumi.training.muon
from lumi.data.batches import BatchConfig
from lumi.kernels.bundle import REFERENCE, TRITON
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout, ParallelConfig
from lumi.parallel.sharding import gradient_sync, parallelize
from lumi.training.optimizer import Optimizer
from lumi.training.optimizer_config import OptimizerConfig
from lumi.training.run_config import TrainConfig

# Plans are made for GPUs: directions are sent in bfloat16, whatever this CPU would choose.
lumi.training.muon.fast_bfloat16 = lambda device: True

MODEL = {
    "vocab_size": 51,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 16,
}
FOR_TRITON = ModelConfig(vocab_size=50, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48)
EVEN, UNEVEN, BIASED = (
    ModelConfig(mlp_dim=44, qk_norm=True, **MODEL),
    ModelConfig(mlp_dim=45, tied_embeddings=True, **MODEL),
    ModelConfig(mlp_dim=44, qkv_bias=True, window=4, full_attention_layers=1, **MODEL),
)


def case(model, layout, *, rows=4, optimizer="adamw", **settings):
    """A run of 2 rows of 8 tokens a micro-batch."""
    parallel = ParallelConfig(**layout._asdict(), reduce_dtype=settings.pop("reduce_dtype", "bfloat16"))
    batches = BatchConfig(sequence_length=8, batch_tokens=8 * rows, micro_batch_size=2)
    kind = OptimizerConfig(kind=optimizer, muon_beta2=0.95 if optimizer == "muon" else None)
    return TrainConfig(
        model=model,
        batches=batches,
        optimizer=kind,
        parallel=parallel,
        num_steps=1000,
        kernels="reference",
        **settings,
    )


CASES = {
    "ddp": case(EVEN, Layout(2, 1, 1), dtype="float32"),
    "shard": case(EVEN, Layout(1, 2, 1), rows=12),
    "shard, one micro-step, uneven rows": case(UNEVEN, Layout(1, 2, 1)),
    "shard, checkpointing": case(UNEVEN, Layout(1, 2, 1), rows=8, gradient_checkpointing=True),
    "shard, float32 gradients": case(EVEN, Layout(1, 2, 1), rows=8, reduce_dtype="float32"),
    "shard, float32": case(EVEN, Layout(1, 2, 1), rows=8, dtype="float32"),
    "shard, muon": case(EVEN, Layout(1, 2, 1), optimizer="muon"),
    "shard, muon, biases": case(BIASED, Layout(1, 2, 1), optimizer="muon"),
    "tensor, biases": case(BIASED, Layout(1, 1, 2)),
    "tensor": case(EVEN, Layout(1, 1, 2)),
    "tensor, checkpointing": case(EVEN, Layout(1, 1, 2), gradient_checkpointing=True),
    "tensor, one micro-step, muon": case(EVEN, Layout(1, 1, 2), rows=2, optimizer="muon"),
}


class Collectives(TorchDispatchMode):
    """By kind of collective, in groups of several: calls, and bytes that are sent around."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # count what it becomes
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        old = {
            "c10d::_allgather_base_": ("all-gather", 0),
            "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
            "c10d::allreduce_": ("all-reduce", 0),
            "c10d::broadcast_": ("broadcast", 0),
        }
        new = {
            "_c10d_functional::all_gather_into_tensor": "all-gather",
            "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
            "_c10d_functional::all_reduce": "all-reduce",
        }
        if name in old:
            kind, place = old[name]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            self.add(kind, group.size(), sum(tensor.nbytes for tensor in tensors))
        elif name in new:
            size = dist.distributed_c10d._resolve_process_group(args[-1]).size()
            self.add(new[name], size, args[0].nbytes * (size if new[name] == "all-gather" else 1))
        elif "c10d" in name and not name.endswith(("::wait_tensor", "::_wrap_tensor_autograd")):
            raise NotImplementedError(name)
        return result

    def add(self, kind, group_size, num_bytes):
        if group_size > 1:
            calls, total = self.counts.get(kind, (0, 0))
            self.counts[kind] = calls + 1, total + num_bytes


def own(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_bytes(tensors):
    return sum(own(tensor).nbytes for tensor in tensors)


def fsdp_parameters(module):
    return module._get_fsdp_state()._fsdp_param_group.fsdp_params


def whole_gradients(model):
    """Bytes of the gradients that FSDP2 keeps between micro-steps."""
    parameters = [
        p for module in model.modules() if isinstance(module, FSDPModule) for p in fsdp_parameters(module)
    ]
    summed = [p.unsharded_accumulated_grad for p in parameters]
    return own_bytes(
        p._unsharded_param.grad if total is None else total
        for p, total in zip(parameters, summed, strict=True)
    )


def kept_by_a_layer(layout):
    """Bytes that backward finds of one more layer of the Triton operators, weights left out."""
    kept = []
    for num_layers in (2, 3):
        model = Transformer(replace(FOR_TRITON, num_layers=num_layers), TRITON).init_weights(0)
        mesh = init_device_mesh("cpu", layout, mesh_dim_names=Layout._fields)
        wrapped = parallelize(
            model, SimpleNamespace(layout=layout, mesh=mesh, device=torch.device("cpu")), "float32"
        )
        gathered = [
            p for module in model.modules() if isinstance(module, FSDPModule) for p in fsdp_parameters(module)
        ]
        storages = {}

        def pack(tensor, gathered=gathered, storages=storages):
            address = own(tensor).untyped_storage().data_ptr()
            if address not in {
                own(p._unsharded_param).untyped_storage().data_ptr()
                for p in gathered
                if hasattr(p, "_unsharded_param")
            }:
                storages[address] = own(tensor)  # kept alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            wrapped(*torch.zeros(2, 2, 64, dtype=torch.int64))
        kept.append(sum(tensor.nbytes for tensor in storages.values()))
    return kept[1] - kept[0]


def measure(config):
    layout = config.parallel.layout(2)
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=Layout._fields)
    world = SimpleNamespace(layout=layout, mesh=mesh, device=torch.device("cpu"))
    dtype = getattr(torch, config.dtype)
    model = Transformer(
        config.model, REFERENCE, compute_dtype=dtype, gradient_checkpointing=config.gradient_checkpointing
    )
    wrapped: nn.Module = parallelize(model.init_weights(0), world, config.parallel.reduce_dtype)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, lambda _, bucket: allreduce_hook(None, bucket))
    micro_steps = config.batches.micro_steps(layout.data)
    tokens, between = torch.zeros(2, 8, dtype=torch.int64), 0
    with Collectives() as collectives:
        for index in range(micro_steps):
            with gradient_sync(wrapped, index == micro_steps - 1):
                wrapped(tokens, tokens).backward()
            if isinstance(wrapped, FSDPModule) and index < micro_steps - 1:
                between = whole_gradients(model)
        optimizer = Optimizer(model, config.optimizer)
        optimizer.step(1e-3)
    states = {name: state for name, state in optimizer.state_tensors().items() if not name.endswith("/step")}
    held = {
        "weights": own_bytes(model.parameters()),
        "gradients": own_bytes(p.grad for p in model.parameters()),
        "whole gradients": between,
        "optimizer": own_bytes(states.values()),
        "checkpoint": sum(t.numel() * t.element_size() for t in [*model.parameters(), *states.values()]),
    }
    return {"held": held, "collectives": collectives.counts}


def measure_all(rank, size, folder):
    with joined(rank, size, folder):
        measured = {name: measure(config) for name, config in CASES.items()}
        measured["a layer's activations"] = {
            "shard": kept_by_a_layer(Layout(1, 2, 1)),
            "tensor": kept_by_a_layer(Layout(1, 1, 2)),
        }
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))


def main(folder):
    assert fork(2, measure_all, Path(folder)) == [0] * 2
