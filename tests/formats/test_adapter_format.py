"""PEFT is the judge: it loads our adapters, we load its, and both compute the same."""

import hashlib
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from crafted_models import LORA_KINDS, save_adapted, save_base

from lumi.config import UserError
from lumi.formats.adapter_format import is_adapter, load_adapter, save_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hf_format import load_model
from lumi.formats.pretrained import load_pretrained
from lumi.host.storage import sha256_file
from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig, add_lora, merge_lora, token_matrices, trained_rows

IDS = torch.randint(6, 384, (2, 40), generator=torch.Generator().manual_seed(0))


def our_logits(model):
    with torch.no_grad():
        return model.eval().logits(model.hidden(IDS))


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    return save_base(tokenizer, tmp_path / "base")


@pytest.mark.parametrize("config", LORA_KINDS, ids=["plain", "rslora", "some", "dora"])
def test_peft_computes_the_same_from_our_adapter(config, base_dir, tokenizer, tmp_path, recwarn):
    model = save_adapted(base_dir, config, tokenizer, tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [str(warning.message) for warning in recwarn if "adapter" in str(warning.message).lower()]
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert (expected - our_logits(load_model(base_dir, REFERENCE))).abs().max() > 0.1
    torch.testing.assert_close(our_logits(model), expected, rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model), merged(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj"], r".*\.layers\.1\..*o_proj"])
def test_we_compute_the_same_from_theirs(targets, base_dir, tokenizer, tmp_path):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets,
        init_lora_weights=False,
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(IDS).logits
    model = load_model(base_dir, REFERENCE)
    loaded = load_adapter(tmp_path / "adapter", model, base_dir, tokenizer)
    assert (loaded.rank, loaded.alpha, loaded.rslora) == (3, 7.0, True)
    torch.testing.assert_close(our_logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", LORA_KINDS, ids=["plain", "rslora", "some", "dora"])
def test_on_a_qwen2_in_a_window_too(config, tokenizer, tmp_path):
    """Its linears have biases, which adapters and merging leave as they are; in both directions."""
    base_dir = save_base(tokenizer, tmp_path / "base", qkv_bias=True, window=9, full_attention_layers=1)
    model = save_adapted(base_dir, config, tokenizer, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    assert type(base).__name__ == "Qwen2ForCausalLM"
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(our_logits(model), expected, rtol=1e-4, atol=1e-4)
    merge_lora(model)
    with torch.no_grad():
        merged = theirs.merge_and_unload()(IDS).logits
    torch.testing.assert_close(our_logits(model), merged, rtol=1e-4, atol=1e-4)

    fresh = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    options = {"use_dora": config.dora, "use_rslora": config.rslora, "init_lora_weights": False}
    other = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "up_proj"], **options)
    theirs = peft.get_peft_model(fresh, other).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(IDS).logits
    loaded = load_model(base_dir, REFERENCE)
    load_adapter(tmp_path / "theirs", loaded, base_dir, tokenizer)
    torch.testing.assert_close(our_logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_are_peft_s_too(tied, tokenizer, tmp_path):
    base_dir = save_base(tokenizer, tmp_path / "base", tied_embeddings=tied)
    config = LoraConfig(rank=4, tokens=("<|im_start|>", "<|im_end|>"))
    model = load_model(base_dir, REFERENCE)
    add_lora(model, config, token_ids=[4, 5])
    with torch.no_grad():
        for module in token_matrices(model).values():
            trained_rows(module).rows.mul_(3).add_(0.5)
    save_adapter(tmp_path / "ours", model, config, tokenizer, base_dir, weights_fingerprint(base_dir))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids = torch.tensor([[1, 4, 90, 5, 4, 91, 5]])
    with torch.no_grad():
        expected, ours = theirs(ids).logits, model.eval().logits(model.hidden(ids))
        untrained = load_pretrained(base_dir, device="cpu").model.logits(model.hidden(ids))
        assert (ours - untrained).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    loaded = load_pretrained(tmp_path / "ours", device="cpu", kernels="reference").model
    assert torch.equal(loaded.logits(loaded.hidden(ids)), ours)

    torch.manual_seed(0)
    indices = [4, 5] if tied else {"embed_tokens": [4, 5], "lm_head": [4, 5]}
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], trainable_token_indices=indices, init_lora_weights=False
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base_dir), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.3)
        expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(base_dir, adapter_path=tmp_path / "theirs", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(loaded.hidden(ids)), expected, rtol=1e-4, atol=1e-4)


