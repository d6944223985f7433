"""The demo on its smallest source and a model of a few thousand parameters; the real one is `make demo`."""

import json
import lzma
import re

import pytest

import lumi.demo
from lumi.config import read_json
from lumi.token_store import TokenStore
from lumi.tokenizer import Tokenizer

TRAIN = {
    "model": {"vocab_size": 512, "num_layers": 1, "model_dim": 32, "num_heads": 2, "mlp_dim": 64, "max_positions": 256},
    "batches": {"sequence_length": 64, "batch_tokens": 512, "micro_batch_size": 4},
    "optimizer": {"peak_lr": 0.01, "schedule": {"kind": "cosine", "warmup_steps": 5}},
    "num_steps": 60,
    "validate_every": 30,
    "validation_tokens": None,
    "save_every": 30,
}


@pytest.fixture
def small_configs(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    prepare = read_json(lumi.demo.CONFIGS / "prepare.json")
    prepare["sources"][0]["packages"] = ["topics"]
    for name, data in {"prepare": prepare, "tokenizer": {"vocab_size": 512}, "train": TRAIN}.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(lumi.demo, "CONFIGS", folder)


def test_all_stages_and_a_second_call(small_configs, tmp_path, capsys):
    output = tmp_path / "demo"
    assert lumi.demo.demo(output, minutes=0, device="cpu") == 0
    printed = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"^\[(\d)/5\]", printed, flags=re.MULTILINE)] == [1, 2, 3, 4, 5]
    assert "Return the number of" in printed
    text = lumi.demo.held_out_text(output / "tokens", Tokenizer.load(output / "tokenizer"))
    assert len(text) == TokenStore.open(output / "tokens").split("validation").num_bytes
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert f"{xz:.3f} bits per byte" in printed
    last = [json.loads(line) for line in (output / "pretrain" / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["kind"], last["bytes"]) == ("validation", len(text))
    assert f"{last['bits_per_byte']:.3f} bits per byte" in printed
    for path in ("corpus", "tokenizer", "tokens", "pretrain/loss.png", "pretrain/metrics.jsonl", "pretrain/final"):
        assert str(output / path) in printed
        assert (output / path).exists()

    weights = (output / "pretrain" / "final" / "model.safetensors").read_bytes()
    assert lumi.demo.demo(output, minutes=0, device="cpu") == 0
    assert "is there already" in capsys.readouterr().out
    assert (output / "pretrain" / "final" / "model.safetensors").read_bytes() == weights


def test_training_is_cut_to_the_minutes_it_may_take(small_configs, tmp_path, monkeypatch):
    monkeypatch.setattr(lumi.demo, "_step_seconds", lambda config: 2.0 if config.dtype == "float32" else 1.0)
    monkeypatch.setattr(lumi.demo, "LEAST_STEPS", 40)

    def steps(minutes):
        config = lumi.demo._train_config(tmp_path / "none", minutes, "cpu")
        assert config.dtype == "bfloat16"
        return config.num_steps

    assert [steps(minutes) for minutes in (0.1, 0.95, 9.0, 0)] == [40, 57, 60, 60]
