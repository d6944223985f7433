"""Small models whose answers are known without any training, and models that tell tokens apart."""

import torch

from lumi.formats.adapter_format import save_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hf_format import load_model, save_model
from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig, adapters, add_lora
from lumi.model.transformer import ModelConfig, Transformer

SHAPE = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}

LORA_KINDS = [
    LoraConfig(rank=4, alpha=8),
    LoraConfig(rank=4, alpha=8, rslora=True),
    LoraConfig(rank=3, alpha=5, targets=("q_proj", "down_proj")),
    LoraConfig(rank=4, alpha=8, dora=True),
]


def add_noise(model):
    """Moves norms away from one and tells tokens apart; returns the model."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(noise, alpha=0.1)
    return model


def save_base(tokenizer, folder, **changes):
    """Saves a small noisy model for adapters; returns its folder."""
    config = ModelConfig(vocab_size=384, max_positions=64, **SHAPE, **changes)
    save_model(folder, add_noise(Transformer(config, REFERENCE).init_weights(0)), tokenizer)
    return folder


def save_adapted(base_dir, config, tokenizer, folder):
    """Saves adapters that change what the model in `base_dir` computes; returns the model with them."""
    model = load_model(base_dir, REFERENCE)
    add_lora(model, config)
    with torch.no_grad():
        for index, (_, module) in enumerate(adapters(model)):
            noise = torch.randn(module.lora_B.shape, generator=torch.Generator().manual_seed(index))
            module.lora_B.copy_(0.2 * noise)
            if module.lora_magnitude is not None:
                module.lora_magnitude.mul_(1.3)
    save_adapter(folder, model, config, tokenizer, base_dir, weights_fingerprint(base_dir))
    return model


def wanderer(tokenizer, max_positions=256, padding=0, **changes):
    """Says letters for ever, which depend on everything before them.

    Args:
        padding: ids beyond the tokenizer's, which this model likes best.
        changes: to its shape; it cannot be tied.
    """
    shape = SHAPE | {"max_positions": max_positions} | changes
    config = ModelConfig(vocab_size=tokenizer.vocab_size + padding, **shape)
    model = Transformer(config, REFERENCE).init_weights(0).eval()
    sayable = [
        tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii()
        for i in range(tokenizer.vocab_size)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # untrained weights of the usual size would repeat one token for ever
        # A logit of zero: the best letters are above it.
        model.lm_head.weight[: tokenizer.vocab_size][~torch.tensor(sayable)] = 0
        model.lm_head.weight[tokenizer.vocab_size :] *= 100
    return model


def speller(tokenizer, following, max_positions=256):
    """Chooses by the last token alone: `following[token]` comes next, or `following[None]`."""
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