def test_a_base_in_other_files_is_the_same_and_a_rounded_one_is_not(base_dir, tokenizer, tmp_path):
    model = save_adapted(base_dir, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    options = {"adapter_path": tmp_path / "adapter", "device": "cpu", "kernels": "reference"}
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(our_logits(load_pretrained(tmp_path / "sharded", **options).model), our_logits(model))
    with pytest.raises(
        UserError, match=r"the base must be .*, got other weights in .*rounded; pass both: that"
    ):
        load_pretrained(tmp_path / "rounded", **options)


def test_an_adapter_of_the_first_version_finds_its_base(base_dir, tokenizer, tmp_path):
    model = save_adapted(base_dir, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    of_files = hashlib.sha256(sha256_file(base_dir / "model.safetensors").encode()).hexdigest()
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"base_fingerprint": of_files})
    loaded = load_pretrained(tmp_path / "adapter", device="cpu", kernels="reference")
    assert torch.equal(our_logits(loaded.model), our_logits(model))


def test_it_comes_back_as_it_went(base_dir, tokenizer, tmp_path):
    config = LoraConfig(rank=4, alpha=6, dropout=0.1, targets=("v_proj", "up_proj"))
    model = save_adapted(base_dir, config, tokenizer, tmp_path / "run" / "final")
    expected = our_logits(model)
    options = {"device": "cpu", "kernels": "reference"}
    by_itself = load_pretrained(tmp_path / "run", **options)
    with_base = load_pretrained(base_dir, adapter_path=tmp_path / "run" / "final", **options)
    for loaded in (by_itself, with_base):
        assert (loaded.folder, loaded.adapter) == (base_dir, tmp_path / "run" / "final")
        assert not loaded.model.training
        assert torch.equal(our_logits(loaded.model), expected)
    assert load_pretrained(base_dir, device="cpu").adapter is None
    names = set(safetensors.torch.load_file(tmp_path / "run" / "final" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight" in names
    assert len(names) == 8


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(path, key):
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key})
    )


def rewrite(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


A_WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def config_with(**changes):
    return lambda base, adapter: edit(adapter / "adapter_config.json", **changes)


def weights_with(change):
    return lambda base, adapter: rewrite(adapter / "adapter_model.safetensors", change)


def replace_weight(key, change):
    return weights_with(lambda tensors: tensors.update({key: change(tensors.get(key, tensors[A_WEIGHT]))}))


REFUSALS = [
    (
        lambda base, adapter: (adapter / "adapter_config.json").unlink(),
        "must be an adapter folder with adapter_config.json",
    ),
    (
        lambda base, adapter: (adapter / "adapter_config.json").write_text("[]"),
        r"must hold an object, got \[\]",
    ),
    (config_with(peft_type="IA3"), "peft_type must be 'LORA', got 'IA3'"),
    (config_with(init_lora_weights="pissa"), "init_lora_weights must be True or .*, got 'pissa'"),
    (
        config_with(modules_to_save=["lm_head"]),
        "lm_head.weight must be in the file, by modules_to_save, got nothing",
    ),
    (config_with(modules_to_save=["score"]), "modules_to_save must name modules of the model, got 'score'"),
    (config_with(modules_to_save="lm_head"), "modules_to_save must be a list of names, got 'lm_head'"),
    (
        config_with(rank_pattern={"q_proj": 2}),
        r"q_proj.lora_A.weight must have shape \(2, 32\) by adapter_config.json and the model, got \(4, 32\)",
    ),
    (config_with(rank_pattern={"q_proj": 0}), "rank_pattern: rank must be at least 1, got 0"),
    (config_with(alpha_pattern={"(": 2}), r"alpha_pattern must hold regular expressions: .*, got '\('"),
    (config_with(alpha_pattern=["q_proj"]), "alpha_pattern must be an object of regular expressions and"),
    (config_with(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens must not be set"),
    (config_with(use_something_new=True), "use_something_new must not be set, got True"),
    (lambda base, adapter: drop(adapter / "adapter_config.json", "lora_alpha"), "lora_alpha is missing"),
    (config_with(r=0), "rank must be at least 1, got 0"),
    (
        config_with(r=5),
        r"q_proj.lora_A.weight must have shape \(5, 32\) by adapter_config.json and the model, got \(4, 32\)",
    ),
    (config_with(use_dora=True), r"lora_magnitude_vector must have shape \(32,\) .*, got nothing"),
    (
        config_with(trainable_token_indices={"embed_tokens": 5, "lm_head": 5}),
        "trainable_token_indices must be ids below 384",
    ),
    (
        config_with(trainable_token_indices=[4]),
        "trainable_token_indices must be the same for the embedding and an lm_head",
    ),
    (
        config_with(trainable_token_indices={"embed_tokens": [4], "lm_head": [4]}),
        "trainable_tokens_delta must have shape .*nothing",
    ),
    (
        lambda base, adapter: (adapter / "adapter_model.safetensors").unlink(),
        "is missing; only safetensors weights are read",
    ),
    (
        lambda base, adapter: (adapter / "adapter_model.safetensors").write_bytes(b"x" * 99),
        "must be a safetensors file",
    ),
    (weights_with(dict.clear), "must hold adapters of the model's linears, got none"),
    (
        weights_with(lambda tensors: tensors.pop(A_WEIGHT)),
        r"q_proj.lora_A.weight must have shape \(4, 32\) .*, got nothing",
    ),
    (
        replace_weight("alien", torch.clone),
        r"alien must have a place in the model",
    ),
    (
        replace_weight("lm_head.lora_A.weight", torch.clone),
        r"that has none .the loss is fused with lm_head",
    ),
    (
        replace_weight("base_model.model.model.norm.lora_A.weight", torch.clone),
        "model.norm.lora_A.weight must have a place",
    ),
    (
        replace_weight(A_WEIGHT.replace("lora_A.weight", "lora_magnitude_vector"), torch.clone),
        "lora_magnitude_vector must have a place",
    ),
    (
        replace_weight(A_WEIGHT, lambda tensor: tensor * float("nan")),
        "q_proj.lora_A.weight must hold finite float32",
    ),
    (
        replace_weight(A_WEIGHT, lambda tensor: tensor.to(torch.int8)),
        "q_proj.lora_A.weight must hold finite float32",
    ),
    (
        replace_weight(A_WEIGHT, lambda tensor: tensor.to(torch.float8_e4m3fn)),
        "q_proj.lora_A.weight must hold finite float32",
    ),
    (
        lambda base, adapter: rewrite(base / "model.safetensors", lambda t: t["model.norm.weight"].mul_(2)),
        "the base must be the one",
    ),
]


@pytest.mark.parametrize(("damage", "message"), REFUSALS, ids=[message[:30] for _, message in REFUSALS])
def test_refuses(damage, message, base_dir, tokenizer, tmp_path):
    save_adapted(base_dir, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    damage(base_dir, tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(tmp_path / "adapter", load_model(base_dir, REFERENCE), base_dir, tokenizer)
    assert "\n" not in str(caught.value)


def test_targets_of_single_layers_are_named_whole(base_dir, tokenizer, tmp_path, recwarn):
    config = LoraConfig(rank=4, targets=("layers.1.attention.q_proj", "v_proj"))
    model = save_adapted(base_dir, config, tokenizer, tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.1.self_attn.q_proj", "v_proj"]
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "adapter"
    ).eval()
    assert not [str(warning.message) for warning in recwarn if "adapter" in str(warning.message).lower()]
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
