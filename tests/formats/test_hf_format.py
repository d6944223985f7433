"""transformers is the judge: what we write it reads, what it writes we read, and both compute the same."""

import json
import weakref
from collections.abc import Mapping

import pytest
import torch
import transformers
from crafted_models import add_noise
from hugging_face_tokenizers import make
from safetensors.torch import load_file, save_file

from lumi.config import UserError
from lumi.formats.hf_format import load_model, model_folder, save_model, save_model_tensors
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.rope_scaling import Llama3Scaling
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

SHAPES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "tied": {"tied_embeddings": True, "num_kv_heads": 1},
    "wide heads": {"head_dim": 32, "rope_theta": 500_000.0, "norm_eps": 1e-6},
    "scaled positions": {
        "rope_scaling": Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
        ),
        "num_kv_heads": 2,
    },
    "qk-norm": {"qk_norm": True, "num_kv_heads": 2, "tied_embeddings": True},
}
IDS = torch.randint(6, 384, (2, 50), generator=torch.Generator().manual_seed(0))


def build(tokenizer, **changes):
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "num_layers": 3,
        "model_dim": 64,
        "num_heads": 4,
        "mlp_dim": 96,
        "max_positions": 128,
    }
    return add_noise(Transformer(ModelConfig(**shape | changes), REFERENCE).init_weights(0).eval())


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
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
        )[0, prompt.shape[1] :]
    greedy = SamplingConfig(max_new_tokens=30, temperature=0.0)
    ours = generate_ids(
        model, prompt.tolist(), greedy, stop_ids=frozenset({tokenizer.eos_id}), pad_id=tokenizer.pad_id
    )[0]
    assert ours.ids == [token for token in expected.tolist() if token != tokenizer.eos_id]
    reread = load_model(tmp_path / "final", REFERENCE)
    assert reread.config == model.config
    assert torch.equal(our_logits(reread), our_logits(model))


LLAMA = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 30,
}
FOREIGN = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "no groups": {"num_key_value_heads": 8},
    "scaled positions": {"rope_parameters": LLAMA_3_ROPE},
}


def write_llama(folder, dtype=torch.float32, max_shard_size="1GB", **changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | changes))).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.eval()


