"""A path that a user gives -> a model that runs, with its tokenizer: a run, its `final/`, any Llama folder, or an adapter and its base."""

from pathlib import Path
from typing import NamedTuple

import torch

from lumi.config import UserError
from lumi.formats.adapter_format import base_of, is_adapter, load_adapter
from lumi.formats.hf_format import load_model, model_folder, read_shape
from lumi.host.devices import choose_device
from lumi.kernels.bundle import select
from lumi.model.lora import settle_rows
from lumi.model.transformer import Transformer
from lumi.tokenizer.files import TEMPLATE_FILE
from lumi.tokenizer.tokenizer import MODEL_FILE, Tokenizer


class Pretrained(NamedTuple):
    """A model in evaluation mode on its device, its tokenizer, the folder of its weights, and that of its adapter, if it has one."""

    model: Transformer
    tokenizer: Tokenizer
    folder: Path
    adapter: Path | None = None


def load_pretrained(
    path: str | Path,
    *,
    adapter_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """Load what `path` means.

    Args:
        path: a run folder, its `final/`, or a Hugging Face folder; one that holds an adapter brings the base that it names.
        adapter_path: a run folder with an adapter, or the adapter's; `path` is then the base.
        tokenizer_path: None: the one in the adapter's folder, or, where there is none, in the model's, with the adapter's chat template.
        device: "auto", "cpu" or "cuda".
        dtype: of activations and products.

    Raises:
        UserError: there is no model, it cannot be imported, or the tokenizer or the base is not the one that it was trained with.
    """
    chosen = choose_device(device)
    folder, adapter = locate(path), None if adapter_path is None else locate(adapter_path)
    if adapter is not None and not is_adapter(adapter):
        raise UserError(
            f"--adapter-path must hold an adapter, got {adapter}, which holds a whole model; pass it by --model-path alone"
        )
    if is_adapter(folder):
        if adapter is not None:
            raise UserError(
                f"--model-path must be a whole model where --adapter-path is given, got the adapter {folder}"
            )
        folder, adapter = base_of(folder), folder
    own = adapter is not None and (adapter / MODEL_FILE).is_file()  # PEFT's adapters come without
    tokenizer = Tokenizer.load(tokenizer_path or (adapter if own else None) or folder)
    if (
        adapter is not None
        and not own
        and tokenizer_path is None
        and (template := adapter / TEMPLATE_FILE).is_file()
    ):
        tokenizer = tokenizer.with_chat_template(template.read_text(encoding="utf-8"))
    model = load_model(folder, select("auto", chosen, read_shape(folder).head_dim), dtype, tokenizer)
    if adapter is not None:
        load_adapter(adapter, model, folder, tokenizer)
        settle_rows(model)
    return Pretrained(model.to(chosen).eval(), tokenizer, folder, adapter)


def locate(path: str | Path) -> Path:
    """The folder of the model or the adapter that a path means: itself, or a run's `final/`. Raises UserError where there is none."""
    final = Path(path) / "final"
    folder = final if final.is_dir() else Path(path)
    return folder if is_adapter(folder) else model_folder(folder)
