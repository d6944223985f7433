"""The demo on its smallest sources and a model of a few thousand parameters; the real one is `make demo`."""

import json
import lzma
import re

import pytest

import lumi.demo
from lumi.config import read_json, to_dict
from lumi.corpus import read_corpus
from lumi.data.token_store import TokenStore
from lumi.planning import pace
from lumi.planning.pace import Pace
from lumi.provenance.chain import verify
from lumi.tokenizer.loading import load_tokenizer

TRAIN = {
    "batches": {"sequence_length": 64, "batch_tokens": 512, "micro_batch_size": 4},
    "optimizer": {"peak_lr": 0.01, "schedule": {"kind": "cosine", "warmup_steps": 5}},
    "validation_tokens": None,
}
PRETRAIN = TRAIN | {
    "model": {
        "vocab_size": 512,
        "num_layers": 1,
        "model_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
        "max_positions": 256,
    },
    "num_steps": 60,
    "validate_every": 30,
    "save_every": 30,
}
FINETUNE = TRAIN | {"lora": {"rank": 4}, "num_steps": 30, "validate_every": 10, "save_every": 10}


@pytest.fixture
def small_configs(tmp_path, monkeypatch):
    """The demo's configs, with the topics alone to pre-train on, and the questions of one small package."""
    folder = tmp_path / "configs"
    folder.mkdir()
    shipped = {path.stem: read_json(path) for path in pace.CONFIGS.glob("*.json")}
    shipped["prepare"]["sources"][0]["packages"] = ["topics"]
    for side in ("train", "held_out"):
        shipped[f"questions_{side}"]["sources"][0] |= {"packages": ["jinja2"], "held_out_fraction": 0.3}
    shipped |= {"tokenizer": {"vocab_size": 512}, "pretrain": PRETRAIN, "finetune": FINETUNE}
    for name, data in shipped.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(pace, "CONFIGS", folder)
    monkeypatch.setattr(pace, "fast_bfloat16", lambda device: False)  # computes in float32


def records(folder, kind):
    return [
        record
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == kind
    ]


def questions(folder):
    return {
        conversation[0].content
        for batch in read_corpus(folder).iter_conversations()
        for conversation in batch.conversations
    }


def test_all_stages_and_a_second_call(small_configs, tmp_path, capsys):
    output = tmp_path / "demo"
    assert lumi.demo.demo(output, minutes=0, device="cpu") == 0
    printed = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"^\[(\d)/9\]", printed, flags=re.MULTILINE)] == list(
        range(1, 10)
    )

    text = lumi.demo.held_out_text(output / "tokens", load_tokenizer(output / "tokenizer"))
    assert len(text) == TokenStore.open(output / "tokens").split("validation").num_bytes
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert f"{xz:.3f} bits per byte" in printed
    last = records(output / "pretrain", "validation")[-1]
    assert last["bytes"] == len(text)
    assert f"{last['bits_per_byte']:.3f} bits per byte" in printed

    before, *_, after = [record["loss"] for record in records(output / "finetune", "validation")]
    assert f"before         {before:.3f} nats per token" in printed
    assert f"after          {after:.3f} nats per token" in printed
    assert after < before
    assert (output / "finetune" / "final" / "adapter_model.safetensors").exists()
    results = read_json(output / "evaluation" / "evaluation_results.json")
    assert set(results["perplexity"]) == {str(output / "tokens"), str(output / "questions")}
    chain = list(verify(output / "evaluation").all())
    assert {link.verdict for link in chain} == {"ok"}
    assert len(chain) == 10

    seen, held_out = questions(output / "questions_train"), questions(output / "questions_held_out")
    assert not seen & held_out
    asked = re.findall(r"^  \[(seen|held out)\] (.+)$", printed, flags=re.MULTILINE)
    assert [side for side, _ in asked] == ["seen"] * 2 + ["held out"] * 3
    assert all(question in (seen if side == "seen" else held_out) for side, question in asked)
    for path in ("corpus", "tokenizer", "tokens", "pretrain", "questions", "finetune", "evaluation", "model"):
        assert str(output / path) in printed
        assert (output / path).exists()

    weights = (output / "model" / "model.safetensors").read_bytes()
    assert lumi.demo.demo(output, minutes=0, device="cpu") == 0
    assert capsys.readouterr().out.count("is there already") == 3
    assert (output / "model" / "model.safetensors").read_bytes() == weights


def test_a_demo_that_has_begun_keeps_its_pace(small_configs, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "step_seconds", lambda *args: pytest.fail("measured again"))
    config = Pace("pretrain", "bfloat16", 0.5).config("pretrain")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "config.json").write_text(json.dumps(to_dict(config)))
    assert lumi.demo.Demo(tmp_path, 5.0, "cpu")._pace() == Pace("pretrain", "bfloat16", 0.5)
