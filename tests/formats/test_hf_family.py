"""Families of models: transformers makes random ones, and is the judge of what we compute and write."""

import pytest
import torch
import transformers

from lumi.config import UserError
from lumi.formats.hf_config import from_hf_config, to_hf_config
from lumi.formats.hf_family import DEFAULTS, family_of
from lumi.formats.hf_format import load_model, save_model
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels.bundle import NATIVE, REFERENCE
from lumi.model.model_config import ModelConfig

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW, FULL = 11, ["full_attention"]
SLIDING = ["sliding_attention"]
IN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {  # model type, its config, the class that writes it again
    "mistral": ("mistral", {"sliding_window": WINDOW}, "MistralForCausalLM"),
    # Not of one: transformers' cache then keeps everything.
    "mistral of two tokens": ("mistral", {"sliding_window": 2, "head_dim": 24}, "MistralForCausalLM"),
    "mistral without a window": ("mistral", {"sliding_window": None}, "LlamaForCausalLM"),
    "qwen2": ("qwen2", {}, "Qwen2ForCausalLM"),
    "qwen2, tied, wide heads": (
        "qwen2",
        {"tie_word_embeddings": True, "head_dim": 24, "sliding_window": 5},  # which is not used
        "Qwen2ForCausalLM",
    ),
    "qwen2, yarn, last layers in a window": (
        "qwen2",
        {**IN_WINDOW, "max_window_layers": 2, "rope_parameters": YARN},
        "Qwen2ForCausalLM",
    ),
    "qwen2, all in a window": ("qwen2", {**IN_WINDOW, "max_window_layers": 0}, "Qwen2ForCausalLM"),
    "qwen2, none in a window": ("qwen2", {**IN_WINDOW, "max_window_layers": 4}, "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", {"head_dim": 24}, "Qwen3ForCausalLM"),
    "qwen3, layer types": (
        "qwen3",
        {**IN_WINDOW, "layer_types": FULL + 3 * SLIDING, "head_dim": 16},
        "Qwen3ForCausalLM",
    ),
    "smollm3": ("smollm3", {}, "SmolLM3ForCausalLM"),
    "smollm3, untied, every second": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0, 1], "tie_word_embeddings": False},
        "SmolLM3ForCausalLM",
    ),
    "smollm3, all rope": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "LlamaForCausalLM"),
    "smollm3 in a window": (
        "smollm3",
        {**IN_WINDOW, "no_rope_layer_interval": 3, "layer_types": FULL + 3 * SLIDING},
        "SmolLM3ForCausalLM",
    ),
    "smollm3, all rope in a window": (
        "smollm3",
        {**IN_WINDOW, "no_rope_layers": [1, 1, 1, 1], "layer_types": FULL + 3 * SLIDING},
        "SmolLM3ForCausalLM",
    ),
}
IDS = torch.randint(6, 384, (2, 50), generator=torch.Generator().manual_seed(0))


def random_model(name, attention="sdpa"):
    kind, changes, _ = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(IDS))


def their_logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("attention", "shard_size"), [("sdpa", "1GB"), ("eager", "60KB")])
def test_a_random_model_of_theirs(name, attention, shard_size, tmp_path):
    """Rows are longer than the window; in one file and in several."""
    theirs = random_model(name, attention)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "1GB")
    for ops in (REFERENCE, NATIVE):
        ours = load_model(tmp_path, ops).eval()
        torch.testing.assert_close(logits(ours), their_logits(theirs), rtol=1e-4, atol=1e-4)
        assert ours.config.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ops", [REFERENCE, NATIVE], ids=lambda ops: ops.name)
def test_greedy_tokens_are_theirs(name, ops, tmp_path):
    """With our cache and without; prompts shorter and longer than the window, continuations longer."""
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, ops).eval()
    for length in (4, 40):
        prompt = IDS[:1, :length]
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
        )
        for use_cache in (True, False):
            greedy = SamplingConfig(max_new_tokens=30, temperature=0.0)
            (completion,) = generate_ids(
                ours, prompt.tolist(), greedy, stop_ids=frozenset(), pad_id=0, use_cache=use_cache
            )
            assert completion.ids == expected[0, length:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_it_is_written_as_the_family_that_it_was(name, tokenizer, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", REFERENCE).eval()
    save_model(tmp_path / "ours", model, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again).__name__ == MODELS[name][2]
    assert torch.equal(their_logits(again), their_logits(theirs))
    reread = load_model(tmp_path / "ours", REFERENCE)
    assert reread.config == model.config
    assert torch.equal(logits(reread), logits(model))


SMALL = {"vocab_size": 384, "num_layers": 4, "model_dim": 64, "num_heads": 4, "mlp_dim": 96}


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"window": 9}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "window": 9, "full_attention_layers": 3}, "qwen2"),
        ({"qk_norm": True, "window": 9}, "qwen3"),
        ({"no_rope_layer_interval": 4}, "smollm3"),
        ({"no_rope_layer_interval": 1, "window": 9}, "smollm3"),
        ({"window": 9, "full_attention_layers": 1}, "smollm3"),
    ],
    ids=str,
)
def test_the_family_follows_from_what_a_model_computes(changes, family, tokenizer):
    config = ModelConfig(**SMALL | changes)
    assert family_of(config) == family
    assert from_hf_config(to_hf_config(config, tokenizer, "float32"), "c") == config


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    given = {
        "model_type": family,
        "vocab_size": 384,
        "hidden_size": 4096,
        "intermediate_size": 96,
        "num_hidden_layers": 30,
        "num_attention_heads": 64,
    }
    theirs = transformers.AutoConfig.for_model(**given)
    explicit = from_hf_config(theirs.to_dict() | {"architectures": None}, "c")
    assert from_hf_config(given, "c") == explicit
    assert explicit.max_positions == theirs.max_position_embeddings
    assert explicit.num_kv_heads == theirs.num_key_value_heads
    assert explicit.rope_theta == theirs.rope_parameters["rope_theta"]
    given |= {"use_sliding_window": family.startswith("qwen")}
    assert from_hf_config(given, "c").full_attention_layers == (28 if family.startswith("qwen") else 0)


