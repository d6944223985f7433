"""What is read from transformers' configs, and what is refused; transformers reads what we write."""

import pytest
import transformers
from hugging_face_tokenizers import make

from lumi.config import UserError
from lumi.formats.hf_config import from_hf_config, generation_config, to_hf_config
from lumi.kernels.rope_scaling import Llama3Scaling
from lumi.model.model_config import ModelConfig
from lumi.tokenizer.loading import load_tokenizer

SHAPE = {"num_layers": 3, "model_dim": 64, "num_heads": 4, "mlp_dim": 96, "max_positions": 128}
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=30)


@pytest.fixture
def ours(tokenizer):
    """A config.json as we write it."""
    return to_hf_config(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE), tokenizer, "float32")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2, "head_dim": 32, "rope_theta": 500_000.0, "norm_eps": 1e-6},
        {"rope_scaling": SCALING},
        {"qk_norm": True, "tied_embeddings": True},
    ],
    ids=str,
)
def test_it_comes_back_as_it_went(changes, tokenizer, tmp_path):
    config = ModelConfig(vocab_size=384, **SHAPE | changes)
    assert from_hf_config(to_hf_config(config, tokenizer, "float32"), "c") == config


def test_what_a_config_leaves_out_follows_from_the_rest(ours):
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling"):
        del ours[key]
    config = from_hf_config(ours, "c")
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10_000.0)
    del ours["hidden_size"]
    with pytest.raises(UserError, match="c: hidden_size is missing; this is not the config of a llama model"):
        from_hf_config(ours, "c")


def test_what_ends_an_answer(tokenizer):
    other = tokenizer.with_chat_template("{{ messages[0].content }}")
    for made, ends in (
        (tokenizer, [tokenizer.eos_id, tokenizer.control_id("<|im_end|>")]),
        (other, tokenizer.eos_id),
    ):
        config = transformers.GenerationConfig.from_dict(generation_config(made))
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, ends, 3)


ANSWER = "{% for m in messages %}<|im_start|>{{ m.content }}<|endoftext|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"), [(ANSWER, [3, 1]), ("{{ no end", 3), ("{{ messages[0].content }}", 3)]
)
def test_what_ends_an_answer_by_the_template_of_others(template, ends, tmp_path):
    """Whatever the token is called; a template that fails ends none."""
    tokenizer = load_tokenizer(make(tmp_path, "llama-3", chat_template=template))
    assert (tokenizer.eos_id, tokenizer.control_id("<|endoftext|>")) == (3, 1)
    assert generation_config(tokenizer)["eos_token_id"] == ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        (
            {"architectures": {"a": 1}},
            "must be the config of a model, an object with a list of architectures",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures must be 'LlamaForCausalLM', got 'LlamaForSeq",
        ),
        (
            {"quantization_config": {"bits": 4}},
            r"quantization_config must be absent, got {'bits': 4}: this model cannot be imported",
        ),
        ({"head_dim": 7}, r"config\.json: head_dim must be even .* got 7"),
        ({"head_dim": "16"}, r'config\.json: head_dim must be an integer, got "16"'),
    ],
    ids=str,
)
def test_what_cannot_be_imported_is_refused(changes, message, ours):
    with pytest.raises(UserError, match=message):
        from_hf_config(ours | changes, "config.json")


def test_a_scaling_out_of_range(tokenizer):
    data = to_hf_config(ModelConfig(vocab_size=384, rope_scaling=SCALING, **SHAPE), tokenizer, "float32")
    data["rope_parameters"]["factor"] = data["rope_scaling"]["factor"] = 0.5
    with pytest.raises(UserError, match=r"c: rope_scaling.factor must be at least 1, got 0\.5"):
        from_hf_config(data, "c")
