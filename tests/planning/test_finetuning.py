"""The chosen settings of a fine-tuning, by hand."""

import itertools
import time

import pytest
import torch
from corpora import write_chats
from synthetic import conversation

from lumi.config import from_dict
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import tokenize
from lumi.model.transformer import ModelConfig
from lumi.planning.finetuning import choose, estimated_seconds, training_rate
from lumi.training.run_config import TrainConfig

SHAPE = ModelConfig(vocab_size=384, num_layers=2, model_dim=32, num_heads=4, mlp_dim=48, max_positions=512)
LARGE = ModelConfig(
    vocab_size=128_256, num_layers=16, model_dim=2048, num_heads=32, mlp_dim=8192, num_kv_heads=8
)


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    corpus = write_chats(folder / "corpus", [conversation(seed) for seed in range(300)])
    tokenize([corpus], tokenizer, folder / "tokens", validation_fraction=0.1)
    return TokenStore.open(folder / "tokens")


def test_the_settings_fit_the_data_and_the_model(store):
    config = from_dict(TrainConfig, choose(SHAPE, store, tokens=(), bfloat16=False, epochs=None).config)
    split = store.split("train")
    rows = split.num_tokens / config.batches.sequence_length
    longest = max(b - a for a, b in zip(split.offsets, split.offsets[1:], strict=False))
    assert longest <= config.batches.sequence_length <= 512
    assert config.num_steps * config.batches.rows == pytest.approx(3 * rows, rel=0.1)  # epochs
    assert config.num_steps >= 40
    assert (config.dtype, config.final, config.lora.rank) == ("float32", "best", 16)
    assert config.optimizer.peak_lr == 1e-3  # the most, for the smallest


def test_the_rate_falls_with_the_size(store):
    choice = choose(LARGE, store, tokens=("<|im_end|>",), bfloat16=True, epochs=0.5)
    config = from_dict(TrainConfig, choice.config)
    assert LARGE.num_parameters > 1e9
    assert config.optimizer.peak_lr == pytest.approx(2e-4 * (1e9 / LARGE.num_parameters) ** 0.35, rel=0.05)
    assert (config.dtype, config.lora.tokens) == ("bfloat16", ("<|im_end|>",))
    assert float(choice.reasons["epochs"].split(",")[0]) == pytest.approx(0.5, rel=0.02)
    fewer = choose(SHAPE, store, tokens=(), bfloat16=False, epochs=None, num_steps=7).config
    assert (fewer["num_steps"], fewer["optimizer"]["schedule"]["warmup_steps"]) == (7, 0)


def test_the_time_is_the_work_over_the_rate(monkeypatch):
    seconds = estimated_seconds(SHAPE, 1000, 512, torch.device("cpu"))
    assert 0 < seconds < 60
    assert estimated_seconds(SHAPE, 1000, 512, torch.device("cuda")) is None


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    """A product of 512 x 64 x 2048 takes 10 ms, and 50 ms where other work stands in its way."""
    clock = itertools.accumulate(itertools.cycle((0.0, 0.05, 0.0, 0.01)))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    flops = 2 * 512 * 64 * 2048
    assert training_rate(64, torch.device("cpu")) == pytest.approx(0.6 * flops / 0.01)
