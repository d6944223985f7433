"""What test_tensor_parallel.py, test_muon.py and test_rendezvous.py run; `case_server.py` starts it.

Every process is a fork, and they talk over gloo.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # FSDP2 imports it when it is first used: here once, before the forks
import torch.distributed as dist
from saver_processes import DEADLINE_SECONDS, fork, joined, served_store
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig, add_lora, trained_tensors
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.rendezvous import fresh_store
from lumi.parallel.tensor_parallel import tensor_parallel
from lumi.parallel.tensor_pieces import gathered, piece
from lumi.training.muon import Muon

SHAPE = {
    "vocab_size": 45,
    "num_layers": 2,
    "model_dim": 16,
    "num_heads": 4,
    "mlp_dim": 24,
    "max_positions": 64,
}
VARIANTS = {
    "plain": ({}, None, False),
    "grouped heads, tied, qk norm, checkpointing": (
        {"num_kv_heads": 2, "tied_embeddings": True, "qk_norm": True},
        None,
        True,
    ),
    "biases, a window": (
        {"num_kv_heads": 2, "qkv_bias": True, "window": 4, "full_attention_layers": 1},
        None,
        False,
    ),
    "no rope in the last layer": ({"no_rope_layer_interval": 2}, None, True),
    "lora on biased linears": ({"qkv_bias": True}, LoraConfig(rank=3), False),
    "lora on all": ({}, LoraConfig(rank=3), False),
    "lora on some, rows of tokens": (
        {"num_kv_heads": 2},
        LoraConfig(rank=2, targets=("q_proj", "o_proj", "down_proj")),
        True,
    ),
    "lora, rows of tied tokens": ({"tied_embeddings": True}, LoraConfig(rank=2), False),
}
ROUNDING = 1e-12  # in float64, of the largest


@functools.cache
def mesh_of(*sides):
    return init_device_mesh("cpu", sides, mesh_dim_names=("replicate", "shard", "tensor"))


def build(variant):
    changes, lora, checkpointing = VARIANTS[variant]
    model = Transformer(
        ModelConfig(**SHAPE | changes), REFERENCE, gradient_checkpointing=checkpointing
    ).init_weights(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    if lora is not None:
        add_lora(model, lora, token_ids=[3, 7] if "rows" in variant else [])
        generator = torch.Generator().manual_seed(2)
        for tensor in trained_tensors(model).values():
            tensor.data += 0.1 * torch.randn(
                tensor.shape, generator=generator
            )  # B is zero at first, and A then has no gradient
    model.compute_dtype = torch.float64
    return model.double()


def batch():
    """Two rows of 16 tokens. A document crosses a border between processes; some tokens have no target."""
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(0, 45, (2, 16), generator=generator) for _ in range(2))
    tokens[0, 2:4] = torch.tensor([3, 7])  # whose rows are trained
    targets[0, 5], targets[1, 9:12] = -100, -100
    cu_seqlens = torch.tensor([0, 5, 11, 16, 32], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()]).view(2, 16)
    return tokens, targets, positions, cu_seqlens


def share_layers(rank, size, folder):
    """Loss, and every gradient, of a model that is shared against the same model on one process."""
    with joined(rank, size, folder):
        mesh = init_device_mesh("cpu", (size,))
        for variant in [name for name in VARIANTS if size == 2 or "num_kv_heads" not in VARIANTS[name][0]]:
            alone, shared = build(variant), build(variant)
            tensor_parallel(shared, mesh)
            expected, got = (model.train()(*batch(), 0.01) for model in (alone, shared))
            for loss in (expected, got):
                (loss * 0.01).backward()
            total = got.detach().clone()
            dist.all_reduce(total)
            assert abs(total - expected.detach()) <= ROUNDING * expected.detach(), (variant, total, expected)
            names = trained_tensors(alone)
            assert trained_tensors(shared).keys() == names.keys()
            for name, parameter in names.items():
                gradient = shared.get_parameter(name).grad
                assert isinstance(gradient, DTensor)
                difference = (gradient.full_tensor() - parameter.grad).abs().max()
                assert difference <= ROUNDING * parameter.grad.abs().max(), (
                    variant,
                    name,
                    difference,
                    parameter.grad.abs().max(),
                )
                assert parameter.grad.any(), (variant, name)


MATRICES = {
    "tall": ((24, 8), 0),
    "wide": ((6, 20), 1),
    "wide by rows": ((6, 20), 0),
    "square": ((16, 16), None),
    "uneven": ((7, 10), 1),
    "uneven by rows": ((14, 10), 0),
    "fewer rows than processes": ((3, 5), None),
}


def held(values, layout):
    """Matrices as FSDP2 over tensor parallelism holds them."""
    mesh = mesh_of(*layout)
    module = nn.Module()
    for name, value in values.items():
        if layout[2] > 1:
            dim = MATRICES[name][1]
            value = distribute_tensor(
                value, mesh["tensor"], [Replicate() if dim is None else Shard(dim)], src_data_rank=None
            )
        module.register_parameter(name.replace(" ", "_"), nn.Parameter(value))
    fully_shard(module, mesh=mesh["replicate", "shard"] if layout[0] > 1 else mesh["shard"])
    return list(module.parameters())


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in MATRICES.items()}


def step_with_muon(rank, size, folder):
    """Steps on parts against steps on whole matrices.

    Learning rates change, and one matrix has no gradient in one step. In bfloat16 the truth is torch's Muon,
    bit for bit. In float32 it is ours in float64, and parts may be twice as wrong as whole matrices: products
    of one matrix and of several differ in rounding.
    """
    layouts = {2: [(1, 2, 1), (1, 1, 2)], 4: [(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]}[size]
    with joined(rank, size, folder):
        for layout in layouts:
            run_muon(layout, torch.bfloat16)
            run_muon(layout, torch.float32, beta2=0.8)
        run_muon(layouts[-1], torch.float32)


def run_muon(layout, dtype, **variant):
    settings = {"lr": 1.0, "weight_decay": 0.3, "momentum": 0.9} | variant
    parts = held(matrices(0), layout)
    truth = [nn.Parameter(value) for value in matrices(0).values()]
    exact = [nn.Parameter(value.double()) for value in matrices(0).values()]
    got = Muon(parts, **settings, compute_dtype=dtype)
    if dtype == torch.bfloat16:
        expected = torch.optim.Muon(truth, adjust_lr_fn="match_rms_adamw", **settings)
    else:
        expected = Muon(truth, **settings, compute_dtype=dtype)
    judge = Muon(exact, **settings, compute_dtype=torch.float64)
    for step in range(1, 4):
        gradients = matrices(step)
        for index, (part, gradient) in enumerate(
            zip(held(gradients, layout), gradients.values(), strict=True)
        ):
            skipped = step == 2 and index == 1
            parts[index].grad = None if skipped else part.detach()
            truth[index].grad = None if skipped else gradient.clone()
            exact[index].grad = None if skipped else gradient.double()
        for optimizer in (expected, judge, got):
            optimizer.param_groups[0]["lr"] = 0.1 / step
            optimizer.step()
        for name, whole, true, part in zip(MATRICES, truth, exact, parts, strict=True):
            everywhere = gathered(part.detach())
            local, offset, _ = piece(part)
            box = tuple(
                slice(start, start + length) for start, length in zip(offset, local.shape, strict=True)
            )
            assert torch.equal(everywhere[box], local), (layout, dtype, step, name)
            if dtype == torch.bfloat16:
                assert torch.equal(everywhere, whole), (layout, step, name, (everywhere - whole).abs().max())
            error, bound = ((value - true).abs().max() for value in (everywhere, whole))
            ulp = torch.finfo(torch.float32).eps * true.abs().max()
            assert error <= 2 * bound + ulp, (layout, dtype, step, name, error, bound)


def meet(rank, size, late):
    """Join a group on the parent's store, and leave a word in it, which no later start may find."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    if rank == late:
        time.sleep(0.3)
    store = fresh_store()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ranks = torch.tensor([2**rank])
    dist.all_reduce(ranks)
    assert ranks.item() == 2**size - 1
    found = [store.check([f"here/{other}"]) for other in range(size)]
    dist.barrier()
    assert not any(found), found
    store.set(f"here/{rank}", "")
    dist.barrier()
    assert store.check([f"here/{other}" for other in range(size)])


def start_in_vain(server, size):
    """A start that the last process never reaches: the others are killed while they wait for it."""
    waiting = []
    for rank in range(size - 1):
        if (process := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
            signal.alarm(DEADLINE_SECONDS)
            fresh_store()
            os._exit(0)
        waiting.append(process)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not server.check([f"lumi/word/{rank}" for rank in range(size - 1)]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in waiting:
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def start_again_and_again():
    """Starts on one store, as torchrun serves it: several sizes, one process late, a failed start before."""
    with served_store() as server:
        start_in_vain(server, 3)
        for size, late in ((3, 0), (2, 1), (2, 0), (3, 2), (3, 1)):
            assert fork(size, meet, late) == [0] * size


def main(case, folder):
    folder = Path(folder)
    if case == "layers":
        assert [fork(size, share_layers, folder) for size in (2, 4)] == [[0] * 2, [0] * 4]
    elif case == "muon":
        assert [fork(size, step_with_muon, folder) for size in (2, 4)] == [[0] * 2, [0] * 4]
    elif case == "starts":
        start_again_and_again()


if __name__ == "__main__":
    main(*sys.argv[1:])
