"""A path from the user -> a model that runs, with its tokenizer.

The path may be a run, its `final/`, one of its checkpoints, a folder of others, a model on the hub, a GGUF
file, or an adapter, which brings its base.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lumi.config import UserError
from lumi.formats import gguf_shape, gguf_weights
from lumi.formats.adapter_format import (
    adapted_vocab_size,
    base_of,
    is_adapter,
    load_adapter,
    named_base,
)
from lumi.formats.checkpoint_folder import is_checkpoint, tokenizer_folder
from lumi.formats.gguf_file import is_gguf, open_gguf
from lumi.formats.gguf_tokenizer import read_tokenizer
from lumi.formats.hf_format import check_tokenizer, ends_of, load_model, model_folder, read_shape
from lumi.formats.hub import local_folder
from lumi.host.devices import choose_device
from lumi.kernels.bundle import select
from lumi.model.lora import settle_rows
from lumi.model.transformer import Linear, Transformer
from lumi.tokenizer.files import read_surroundings
from lumi.tokenizer.loading import has_tokenizer, load_tokenizer
from lumi.tokenizer.tokenizer import Tokenizer


class Pretrained(NamedTuple):
    """A model in evaluation mode on its device, and where it came from."""

    model: Transformer
    tokenizer: Tokenizer
    folder: Path  # of the weights, with an adapter those of its base; or the GGUF file
    adapter: Path | None = None  # folder


def load_pretrained(
    path: str | Path,
    *,
    adapter_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> Pretrained:
    """Load the model that `path` means.

    Args:
        path: a run folder, its `final/` or one of its checkpoints, a Hugging Face folder, `org/name` on the
            hub, or a GGUF file. An adapter brings the base that it names.
        adapter_path: the folder of an adapter, or a run folder with one. `path` is then its base.
        tokenizer_path: None: the tokenizer in the adapter's folder. If there is none: the one in the model's
            folder, with the tokens and the chat template that the adapter's folder adds.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: of activations and products.
        kernels: the operators' name, as for `lumi.kernels.bundle.select`.

    Raises:
        UserError: there is no model, it cannot be imported, or it was trained with another tokenizer or base.
    """
    chosen = choose_device(device)
    if is_gguf(path):
        model, tokenizer = _load_gguf(path, adapter_path, tokenizer_path, chosen, dtype, kernels)
        narrow(model)
        return Pretrained(model.to(chosen).eval().join_weights(), tokenizer, Path(path))
    folder, adapter = _locate_both(path, adapter_path)
    if tokenizer_path is None:
        tokenizer = _load_tokenizer(folder, adapter)
    else:
        tokenizer = load_tokenizer(local_folder(tokenizer_path, weights=False))
    tokenizer = tokenizer.with_ends(ends_of(folder))
    shape = read_shape(folder)
    vocab_size = adapted_vocab_size(adapter) if adapter is not None else None
    may_extend = adapter is not None and has_tokenizer(adapter)
    remedy = _remedy(adapter) if tokenizer_path is None else ""
    check_tokenizer(folder, vocab_size or shape.vocab_size, tokenizer, may_extend=may_extend, remedy=remedy)
    model = load_model(folder, select(kernels, chosen, shape.head_dim, dtype), dtype)
    if adapter is not None:
        load_adapter(adapter, model, folder, tokenizer)
        settle_rows(model)
    narrow(model)
    return Pretrained(model.to(chosen).eval().join_weights(), tokenizer, folder, adapter)


def _remedy(adapter: Path | None) -> str:
    """What helps where the tokenizer that comes with a model, or with its adapter, is not the model's."""
    if adapter is None or not has_tokenizer(_tokenizer_place(adapter)):
        return "it was replaced there: copy the model again, or pass its tokenizer by --tokenizer-path"
    base = named_base(adapter)
    named = "" if base is None else f" It names {base};"
    other = f"{adapter} brings another: was it trained on another base?{named}"
    return f"{other} pass its base by --model-path (merge: --base-path)"


def _load_gguf(
    path: str | Path,
    adapter_path: str | Path | None,
    tokenizer_path: str | Path | None,
    device: str,
    dtype: torch.dtype,
    kernels: str,
) -> tuple[Transformer, Tokenizer]:
    """The model in a GGUF file. Another tokenizer must have all of its tokens."""
    if adapter_path is not None:
        remedy = f"`lumi export --model-path {path} --output-dir DIR` makes one"
        raise UserError("--adapter-path", "must come with a model folder", got=f"{path}", remedy=remedy)
    file = open_gguf(path)
    tokenizer = own = read_tokenizer(file)
    model = gguf_weights.load_model(
        file, select(kernels, device, gguf_shape.read_shape(file).head_dim, dtype), dtype
    )
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path).with_ends(own.eos_ids)
    if not tokenizer.extends(own) or tokenizer.vocab_size > model.config.vocab_size:
        expectation = f"must have the tokens in the file, and at most {model.config.vocab_size}"
        remedy = "leave --tokenizer-path out"
        raise UserError(f"{path}: the tokenizer", expectation, got="another", remedy=remedy)
    return model, tokenizer


def narrow(model: Transformer) -> None:
    """Hold matrices in the dtype of the products, so that no step casts them again. It rounds them as a step
    does. DoRA keeps its own: their norms are those of the float32 matrix."""
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding)) and getattr(module, "lora_magnitude", None) is None:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(model.compute_dtype)


def _locate_both(path: str | Path, adapter_path: str | Path | None) -> tuple[Path, Path | None]:
    """The folders of the model and of the adapter, if there is one. Raises UserError as `load_pretrained`."""
    folder = locate(path)
    if adapter_path is None:
        return (base_of(folder), folder) if is_adapter(folder) else (folder, None)
    adapter = locate(adapter_path)
    if not is_adapter(adapter):
        got, remedy = f"{adapter}, which holds a whole model", "pass it by --model-path alone"
        raise UserError("--adapter-path", "must hold an adapter", got=got, remedy=remedy)
    if is_adapter(folder):
        expectation = "must be a whole model where --adapter-path is given"
        raise UserError("--model-path", expectation, got=f"the adapter {folder}")
    return folder, adapter


def _load_tokenizer(folder: Path, adapter: Path | None) -> Tokenizer:
    """The adapter's tokenizer; or the model's, with the files that others have saved beside the adapter."""
    folder = _tokenizer_place(folder)
    if adapter is None:
        return load_tokenizer(folder)
    adapter = _tokenizer_place(adapter)
    if has_tokenizer(adapter):
        return load_tokenizer(adapter)
    template = read_surroundings(adapter).chat_template
    tokenizer = load_tokenizer(folder)
    return tokenizer if template is None else tokenizer.with_chat_template(template)


def _tokenizer_place(folder: Path) -> Path:
    return tokenizer_folder(folder) if is_checkpoint(folder) else folder


def locate(path: str | Path) -> Path:
    """The folder of model or adapter: the path itself, a run's `final/`, or what the hub has by that name.

    Raises UserError without one.
    """
    folder = local_folder(path)
    if (final := folder / "final").is_dir():
        folder = final
    return folder if is_adapter(folder) else model_folder(folder)