@pytest.mark.parametrize("changes", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_a_random_llama_of_theirs(changes, shards, tmp_path):
    theirs = write_llama(tmp_path, max_shard_size="100KB" if shards == "sharded" else "1GB", **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    ours = load_model(tmp_path, REFERENCE).eval()
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_and_a_padded_vocabulary(dtype, tokenizer, tmp_path):
    write_llama(tmp_path, dtype, vocab_size=448)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(tmp_path, REFERENCE, tokenizer=tokenizer).eval()
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    write_llama(tmp_path, vocab_size=380)
    with pytest.raises(
        UserError, match=r"the tokenizer must have at most the model's 380 ids, got 384; remove tokens"
    ):
        load_model(tmp_path, REFERENCE, tokenizer=tokenizer)


@pytest.mark.parametrize("generation", ["new", "old", "oldest"])
def test_the_config_of_every_generation(generation, tmp_path):
    write_llama(tmp_path, rope_parameters=LLAMA_3_ROPE)
    if generation != "new":  # rope_theta beside rope_scaling; before that, "type" in it
        data = json.loads((tmp_path / "config.json").read_text())
        scaling = data.pop("rope_parameters")
        data |= {
            "rope_theta": scaling.pop("rope_theta"),
            "rope_scaling": scaling,
            "head_dim": None,
            "torch_dtype": data.pop("dtype"),
        }
        if generation == "oldest":
            scaling["type"] = scaling.pop("rope_type")
        (tmp_path / "config.json").write_text(json.dumps(data))
    config = load_model(tmp_path, REFERENCE).config
    assert config.rope_theta == 500_000.0
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=30
    )


def rewrite(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors")


FREQUENCIES = 1 / 20_000.0 ** (torch.arange(0, 8, 2) / 8)
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 4.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_old_writers_repeat_must_agree(dtype, scaling, tmp_path):
    """The tied embedding, and the rotary frequencies, before or after their scaling."""
    rope = {"rope_type": "default", "rope_theta": 20_000.0} | scaling
    theirs = write_llama(tmp_path, tie_word_embeddings=True, rope_parameters=rope)
    embedding = theirs.model.embed_tokens.weight.detach()
    for frequencies in (FREQUENCIES, FREQUENCIES / scaling.get("factor", 1)):
        rewrite(tmp_path, **{"lm_head.weight": embedding.clone(), INV_FREQ: frequencies.to(dtype)})
        with torch.no_grad():
            torch.testing.assert_close(
                our_logits(load_model(tmp_path, REFERENCE)), theirs(IDS).logits, rtol=1e-4, atol=1e-4
            )
    for wrong in (1.1 * FREQUENCIES, FREQUENCIES[:-1].clone()):
        rewrite(tmp_path, **{INV_FREQ: wrong})
        with pytest.raises(
            UserError, match=rf"{INV_FREQ} must be the frequencies of config\.json, got others"
        ):
            load_model(tmp_path, REFERENCE)
    rewrite(tmp_path, **{INV_FREQ: FREQUENCIES, "lm_head.weight": embedding + 1e-3})
    with pytest.raises(UserError, match=r"lm_head\.weight must be the embedding, to which it is tied, got"):
        load_model(tmp_path, REFERENCE)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_llama(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    first, second = map(load_file, files[:2])
    save_file(second | {(name := sorted(first)[0]): first[name]}, files[1])
    with pytest.raises(
        UserError, match=rf"{name} must be in one file, got {files[0].name} and {files[1].name}"
    ):
        load_model(tmp_path, REFERENCE)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_cut_into_files(tied, tokenizer, tmp_path):
    model = build(tokenizer, tied_embeddings=tied)
    save_model(tmp_path / "final", model, tokenizer, max_shard_bytes=120_000)
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    tensors = {path.name: load_file(path) for path in (tmp_path / "final").glob("*.safetensors")}
    assert sorted(tensors) == [
        f"model-{number:05d}-of-{len(tensors):05d}.safetensors" for number in range(1, len(tensors) + 1)
    ]
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    assert index["metadata"]["total_size"] == 4 * model.config.num_parameters
    sizes = [sum(tensor.nbytes for tensor in held.values()) for held in tensors.values()]
    assert max(sizes) <= 120_000
    # Two neighbours are together larger than one file may be.
    assert len(sizes) <= 2 * sum(sizes) / 120_000 + 1
    assert torch.equal(our_logits(load_model(tmp_path / "final", REFERENCE)), our_logits(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    save_model(tmp_path / "one", model, tokenizer, max_shard_bytes=10**9)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    save_model(tmp_path / "each", model, tokenizer, max_shard_bytes=1)
    assert len(list((tmp_path / "each").glob("model-*-of-*.safetensors"))) == len(model.state_dict())


class OnDemand(Mapping):
    """Makes tensors on demand; counts how often, and the most bytes that were alive together."""

    def __init__(self, tensors):
        self.whole, self.asked, self.alive, self.most = tensors, [], 0, 0

    def __getitem__(self, name):
        self.asked.append(name)
        tensor = self.whole[name].clone()
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self.forget, tensor.nbytes)
        return tensor

    def forget(self, size):
        self.alive -= size

    def __iter__(self):
        return iter(self.whole)

    def __len__(self):
        return len(self.whole)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_never_all_in_memory(tied, tokenizer, tmp_path):
    """The files equal those of a model in memory, but only one file and the next tensor are in memory."""
    model = build(tokenizer, tied_embeddings=tied)
    tensors = OnDemand(model.state_dict())
    save_model_tensors(tmp_path / "lazy", model.config, tensors, tokenizer, max_shard_bytes=120_000)
    assert tensors.asked == list(model.state_dict())
    assert (
        tensors.most
        <= 120_000 + max(tensor.nbytes for tensor in tensors.whole.values())
        < 4 * model.config.num_parameters / 2
    )
    assert tensors.alive == 0
    save_model(tmp_path / "at once", model, tokenizer, max_shard_bytes=120_000)
    lazy, at_once = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("lazy", "at once")
    )
    assert lazy == at_once


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
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    } <= names


def corrupt(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"config\.json: model_type must be 'llama' or .*, got 'gpt2'"),
        ({"hidden_size": 128}, r"model\.embed_tokens\.weight must have shape \(384, 128\), got \(384, 64\)"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\.\S+ must have shape .*, got nothing"),
        (
            {"num_hidden_layers": 2},
            r"a weight that this model has no place for: model\.layers\.2\.\S+ \(9 in all\)",
        ),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights(changes, message, tokenizer, tmp_path):
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


def test_damaged_and_malicious_shards(tokenizer, tmp_path):
    folder = tmp_path / "final"
    save_model(folder, build(tokenizer), tokenizer, max_shard_bytes=120_000)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / shard.name)
    with pytest.raises(
        UserError,
        match=rf"{shard.name}: is missing; model\.safetensors\.index\.json names it; copy the whole folder",
    ):
        load_model(folder, REFERENCE)
    for name in (f"../{shard.name}", str(tmp_path / shard.name), "..", "pytorch_model.bin", 7):
        index_file.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(
            UserError, match=r"must name safetensors files beside it, got '.*'; do not use this folder"
        ):
            load_model(folder, REFERENCE)
    for data in ([], {}, {"weight_map": {}}, {"weight_map": [shard.name]}):
        index_file.write_text(json.dumps(data))
        with pytest.raises(
            UserError, match=r"index\.json: must hold a weight_map of weights and their files, got none"
        ):
            load_model(folder, REFERENCE)
    (tmp_path / shard.name).rename(shard)
    index_file.write_text(json.dumps(index))
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(torch.int8)}, shard)
    with pytest.raises(
        UserError, match=rf"{shard.name}: {name} must be of BF16, F16, F32, F64, got I8: quantised weights\?"
    ):
        load_model(folder, REFERENCE)


