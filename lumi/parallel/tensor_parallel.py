"""Tensor parallelism with sequence-parallel norms, on torch's DTensor.

Papers: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.

A group of t processes reads the same rows. Between the layers each process holds T/t tokens of the residual
stream; norms, embedding and loss work on these alone. Attention and MLP gather the tokens, multiply by their
share of the heads and of `mlp_dim`, and scatter the sums:

    x (B, T/t, D) -> all-gather -> (B, T, D) -> columns of q k v gate up -> rows of o down -> reduce-scatter
    -> (B, T/t, D)

Parameters are DTensors, so that the optimizer, FSDP2 and checkpoints know their whole shapes. The model's own
code never
sees a DTensor: its forward is called with this process's part of every parameter. So every operator works
unchanged, compiled or Triton.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lumi.config import UserError
from lumi.model.transformer import ModelConfig, Transformer

# Of these each process computes some outputs, and adds their biases.
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")  # each process has some of the inputs
_SEQUENCE_DIM = 1


def check_tensor_parallel(config: ModelConfig, sequence_length: int, size: int, dora: bool) -> None:
    """Raises UserError, with the numbers, where a model cannot be shared by `size` processes."""
    if size == 1:
        return
    shared = {
        "model.num_heads": config.num_heads,
        "model.num_kv_heads": config.num_kv_heads,
        "model.mlp_dim": config.mlp_dim,
        "model.model_dim": config.model_dim,
        "batches.sequence_length": sequence_length,
    }
    for name, value in shared.items():
        if value % size:
            raise UserError("parallel.tensor", f"must divide {name} = {value}", got=size)
    if dora:
        expectation = "must be 1 with lora.dora (lengths of rows that no process has whole)"
        raise UserError("parallel.tensor", expectation, got=size)


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Share a model among the processes of a one-dimensional mesh, in place.

    Each process then calls it with the same batch. The summed loss is that of its own T/t tokens; the sum
    over the mesh is the loss of the batch. Losses per token are those of all T tokens, on each process.
    """
    for name, parameter in list(model.named_parameters()):
        path, _, attribute = name.rpartition(".")
        whole = parameter.detach()
        shared = distribute_tensor(whole, mesh, [_placement(name, whole)], src_data_rank=None)
        setattr(model.get_submodule(path), attribute, nn.Parameter(shared, parameter.requires_grad))
    for layer in model.layers:
        for module in map(layer.get_submodule, ("attention", "mlp")):
            module.register_forward_pre_hook(
                lambda _, inputs: (_gather(inputs[0], mesh, Partial()), *inputs[1:])
            )
            module.register_forward_hook(lambda _, inputs, output: _scatter(output, mesh))
        layer.forward = _on_local_parameters(layer, dict.fromkeys(dict(layer.named_parameters()), False))
    model.token_embedding.register_forward_pre_hook(lambda _, inputs: (_own_tokens(inputs[0], mesh),))
    of_root = [name for name, _ in model.named_parameters() if not name.startswith("layers.")]
    local_forward = _on_local_parameters(model, dict.fromkeys(of_root, True))

    def forward(tokens: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        loss = local_forward(tokens, _own_tokens(targets, mesh), *rest)
        return loss if loss.ndim == 0 else _gather(loss, mesh, Replicate())

    model.forward = forward  # type: ignore[method-assign, assignment]


def _placement(name: str, parameter: Tensor) -> Placement:
    """How a parameter is cut: token matrices into columns, for FSDP2 cuts rows; they are gathered for use."""
    *_, module, kind = name.split(".")
    if not name.startswith("layers."):
        return Shard(1) if parameter.ndim == 2 and kind != "rows" else Replicate()
    if module in _COLUMNS and kind != "lora_A":
        return Shard(0)
    if module in _ROWS and kind != "lora_B":
        return Shard(1)
    return Replicate()


def _on_local_parameters(module: nn.Module, names: dict[str, bool]) -> Callable[..., Any]:
    """The module's forward, with plain tensors in place of the DTensors `names`.

    The value of a name tells what replaces it: this process's part (False) or the whole, gathered (True).
    """
    body = _Body(module)

    def forward(*inputs: Any) -> Any:
        local = {f"module.{name}": _local(module.get_parameter(name), whole) for name, whole in names.items()}
        return torch.func.functional_call(body, local, inputs, tie_weights=False)

    return forward


class _Body(nn.Module):
    """A wrapper whose call is the module's own `forward`, without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.own = module, module.forward

    def forward(self, *inputs: Any) -> Any:
        return self.own(*inputs)


def _local(parameter: Tensor, whole: bool) -> Tensor:
    """A parameter as the products take it.

    If all processes hold it whole, the gradient of each is one term of the sum over them.
    """
    assert isinstance(parameter, DTensor)
    if whole:
        parameter = parameter.redistribute(placements=[Replicate()])
    placements = [Partial() if each.is_replicate() else each for each in parameter.placements]
    return parameter.to_local(grad_placements=placements)


def _own_tokens(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    return tokens.chunk(mesh.size(), dim=_SEQUENCE_DIM)[mesh.get_local_rank()]


def _gather(x: Tensor, mesh: DeviceMesh, gradient: Placement) -> Tensor:
    """The tokens of all processes. `gradient` says how each one's gradient relates to the whole."""
    part = DTensor.from_local(x, mesh, [Shard(_SEQUENCE_DIM)], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])


def _scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    terms = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return terms.redistribute(placements=[Shard(_SEQUENCE_DIM)]).to_local()
