"""Adapters as PEFT makes and saves them: Lumi computes what PEFT computes, merged too, or refuses by name."""

import peft
import pytest
import safetensors.torch
import torch
import transformers
from crafted_models import save_base

from lumi.config import UserError
from lumi.formats.adapter_format import load_adapter
from lumi.formats.export import merge_adapter
from lumi.formats.hf_format import load_model
from lumi.formats.pretrained import load_pretrained
from lumi.kernels.bundle import REFERENCE

# PEFT warns of what is tied and of what it saves beside the adapters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

IDS = torch.randint(6, 380, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    return save_base(tokenizer, tmp_path / "base")


def our_logits(model):
    with torch.no_grad():
        return model.eval().logits(model.hidden(IDS))


def peft_adapter(base_dir, folder, num_ids=None, **changes):
    """An adapter that PEFT made and trained; returns the logits of its model on `IDS`."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    if num_ids is not None:
        base.resize_token_embeddings(num_ids)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    }
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings | changes)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    with torch.no_grad():
        return theirs(IDS).logits


BOTH = ["embed_tokens", "lm_head"]
PEFT_ADAPTERS = {
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}},
    "alpha pattern": {"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 20, ".*down_proj": 1}},
    "patterns and rslora": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
    "patterns and dora": {"rank_pattern": {"1.*q_proj": 2}, "use_dora": True},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "lm_head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": BOTH},
    "tied together": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms saved": {"modules_to_save": ["norm"]},
    "MLPs saved": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "resized": {"num_ids": 391},
    "made smaller": {"num_ids": 384 - 1},
    "resized and saved": {"num_ids": 391, "modules_to_save": BOTH},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("changes", PEFT_ADAPTERS.values(), ids=PEFT_ADAPTERS.keys())
def test_what_peft_trains_is_computed_and_merged(changes, tied, tokenizer, tmp_path):
    base_dir = save_base(tokenizer, tmp_path / "base", tied_embeddings=tied)
    expected = peft_adapter(base_dir, tmp_path / "adapter", **changes)
    model = load_model(base_dir, REFERENCE)
    assert tuple(our_logits(model).shape) != tuple(expected.shape) or (
        (our_logits(model) - expected).abs().max() > 0.1
    )
    load_adapter(tmp_path / "adapter", model, base_dir, tokenizer)
    torch.testing.assert_close(our_logits(model), expected, rtol=1e-4, atol=1e-4)
    if model.config.vocab_size < tokenizer.vocab_size:
        return
    loaded = load_pretrained(base_dir, adapter_path=tmp_path / "adapter", device="cpu", kernels="reference")
    torch.testing.assert_close(our_logits(loaded.model), expected, rtol=1e-4, atol=1e-4)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base_path=base_dir)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == changes.get("num_ids", 384)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_trained_rows_of_a_resized_vocabulary(tokenizer, tmp_path):
    base_dir = save_base(tokenizer, tmp_path / "base", tied_embeddings=True)
    expected = peft_adapter(base_dir, tmp_path / "adapter", 390, trainable_token_indices=[7, 384])
    loaded = load_pretrained(base_dir, adapter_path=tmp_path / "adapter", device="cpu", kernels="reference")
    assert loaded.model.config.tied_embeddings
    torch.testing.assert_close(our_logits(loaded.model), expected, rtol=1e-4, atol=1e-4)


def test_a_resized_matrix_without_the_other_is_refused_with_all_sizes(base_dir, tokenizer, tmp_path):
    peft_adapter(base_dir, tmp_path / "adapter", 391)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    safetensors.torch.save_file(tensors, file)
    sizes = r"must have shape \(391, 32\), as the embedding has, got \(384, 32\); the base has 384 token ids"
    with pytest.raises(UserError, match=f"lm_head.weight {sizes}"):
        load_pretrained(base_dir, adapter_path=tmp_path / "adapter", device="cpu")


def test_an_adapter_of_lm_head_is_refused_by_name(base_dir, tokenizer, tmp_path):
    peft_adapter(base_dir, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"lm_head\..* that has none .the loss is fused with lm_head"):
        load_pretrained(base_dir, adapter_path=tmp_path / "adapter", device="cpu")
