"""transformers is the judge: what we write it reads, what it writes we read, and both compute the same."""

import json

import pytest
import torch
import transformers

from lumi.config import UserError
from lumi.generate import SamplingConfig, generate_ids
from lumi.hf_format import load_model, model_folder, save_model
from lumi.kernels.bundle import REFERENCE
from lumi.model import ModelConfig, Transformer

SHAPES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "tied": {"tied_embeddings": True, "num_kv_heads": 1},
    "wide heads": {"head_dim": 32, "rope_theta": 500_000.0, "norm_eps": 1e-6},
    "qk-norm": {"qk_norm": True, "num_kv_heads": 2, "tied_embeddings": True},
}
IDS = torch.randint(6, 384, (2, 50), generator=torch.Generator().manual_seed(0))


def build(tokenizer, **changes):
    shape = {"vocab_size": tokenizer.vocab_size, "num_layers": 3, "model_dim": 64, "num_heads": 4, "mlp_dim": 96, "max_positions": 128}
    model = Transformer(ModelConfig(**shape | changes), REFERENCE).init_weights(0).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # norms away from one, and logits that tell tokens apart
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(noise, alpha=0.1)
    return model


def our_logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(IDS))


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_from_our_folder(shape, tokenizer, tmp_path):
    model = build(tokenizer, **SHAPES[shape])
    save_model(tmp_path / "final", model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if "qk_norm" in SHAPES[shape] else "LlamaForCausalLM")
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
        prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("The river opens")]])
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)[0, prompt.shape[1] :]
    greedy = SamplingConfig(max_new_tokens=30, temperature=0.0)
    ours = generate_ids(model, prompt.tolist(), greedy, stop_ids=frozenset({tokenizer.eos_id}), pad_id=tokenizer.pad_id)[0]
    assert ours == [token for token in expected.tolist() if token != tokenizer.eos_id]
    reread = load_model(tmp_path / "final", REFERENCE)
    assert reread.config == ModelConfig(
        **{**model.config.__dict__, "num_kv_heads": model.config.kv_heads, "head_dim": model.config.per_head}
    )
    assert torch.equal(our_logits(reread), our_logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_a_random_llama_of_theirs(tied, shards, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if shards == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    ours = load_model(tmp_path, REFERENCE).eval()
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_folder_has_the_keys_of_both_generations(tokenizer, tmp_path):
    save_model(tmp_path / "final", build(tokenizer, tied_embeddings=True), tokenizer, dtype="bfloat16")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["tokenizer_fingerprint"] == tokenizer.fingerprint
    header = (tmp_path / "final" / "model.safetensors").read_bytes()[8:5000]
    assert b'"__metadata__":{"format":"pt"}' in header
    assert b"lm_head" not in header
    assert b'"BF16"' in header
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"} <= names


def corrupt(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"config\.json: model_type must be 'llama' or 'qwen3', got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'default', got 'yarn'"),
        ({"head_dim": 7}, r"config\.json: head_dim must be even .* got 7"),
        ({"head_dim": "16"}, r'config\.json: head_dim must be an integer, got "16"'),
        ({"hidden_size": 128}, r"model\.embed_tokens\.weight must have shape \(384, 128\), got \(384, 64\)"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\.\S+ must have shape .*, got nothing"),
        ({"num_hidden_layers": 2}, r"a weight that this model has no place for: model\.layers\.2\.\S+ \(9 in all\)"),
    ],
    ids=str,
)
def test_what_cannot_be_imported_is_refused(changes, message, tokenizer, tmp_path):
    save_model(tmp_path / "final", build(tokenizer), tokenizer)
    corrupt(tmp_path / "final", **changes)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "final", REFERENCE)


def test_missing_and_damaged_folders(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"must be a model folder with a config\.json"):
        load_model(tmp_path, REFERENCE)
    save_model(tmp_path / "final", build(tokenizer), tokenizer)
    weights = tmp_path / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors: must be a safetensors file"):
        load_model(tmp_path / "final", REFERENCE)
    weights.unlink()
    (tmp_path / "final" / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match=r"model\.safetensors: is missing; only safetensors weights are read"):
        load_model(tmp_path / "final", REFERENCE)


def test_a_run_without_a_final_model_and_another_tokenizer(tokenizer, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run: must be a finished run, but has no final/ yet; finish it with --resume"):
        model_folder(tmp_path / "run")
    save_model(tmp_path / "run" / "final", build(tokenizer), tokenizer)
    assert model_folder(tmp_path / "run") == model_folder(tmp_path / "run" / "final") == tmp_path / "run" / "final"
    load_model(tmp_path / "run" / "final", REFERENCE, tokenizer=tokenizer)
    corrupt(tmp_path / "run" / "final", tokenizer_fingerprint="0" * 64)
    with pytest.raises(
        UserError, match=rf"the tokenizer must be the one it was trained with, of fingerprint 0{{64}}, got {tokenizer.fingerprint}"
    ):
        load_model(tmp_path / "run" / "final", REFERENCE, tokenizer=tokenizer)


def test_saving_again_replaces_the_folder(tokenizer, tmp_path):
    for seed in (0, 1):
        model = build(tokenizer).init_weights(seed)
        save_model(tmp_path / "final", model, tokenizer)
    assert torch.equal(load_model(tmp_path / "final", REFERENCE).token_embedding.weight, model.token_embedding.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
