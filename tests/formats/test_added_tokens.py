"""Tokens added to a model; transformers judges ids and logits."""

import pytest
import torch
import transformers
from crafted_models import SHAPE, add_noise
from hugging_face_tokenizers import make

from lumi.config import UserError
from lumi.formats.added_tokens import add_tokens
from lumi.formats.hf_format import load_model, save_model
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

NAMES = ("<|a|>", "<|b|>")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("unused_rows", [0, 1, 7])
def test_rows_begin_as_the_mean(tmp_path, tied, unused_rows):
    tokenizer = load_tokenizer(make(tmp_path / "tokenizer", "llama-3"))
    size = tokenizer.vocab_size
    config = ModelConfig(vocab_size=size + unused_rows, max_positions=64, tied_embeddings=tied, **SHAPE)
    save_model(tmp_path / "model", add_noise(Transformer(config, REFERENCE).init_weights(0)), tokenizer)
    ids = add_tokens(tmp_path / "model", tmp_path / "more", NAMES, "{{ messages }}")
    assert ids == [size, size + 1]
    before, after = (load_model(tmp_path / name, REFERENCE) for name in ("model", "more"))
    assert after.config.vocab_size == size + max(unused_rows, 2)
    for name in ("token_embedding.weight", *(() if tied else ("lm_head.weight",))):
        old, new = before.state_dict()[name], after.state_dict()[name]
        assert torch.equal(new[:size], old[:size])
        assert torch.equal(new[size + 2 : len(old)], old[size + 2 :])
        torch.testing.assert_close(new[ids], old[:size].mean(dim=0).expand(2, -1))
    again, theirs = (
        load_tokenizer(tmp_path / "more"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "more"),
    )
    assert theirs.encode("x<|a|>y<|b|>", add_special_tokens=False) == [
        *again.encode("x"), ids[0], *again.encode("y"), ids[1],
    ]  # fmt: skip
    assert again.chat_template == "{{ messages }}"
    assert again.extends(tokenizer)
    assert not tokenizer.extends(again)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more")(tokens).logits
        torch.testing.assert_close(after.logits(after.hidden(tokens)), logits, rtol=1e-4, atol=1e-4)


def test_our_own_tokenizer_has_its_tokens(tokenizer, tmp_path):
    config = ModelConfig(vocab_size=384, max_positions=64, **SHAPE)
    save_model(tmp_path / "model", Transformer(config, REFERENCE).init_weights(0), tokenizer)
    with pytest.raises(UserError, match="must be one of others to take more tokens, got one of Lumi's"):
        add_tokens(tmp_path / "model", tmp_path / "more", NAMES, None)