def test_keys_of_other_families_are_not_looked_at():
    llama = {"model_type": "llama"} | SHAPE
    others = {"max_window_layers": None, "no_rope_layers": [0, 1], "no_rope_layer_interval": 0}
    assert from_hf_config(llama | others, "c") == from_hf_config(llama, "c")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"sliding_window": 9}, "sliding_window must be absent, got 9: this model cannot be"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ("llama", {"layer_types": 4 * SLIDING}, "layer_types must be full_attention for the first layers"),
        ("llama", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("smollm3", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("mistral", {"layer_types": FULL + 3 * SLIDING}, "layer_types must be full_attention for the first"),
        ("mistral", {"sliding_window": 0}, "window must be at least 1, got 0"),
        ("mistral", {"sliding_window": "9"}, 'window must be an integer, got "9"'),
        ("qwen2", {**IN_WINDOW, "layer_types": 3 * SLIDING + FULL}, "layer_types must be full_attention for"),
        ("qwen2", {**IN_WINDOW, "layer_types": 3 * SLIDING}, "layer_types must be full_attention for the"),
        ("qwen2", {**IN_WINDOW, "layer_types": 7}, "layer_types must be a list, got 7"),
        ("qwen2", {"layer_types": 4 * SLIDING}, "layer_types must be full_attention for the first"),
        (
            "qwen2",
            {"layer_types": 4 * ["chunked_attention"]},
            r"layer_types must be full_attention .*, got \['chunked_attention', ",
        ),
        ("qwen2", {"max_window_layers": "2"}, "max_window_layers must be an integer of at least 0, got '2'"),
        (
            "smollm3",
            {**IN_WINDOW, "no_rope_layer_interval": 2},
            "layer_types must be full_attention for the first layers",
        ),
        (
            "smollm3",
            {"no_rope_layers": [0, 1, 1, 1]},
            r"no_rope_layers must be 0 for every n-th layer and 1 for the others, .*got \[0, 1, 1, 1\]",
        ),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}, "no_rope_layers must be 0 for every n-th layer"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer of at least 1"),
        ("qwen2", {"num_hidden_layers": "4"}, "num_hidden_layers must be an integer of at least 1, got '4'"),
        (
            "qwen2",
            {"architectures": ["Qwen3ForCausalLM"]},
            "architectures must be 'Qwen2ForCausalLM', got 'Qwen3ForCausalLM'",
        ),
        ("qwen2_moe", {}, "model_type must be 'llama' or .* or 'smollm3', got 'qwen2_moe'"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused_by_name(family, changes, message):
    with pytest.raises(UserError, match=f"config.json: {message}"):
        from_hf_config({"model_type": family} | SHAPE | changes, "config.json")


def of_size(vocab, dim, mlp, layers, heads, kv_heads, **others):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, (vocab, dim, mlp, layers, heads), strict=True))
    return sizes | {"num_key_value_heads": kv_heads} | others


PUBLISHED = {  # what their config.json holds, and the parameters that their publishers count
    "Qwen2.5-0.5B": (
        of_size(151_936, 896, 4864, 24, 14, 2, model_type="qwen2", tie_word_embeddings=True)
        | {"max_window_layers": 24, "sliding_window": 32_768, "use_sliding_window": False},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        of_size(151_936, 1024, 3072, 28, 16, 8, model_type="qwen3", tie_word_embeddings=True)
        | {"head_dim": 128, "max_window_layers": 28, "sliding_window": None, "attention_bias": False},
        596_049_920,
    ),
    "Mistral-7B-v0.1": (
        of_size(32_000, 4096, 14_336, 32, 32, 8, model_type="mistral", sliding_window=4096),
        7_241_732_096,
    ),
    "SmolLM3-3B": (
        of_size(128_256, 2048, 11_008, 36, 16, 4, model_type="smollm3", no_rope_layers=[1, 1, 1, 0] * 9)
        | {"layer_types": 36 * FULL, "sliding_window": None, "use_sliding_window": False},
        3_075_098_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_are_published(name):
    config, expected = PUBLISHED[name]
    assert from_hf_config(config, name).num_parameters == expected
