"""The rules behind `lumi new`."""

import pytest

from lumi.config import UserError, load_config, read_json, to_dict, write_json
from lumi.model.transformer import ModelConfig
from lumi.planning.new_project import SHIPPED
from lumi.planning.recipe import (
    BATCH,
    BATCH_TOKENS,
    NAMED,
    RATE,
    RATE_BATCH,
    RATE_PARAMETERS,
    TOKENS_PER_PARAMETER,
    best_batch,
    best_rate,
    choose_training,
    model_of,
)
from lumi.training.run_config import TrainConfig

PARAMETERS = {
    "micro": 9_438_336, "tiny": 23_072_000, "small": 41_686_656, "medium": 83_898_880, "base": 276_861_696,
}  # fmt: skip


def test_the_named_sizes_have_the_parameters_of_their_names():
    assert {name: ModelConfig(**model).num_parameters for name, model in NAMED.items()} == PARAMETERS


@pytest.mark.parametrize("name", NAMED)
def test_the_shipped_configs_are_what_the_dial_chooses(name):
    """`lumi new --size NAME` writes `configs/pretrain/NAME.json`."""
    model = model_of(name)
    chosen = choose_training(model, TOKENS_PER_PARAMETER * ModelConfig(**model).num_parameters)
    assert read_json(SHIPPED / "pretrain" / f"{name}.json") == chosen.config


@pytest.mark.parametrize("size", [0.8e6, 3e6, 23e6, 59e6, 61e6, 135e6, 1.1e9, 7e9])
def test_a_shape_has_about_the_parameters_that_were_asked_for(size):
    model = model_of(size)
    shape = ModelConfig(**model)
    assert abs(shape.num_parameters / size - 1) <= 0.05
    assert model["model_dim"] == 64 * model["num_heads"]
    assert (shape.vocab_size, shape.tied_embeddings) == ((8192, True) if size < 60e6 else (32768, False))


@pytest.mark.parametrize("size", [1e5, 1e12])
def test_a_size_without_a_shape_is_refused(size):
    with pytest.raises(UserError, match="--size must be micro, tiny, small, medium, base, or a number"):
        model_of(size)


def test_the_rules_go_through_their_anchors():
    """And by their exponents, counted by hand."""
    assert best_batch(BATCH_TOKENS) == BATCH
    assert best_batch(10 * BATCH_TOKENS) == pytest.approx(3.71535 * BATCH, rel=1e-4)  # 10^0.57
    assert best_rate(RATE_PARAMETERS, RATE_BATCH) == RATE
    assert best_rate(10 * RATE_PARAMETERS, RATE_BATCH) == pytest.approx(0.199526 * RATE, rel=1e-4)  # 10^-0.7
    assert best_rate(RATE_PARAMETERS, 4 * RATE_BATCH) == pytest.approx(2 * RATE)


@pytest.mark.parametrize("num_tokens", [100, 100_000, 3_000_000, 10**9, 10**12])
def test_a_training_is_whole(num_tokens, tmp_path):
    """It loads, reads the tokens that were asked for and less than a step more, and its schedule fits."""
    choice = choose_training(model_of("tiny"), num_tokens)
    write_json(tmp_path / "config.json", choice.config)
    config = load_config(TrainConfig, tmp_path / "config.json")
    assert num_tokens <= config.num_tokens < num_tokens + config.batches.batch_tokens
    assert to_dict(config)["optimizer"]["kind"] == "muon"
    assert f"{config.num_tokens:,}" in choice.reasons["tokens"]
    assert f"{config.optimizer.peak_lr:g}" in choice.reasons["peak_lr"]
    assert config.batches.rows & (config.batches.rows - 1) == 0  # divides among 2, 4, 8 processes


def test_more_tokens_mean_larger_batches_and_larger_models_lower_rates():
    few, many = (choose_training(model_of("tiny"), n).config for n in (10**7, 10**10))
    assert few["batches"]["batch_tokens"] < many["batches"]["batch_tokens"]
    small, large = (choose_training(model_of(name), 10**9).config for name in ("micro", "base"))
    assert small["batches"] == large["batches"] | {"sequence_length": 1024}
    assert small["optimizer"]["peak_lr"] > large["optimizer"]["peak_lr"]
