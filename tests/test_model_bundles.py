"""The same weights under two bundles: one training step of a whole model, judged by float64."""

import pytest
import torch
from parity import assert_parity

from lumi.kernels.bundle import REFERENCE, TRITON
from lumi.model import ModelConfig, Transformer

SHAPES = {
    "grouped": {"num_kv_heads": 2},
    "tied, qk-norm, head_dim 96": {"num_kv_heads": 1, "tied_embeddings": True, "qk_norm": True, "head_dim": 96},
}


def step(shape, ops, dtype, device, compute_dtype):
    """Loss and gradients of one packed batch; weights and arithmetic in `dtype`, products in `compute_dtype`."""
    config = ModelConfig(vocab_size=97, num_layers=2, model_dim=64, num_heads=4, mlp_dim=96, **shape)
    model = Transformer(config, ops, compute_dtype=compute_dtype).init_weights(0).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 97, (2, 40), generator=generator).to(device) for _ in range(2))
    targets[0, 5:9] = -100
    lengths = [17, 22, 1, 40]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 40).to(device)
    cu_seqlens = torch.tensor([0, 17, 39, 40, 80], dtype=torch.int32, device=device)
    loss = model(tokens, targets, positions, cu_seqlens)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_under_triton_is_one_under_the_reference(shape, device):
    exact = step(SHAPES[shape], REFERENCE, torch.float64, device, torch.float64)
    same_dtype = step(SHAPES[shape], REFERENCE, torch.float32, device, torch.float32)
    actual = step(SHAPES[shape], TRITON, torch.float32, device, torch.float32)
    assert exact.keys() == actual.keys()
    for name in exact:
        assert_parity(name, actual[name], same_dtype[name], exact[name])
