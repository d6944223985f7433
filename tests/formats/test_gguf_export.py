"""GGUF by the commands: out of folders, adapters and GGUF files, and back into folders."""

import errno
import json

import gguf
import pytest
import torch
import transformers
from crafted_models import save_adapted, save_base
from gguf_files import build, foreign, write
from llama_cpp_judge import LlamaCpp

import lumi.formats.gguf_export
from lumi.cli import dispatch
from lumi.config import UserError
from lumi.formats.export import export_model, merge_adapter
from lumi.formats.gguf_export import GgufFolder, licence_of
from lumi.formats.gguf_file import open_gguf, write_gguf
from lumi.formats.hf_format import load_model, save_model
from lumi.formats.pretrained import load_pretrained
from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A model with norms that differ from one."""
    save_model(tmp_path / "model", build(tokenizer), tokenizer)
    return tmp_path / "model"


def same_weights(one, other):
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


# Out.


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--format", "gguf", "--quantize", "q8_0", "--license", "mit", "--output-dir", str(out)]
    assert dispatch(["export", "--model-path", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    size = (out / "model-q8_0.gguf").stat().st_size
    assert (
        f"out: 1 file of weights, {size / 1e6:,.1f} MB; read back and compared: the logits differ by"
        in printed
    )
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model-q8_0.gguf", "provenance.json"]
    assert (out / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf\n")
    metadata = open_gguf(out / "model-q8_0.gguf").metadata
    assert {key: metadata[f"general.{key}"] for key in ("architecture", "type", "name", "license")} == {
        "architecture": "llama",
        "type": "model",
        "name": "out",
        "license": "mit",
    }
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize("quantise", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_what_is_read_back(folder, tmp_path, quantise):
    form = GgufFolder(quantise)
    done = export_model(folder, tmp_path / "out", form=form)
    original = load_model(folder, REFERENCE)
    expected = {name: form.round(original, name, weight) for name, weight in original.state_dict().items()}
    read = load_pretrained(tmp_path / "out" / form.file_name, device="cpu", kernels="reference")
    assert all(torch.equal(weight, expected[name]) for name, weight in read.model.state_dict().items())
    assert (done.difference == 0) == (quantise == "f32")
    ids = torch.randint(387, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [model.logits(model.hidden(ids)) for model in (read.model, original)]
    assert done.difference == (logits[0] - logits[1]).abs().max().item()
    assert not form.num_bytes(original) > done.written.num_bytes


def test_notes(tokenizer, tmp_path, capsys):
    qwen = foreign(tmp_path / "tokenizer", "qwen")
    save_model(tmp_path / "model", build(qwen, mlp_dim=80, qkv_bias=True), qwen)
    options = ["--format", "gguf", "--quantize", "q4_0", "--output-dir", str(tmp_path / "out")]
    assert dispatch(["export", "--model-path", str(tmp_path / "model"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "f16, since their rows are no multiple of 32: 2 ffn_down.weight"
    assert lines[2] == "llama.cpp leaves the tokenizer's normalizer (NFC) out"
    judge = LlamaCpp(tmp_path / "out" / "model-q4_0.gguf")
    assert judge.encode("The river") == qwen.encode("The river")


def test_merging(tokenizer, tmp_path):
    base = save_base(tokenizer, tmp_path / "base")
    save_adapted(base, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    done = merge_adapter(tmp_path / "adapter", tmp_path / "out", form=GgufFolder("f32"))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert done.merging is not None
    read = load_pretrained(tmp_path / "out" / "model-f32.gguf", device="cpu", kernels="reference").model
    assert same_weights(read, load_model(tmp_path / "merged", REFERENCE))


README = {
    "---\nlanguage: en\nlicense: apache-2.0\n---\n# A": "apache-2.0",
    "---\nlicense: 'mit'\n---\n": "mit",
    "---\nlanguage: en\n---\nlicense: mit\n---\n": None,
    "# A\nlicense: mit\n": None,
    "---\nlicense: other\n": None,
}


@pytest.mark.parametrize(("text", "licence"), README.items())
def test_the_licence(folder, tmp_path, text, licence):
    (folder / "README.md").write_text(text)
    assert licence_of(folder) == licence
    export_model(folder, tmp_path / "out", form=GgufFolder())
    assert licence_of(tmp_path / "out" / "model-f32.gguf") == licence
    export_model(tmp_path / "out" / "model-f32.gguf", tmp_path / "again", form=GgufFolder("f16"))
    assert licence_of(tmp_path / "again" / "model-f16.gguf") == licence


# In.


@pytest.mark.parametrize("kind", ["lumi", "smollm2", "llama 2"])
def test_a_folder_of_a_file(tokenizer, tmp_path, kind):
    """transformers computes the same with it."""
    found = tokenizer if kind == "lumi" else foreign(tmp_path / "tokenizer", kind)
    model = build(found, qk_norm=kind == "smollm2")
    file = write(tmp_path, found, model=model)
    export_model(file, tmp_path / "hf")
    assert same_weights(load_model(tmp_path / "hf", REFERENCE), model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.tensor([found.encode("The river and the sea")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.logits(model.hidden(ids)), rtol=1e-4, atol=1e-4)
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"]


def test_commands_that_use_a_model(tokenizer, tmp_path, capsys):
    file = write(tmp_path, tokenizer, "q8_0")
    options = ["--prompt", "The river", "--max-new-tokens", "5"]
    assert dispatch(["generate", "--model-path", str(file), *options]) == 0
    of_file = capsys.readouterr().out
    export_model(file, tmp_path / "hf")
    assert dispatch(["generate", "--model-path", str(tmp_path / "hf"), *options]) == 0
    assert capsys.readouterr().out == of_file


def test_what_needs_a_folder(tokenizer, tmp_path):
    file = write(tmp_path, tokenizer)
    message = (
        r"f32\.gguf: must be a model folder here, got a GGUF file; `lumi export --model-path .* makes one"
    )
    for use in (
        lambda: dispatch(["finetune", str(file), "data.jsonl", "--output-dir", str(tmp_path / "tuned")]),
        lambda: load_model(file, REFERENCE),
        lambda: merge_adapter(file, tmp_path / "merged"),
    ):
        with pytest.raises(UserError, match=message):
            use()
    with pytest.raises(
        UserError, match=r"--adapter-path must come with a model folder, got .*gguf; `lumi export"
    ):
        load_pretrained(file, adapter_path=tmp_path, device="cpu")


def test_another_tokenizer(tokenizer, tmp_path):
    """Lumi's own in a folder is the same one, and has its fingerprint."""
    file = write(tmp_path, tokenizer)
    given = load_pretrained(file, tokenizer_path=tmp_path / "model", device="cpu").tokenizer
    assert (
        given.fingerprint
        == tokenizer.fingerprint
        != load_pretrained(file, device="cpu").tokenizer.fingerprint
    )
    assert given.eos_ids == (2, 5)
    foreign(tmp_path / "other", "smollm2")
    with pytest.raises(
        UserError, match="the tokenizer must have the tokens in the file, and at most 387, got another"
    ):
        load_pretrained(file, tokenizer_path=tmp_path / "other", device="cpu")


