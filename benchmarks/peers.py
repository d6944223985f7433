"""The models that others train at Lumi's sizes, from their own packages, and the steps that are timed.

Every peer has the shape of Lumi's model; the Llamas have its weights too, so their losses can be compared.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lumi.formats.hf_format import hf_name
from lumi.model.transformer import ModelConfig, Transformer
from lumi.training.optimizer import Optimizer
from lumi.training.optimizer_config import OptimizerConfig

LR = 1e-3


def packages(*names: str) -> None:
    """Raises ModuleNotFoundError for the first package that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed")


def hf_llama(model: Transformer, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' Llama with the weights of a model of Lumi, and SDPA."""
    packages("transformers")
    import transformers

    shape = model.config
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.model_dim,
        intermediate_size=shape.mlp_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    theirs = transformers.LlamaForCausalLM(config)
    weights = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise RuntimeError(f"transformers' Llama has other weights: {missing}, {unexpected}")
    return theirs.to(dtype)


def litgpt_llama(shape: ModelConfig) -> nn.Module:
    """litgpt's model. Its package imports what only its commands need, so two files are imported alone."""
    packages("litgpt")
    if "litgpt.model" in sys.modules:
        return _litgpt_model(shape)
    package = types.ModuleType("litgpt")
    package.__spec__ = importlib.machinery.ModuleSpec("litgpt", None, is_package=True)
    package.__path__ = [str(Path(path) / "litgpt") for path in sys.path if (Path(path) / "litgpt").is_dir()]
    converter = types.ModuleType("litgpt.scripts.convert_hf_checkpoint")
    converter.qkv_reassemble = None
    sys.modules |= {package.__name__: package, converter.__name__: converter}
    return _litgpt_model(shape)


def _litgpt_model(shape: ModelConfig) -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=shape.max_positions,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_query_groups=shape.num_kv_heads,
        n_embd=shape.model_dim,
        head_size=shape.head_dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape.mlp_dim,
    )
    model = GPT(config)
    if shape.tied_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def lumi_step(
    model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, **documents: Tensor
) -> Callable[[], Tensor]:
    """Lumi's training step, which returns the mean loss. `documents`: its positions and documents."""
    optimizer = Optimizer(model.join_weights(), OptimizerConfig(kind="adamw"))
    share = 1 / targets_BT.numel()

    def step() -> Tensor:
        loss = model(tokens_BT, targets_BT, **documents, expected_dloss=share)
        (loss * share).backward()
        optimizer.step(LR, optimizer.measure_gradients())
        optimizer.zero_grad()
        return loss.detach() * share

    return step


def peer_step(model: nn.Module, dtype: torch.dtype, mean_loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The training step that others write: autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = mean_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
