"""Small models that say something predictable without any training."""

import torch

from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig
from lumi.model.transformer import ModelConfig, Transformer

SHAPE = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}

LORA_KINDS = [
    LoraConfig(rank=4, alpha=8),
    LoraConfig(rank=4, alpha=8, rslora=True),
    LoraConfig(rank=3, alpha=5, targets=("q_proj", "down_proj")),
    LoraConfig(rank=4, alpha=8, dora=True),
]


def wanderer(tokenizer, max_positions=256, padding=0):
    """Says words of letters for ever, which depend on all that was said before.

    Args:
        padding: ids beyond the tokenizer's, which this model likes best.
    """
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size + padding, max_positions=max_positions, **SHAPE),
        REFERENCE,
    )
    model.init_weights(0).eval()
    sayable = [
        tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii()
        for i in range(tokenizer.vocab_size)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # untrained weights of the usual size would repeat one token for ever
        model.lm_head.weight[: tokenizer.vocab_size][~torch.tensor(sayable)] = (
            0  # a logit of zero: the best letters are above it
        )
        model.lm_head.weight[tokenizer.vocab_size :] *= 100
    return model


def speller(tokenizer, following, max_positions=256):
    """Chooses by the last token alone: after `key` comes `following[key]`, after any other token `following[None]`."""
    size = tokenizer.vocab_size
    config = ModelConfig(
        vocab_size=size, num_layers=1, model_dim=size, num_heads=2, mlp_dim=8, max_positions=max_positions
    )
    model = Transformer(config, REFERENCE).init_weights(0).eval()
    with torch.no_grad():
        model.token_embedding.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for token in range(size):
            model.lm_head.weight[following.get(token, following[None]), token] = 50
        for layer in model.layers:
            layer.attention.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model