# What goes wrong.


@pytest.mark.parametrize("damage", ["a weight", "the metadata", "the vocabulary"])
def test_what_is_read_back_differently_is_removed(folder, tmp_path, monkeypatch, damage):
    def spoil(path, architecture, metadata, plan, tensor):
        if damage == "the metadata":
            metadata["llama.rope.freq_base"] = 10_001.0
        if damage == "the vocabulary":
            metadata["tokenizer.ggml.tokens"][300] += "x"
        write_gguf(path, architecture, metadata, plan, tensor)
        if damage == "a weight":
            data = bytearray(path.read_bytes())
            data[-64] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(lumi.formats.gguf_export, "write_gguf", spoil)
    with pytest.raises(UserError, match="read back is not what was written"):
        export_model(folder, tmp_path / "out", form=GgufFolder())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up(folder, tmp_path, monkeypatch):
    def fill(path, *_):
        path.write_bytes(b"GGUF")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lumi.formats.gguf_export, "write_gguf", fill)
    with pytest.raises(UserError, match="out: cannot be written: No space left on device; nothing was left"):
        export_model(folder, tmp_path / "out", form=GgufFolder())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_small_disk(folder, disk_of):
    disk = disk_of("200k")
    with pytest.raises(UserError, match=r"--output-dir must have 0\.00 GB of space for the weights"):
        export_model(folder, disk / "out", form=GgufFolder())
    disk_bytes = 0.9 * 200_000
    assert GgufFolder("q4_0").num_bytes(load_model(folder, REFERENCE)) < disk_bytes
    assert list(disk.glob("*out*")) == []


def test_weights_that_do_not_fit(tokenizer, tmp_path):
    model = build(tokenizer)
    model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    save_model(tmp_path / "model", model, tokenizer)
    message = (
        r"--quantize must be able to hold every weight, got f16, in which layers\.1\.mlp\.up_proj\.weight is"
    )
    with pytest.raises(UserError, match=f"{message} not finite; take bf16 or f32"):
        export_model(tmp_path / "model", tmp_path / "out", form=GgufFolder("f16"))
    export_model(tmp_path / "model", tmp_path / "out", form=GgufFolder("bf16"))


def test_what_llama_cpp_cannot_compute_is_refused_first(tokenizer, tmp_path):
    save_model(tmp_path / "model", build(tokenizer, window=8), tokenizer)
    with pytest.raises(UserError, match="the model's window must be null, since"):
        export_model(tmp_path / "model", tmp_path / "out", form=GgufFolder())
    assert not (tmp_path / "out").exists()
