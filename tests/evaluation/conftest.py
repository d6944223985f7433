"""A model of the tests' tokenizer, small, with weights large enough to have opinions."""

import pytest
import torch

from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer

POSITIONS = 96


@pytest.fixture(scope="session")
def opinionated_model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=64,
        max_positions=POSITIONS,
    )
    model = Transformer(config, REFERENCE).init_weights(0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model