def test_a_run_without_a_final_model_and_another_tokenizer(tokenizer, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"run: must be a finished run, but has no final/ yet; finish it with --resume"
    ):
        model_folder(tmp_path / "run")
    save_model(tmp_path / "run" / "final", build(tokenizer), tokenizer)
    final = tmp_path / "run" / "final"
    assert model_folder(tmp_path / "run") == model_folder(final) == final
    load_model(tmp_path / "run" / "final", REFERENCE, tokenizer=tokenizer)
    corrupt(tmp_path / "run" / "final", tokenizer_fingerprint="0" * 64)
    ours = tokenizer.fingerprint
    message = rf"the tokenizer must be the one it was trained with, of fingerprint 0{{64}}, got {ours}"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "run" / "final", REFERENCE, tokenizer=tokenizer)


def test_the_tokenizer_in_a_folder_of_others_is_compared_too(tokenizer, tmp_path):
    save_model(tmp_path, build(tokenizer), tokenizer)
    corrupt(tmp_path, tokenizer_fingerprint=None)
    load_model(tmp_path, REFERENCE, tokenizer=tokenizer)
    another = load_tokenizer(make(tmp_path / "another", "qwen"))
    with pytest.raises(UserError, match="the tokenizer must be the one it was trained with, of fingerprint"):
        load_model(tmp_path, REFERENCE, tokenizer=another)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").unlink()
    load_model(tmp_path, REFERENCE, tokenizer=tokenizer)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must be the config of a model"):
        load_model(tmp_path, REFERENCE)


def test_saving_again_replaces_the_folder(tokenizer, tmp_path):
    for seed in (0, 1):
        model = build(tokenizer).init_weights(seed)
        save_model(tmp_path / "final", model, tokenizer)
    assert torch.equal(
        load_model(tmp_path / "final", REFERENCE).token_embedding.weight, model.token_embedding.weight
    )
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
