"""Which model a command works on: the options, and the loading."""

import argparse
from typing import TYPE_CHECKING

from lumi.command_line import add_device, given_path

if TYPE_CHECKING:
    from lumi.formats.pretrained import Pretrained


def add_model(arguments: argparse.ArgumentParser) -> None:
    """Add the options for a model that computes: which one, where, and in which dtype."""
    add_whole_model(arguments)
    adapter = "a LoRA adapter, or the run that made it; --model-path is then its base"
    arguments.add_argument("--adapter-path", metavar="PATH", help=adapter)
    add_device(arguments)
    dtype = "dtype of activations and matrix products"
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype)


def add_whole_model(arguments: argparse.ArgumentParser) -> None:
    """Add the options for a model without an adapter, and for its tokenizer."""
    model = "a run, its final/ or a checkpoint, a Hugging Face folder, org/name on the hub, or a GGUF file"
    arguments.add_argument("--model-path", required=True, type=given_path, help=model)
    tokenizer = "default: the one in the model's folder"
    arguments.add_argument("--tokenizer-path", "--tokenizer-dir", help=tokenizer)


def load_model(options: argparse.Namespace) -> "Pretrained":
    """The model that the options of `add_model` name."""
    import torch

    from lumi.formats.pretrained import load_pretrained

    return load_pretrained(
        options.model_path,
        adapter_path=options.adapter_path,
        tokenizer_path=options.tokenizer_path,
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )
