"""Exported and merged folders compute what the model in memory computes; transformers is the judge."""

import errno
import json
import shutil

import pytest
import torch
import transformers
from crafted_models import add_noise

import lumi.formats.export
import lumi.formats.export_form
from lumi.cli import dispatch
from lumi.config import UserError
from lumi.formats.adapter_format import save_adapter
from lumi.formats.export import export_model, merge_adapter
from lumi.formats.export_form import HuggingFaceFolder
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hf_format import load_model, save_model
from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig, adapters, add_lora
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

SHAPE = {
    "num_layers": 2,
    "model_dim": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 80,
    "max_positions": 64,
}
IDS = torch.randint(6, 384, (2, 40), generator=torch.Generator().manual_seed(0))


def build(tokenizer, **changes):
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **(SHAPE | changes))
    return add_noise(Transformer(config, REFERENCE).init_weights(0).eval())


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(IDS))


def their_logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def run(tokenizer, tmp_path):
    """A run folder with a whole model."""
    save_model(tmp_path / "run" / "final", build(tokenizer), tokenizer)
    return tmp_path / "run"


LORA = {
    "lora": LoraConfig(rank=4),
    "rslora on two": LoraConfig(rank=8, rslora=True, targets=("q_proj", "down_proj")),
    "dora": LoraConfig(rank=4, dora=True),
}


def add_adapter(run, config, tokenizer):
    """An adapter folder for a run's model, and the model with it."""
    model = load_model(run, REFERENCE).eval()
    add_lora(model, config)
    with torch.no_grad():
        for index, (_, module) in enumerate(adapters(model)):
            module.lora_B.normal_(generator=torch.Generator().manual_seed(index)).mul_(0.1)
            if module.lora_magnitude is not None:
                module.lora_magnitude.mul_(1.2)
    folder = run.parent / "adapter"
    save_adapter(folder, model, config, tokenizer, run / "final", weights_fingerprint(run / "final"))
    return folder, model


# Export.


def test_float32_is_equal_to_the_bit(run, tmp_path):
    done = export_model(run, tmp_path / "out")
    model, reread = load_model(run, REFERENCE), load_model(tmp_path / "out", REFERENCE)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), reread.state_dict().values(), strict=True)
    )
    assert done.difference == 0
    assert "equal" in str(done)
    assert (done.written.num_files, done.written.num_bytes) == (
        1,
        (tmp_path / "out" / "model.safetensors").stat().st_size,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_weights_in_shards(run, tmp_path, dtype):
    model = load_model(run, REFERENCE)
    done = export_model(run, tmp_path / "out", form=HuggingFaceFolder(dtype, max_shard_bytes=60_000))
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [
        f"model-{i:05d}-of-{done.written.num_files:05d}.safetensors"
        for i in range(1, done.written.num_files + 1)
    ]
    before = logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    assert torch.equal(logits(load_model(tmp_path / "out", REFERENCE)), logits(model))
    torch.testing.assert_close(their_logits(tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)
    batch = torch.randint(384, (2, 64), generator=torch.Generator().manual_seed(0))
    original = load_model(run, REFERENCE).join_weights()
    model.join_weights()
    with torch.no_grad():
        difference = model.logits(model.hidden(batch)) - original.logits(original.hidden(batch))
    expected = difference.abs().max().item()
    assert done.difference == expected > 0
    assert not torch.equal(before, logits(model))
    assert f"at most {expected:.3g}" in str(done)


def test_the_tokenizer_and_another_one(run, tokenizer, tmp_path):
    edited = tokenizer.with_chat_template("{{ messages }}")
    edited.save(tmp_path / "edited")
    export_model(run, tmp_path / "out", tokenizer_path=tmp_path / "edited")
    assert load_tokenizer(tmp_path / "out").chat_template == "{{ messages }}"
    export_model(tmp_path / "out", tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == "{{ messages }}"


# Merge.


@pytest.mark.parametrize("config", LORA.values(), ids=LORA)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": True}, {"qkv_bias": True, "window": 9}],
    ids=["untied", "tied", "biases"],
)
def test_merged_is_base_and_adapter(tokenizer, tmp_path, config, changes):
    run = tmp_path / "run"
    save_model(run / "final", build(tokenizer, **changes), tokenizer)
    adapter, model = add_adapter(run, config, tokenizer)
    error, bound = merge_adapter(adapter, tmp_path / "merged").merging
    assert 0 < error < 1e-12
    assert 1e-8 < bound < 1e-3
    merged = load_model(tmp_path / "merged", REFERENCE)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(their_logits(tmp_path / "merged"), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(load_model(run, REFERENCE))).abs().max() > 0.1
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_merge_with_a_base_that_moved(run, tokenizer, tmp_path):
    adapter, model = add_adapter(run, LORA["lora"], tokenizer)
    run.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="there is no model now"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", base_path=tmp_path / "moved")
    merge_adapter(
        adapter, tmp_path / "narrow", base_path=tmp_path / "moved", form=HuggingFaceFolder("bfloat16")
    )
    module = dict(adapters(model))["layers.0.attention.q_proj"]
    with torch.no_grad():  # alpha / rank = 8
        expected = (module.weight.double() + 8 * module.lora_B.double() @ module.lora_A.double()).float()
    merged, narrow = (
        load_model(tmp_path / name, REFERENCE).layers[0].attention.q_proj.weight
        for name in ("merged", "narrow")
    )
    assert torch.equal(merged, expected)
    assert torch.equal(narrow, expected.to(torch.bfloat16).float())


@pytest.mark.parametrize("config", LORA.values(), ids=LORA)
def test_a_wrong_merge_is_noticed(run, tokenizer, tmp_path, config, monkeypatch):
    """One weight off by a part in a thousand."""
    adapter, _ = add_adapter(run, config, tokenizer)

    def wrong(model):
        right(model)
        model.layers[1].attention.q_proj.weight.data[0] *= 1.001

    right = lumi.formats.export.merge_lora
    monkeypatch.setattr(lumi.formats.export, "merge_lora", wrong)
    with pytest.raises(UserError, match="the merged model must compute what base and adapter compute to"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# What goes wrong.


def test_the_wrong_command(run, tokenizer, tmp_path):
    adapter, _ = add_adapter(run, LORA["lora"], tokenizer)
    with pytest.raises(
        UserError, match=r"--model-path must be a whole model, got the adapter .*; `lumi merge` makes one"
    ):
        export_model(adapter, tmp_path / "out")
    with pytest.raises(UserError, match="--model-path must hold an adapter, got the whole model"):
        merge_adapter(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty(run, tokenizer, tmp_path):
    adapter, _ = add_adapter(run, LORA["lora"], tokenizer)
    (tmp_path / "out").mkdir()
    export_model(run, tmp_path / "out")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir())
    for command, path in ((export_model, run), (merge_adapter, adapter)):
        with pytest.raises(UserError, match=r"--output-dir must be new or empty, got \S+out; choose another"):
            command(path, tmp_path / "out")
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize("damage", ["a weight", "the config"])
def test_what_is_read_back_differently_is_removed(run, tmp_path, monkeypatch, damage):
    def spoil(folder, *rest):
        save_model(folder, *rest)
        if damage == "a weight":
            data = bytearray((folder / "model.safetensors").read_bytes())
            data[-4] ^= 1  # the lowest bit of the last weight
            (folder / "model.safetensors").write_bytes(data)
        else:
            config = json.loads((folder / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] = 10_001.0
            (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(lumi.formats.export_form, "save_model", spoil)
    with pytest.raises(UserError, match="what was read back is not what was written; nothing was left there"):
        export_model(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_fills_up(run, tmp_path, monkeypatch):
    def fill(folder, *_):
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lumi.formats.export_form, "save_model", fill)
    with pytest.raises(
        UserError, match=r"out: cannot be written: No space left on device; nothing was left there"
    ):
        export_model(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_do_not_fit(run, tokenizer, tmp_path, monkeypatch):
    model = build(tokenizer)
    model.final_norm.weight.data[3] = 1e5
    save_model(tmp_path / "large", model, tokenizer)
    message = (
        r"--dtype must be able to hold every weight, got float16, in which final_norm\.weight is not finite"
    )
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / "large", tmp_path / "out", form=HuggingFaceFolder("float16"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(
        UserError, match=r"--output-dir must have 0\.00 GB of space for the weights, got 0\.00 GB"
    ):
        export_model(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "run"]


def test_the_commands(run, tokenizer, tmp_path, capsys):
    adapter, _ = add_adapter(run, LORA["lora"], tokenizer)
    options = "--dtype bfloat16 --max-shard-size 60KB --output-dir".split()
    assert dispatch(["export", "--model-path", str(run), *options, str(tmp_path / "exported")]) == 0
    printed = capsys.readouterr().out
    assert "files of weights, 0.2 MB; read back and compared: the logits differ by at most 0." in printed
    paths = ["--model-path", str(adapter), "--base-path", str(run)]
    assert dispatch(["merge", *paths, *options, str(tmp_path / "merged")]) == 0
    assert "merged in float64: the logits differ by at most " in capsys.readouterr().out
    for name in ("exported", "merged"):
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
