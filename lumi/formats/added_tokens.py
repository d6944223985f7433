"""A model with more tokens: a copy with rows for them, which training then sets."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lumi.config import UserError
from lumi.formats.hf_format import save_model_tensors
from lumi.formats.model_parent import model_parent
from lumi.formats.pretrained import load_pretrained
from lumi.model.lora import token_matrices
from lumi.tokenizer.hugging_face import HuggingFaceTokenizer


def add_tokens(
    model_path: Path, output_dir: Path, names: Sequence[str], chat_template: str | None
) -> list[int]:
    """Write a model whose tokenizer knows further control tokens; returns their ids.

    Their rows in the embedding and in an `lm_head` of its own are the mean of the other rows, from which
    training can go anywhere (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Rows that
    lay unused behind the tokenizer's ids are taken before new ones are made.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer cannot take tokens.
    """
    model, tokenizer, folder, _ = load_pretrained(model_path, device="cpu", kernels="reference")
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        expectation = "must be one of others to take more tokens"
        raise UserError(f"{folder}: the tokenizer", expectation, got="one of Lumi's")
    before = tokenizer.vocab_size
    extended = tokenizer.with_tokens(names).with_chat_template(chat_template)
    ids = [extended.control_ids[name] for name in names]
    size = max(model.config.vocab_size, extended.vocab_size)
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for name in token_matrices(model):
        rows = tensors[f"{name}.weight"]
        mean = rows[:before].mean(dim=0, keepdim=True)
        wider = torch.cat((rows, mean.expand(size - len(rows), -1)))
        wider[[token_id for token_id in ids if token_id >= before]] = mean
        tensors[f"{name}.weight"] = wider
    config, parents = replace(model.config, vocab_size=size), [model_parent(folder)]
    save_model_tensors(output_dir, config, tensors, extended, parents=parents)
    return ids
