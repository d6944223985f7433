"""Every shipped config loads, and says what its name promises."""

from pathlib import Path

import pytest
import torch

import lumi.configs
from lumi.config import load_config, read_json
from lumi.corpus import PrepareConfig
from lumi.evaluation.evaluate import EvaluationConfig
from lumi.evaluation.smoke import SmokeTests
from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import add_lora
from lumi.model.transformer import ModelConfig, Transformer
from lumi.sweeps.settings import make_settings
from lumi.sweeps.sweep_config import SweepConfig
from lumi.tokenizer.sentencepiece_bpe import SPECIAL_PIECES
from lumi.tokenizer.training import TokenizerConfig
from lumi.training.micro_batch import with_micro_batch
from lumi.training.run_config import TrainConfig

FOLDER = Path(lumi.configs.__file__).parent
PARAMETERS = {
    "micro": 9_438_336,
    "tiny": 23_072_000,
    "small": 41_686_656,
    "medium": 83_898_880,
    "base": 276_861_696,
}
LARGE = {
    "1b": 1_235_814_400,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
}  # as Llama 3.2 1B, Llama 3 8B and 70B
CLASSES = {
    "corpus": PrepareConfig,
    "tokenizer": TokenizerConfig,
    "pretrain": TrainConfig,
    "sft": TrainConfig,
    "dpo": TrainConfig,
    "evaluation": EvaluationConfig,
}
DEMO = {
    "prepare": PrepareConfig,
    "tokenizer": TokenizerConfig,
    "pretrain": TrainConfig,
    "pretrain_small": TrainConfig,
    "finetune": TrainConfig,
    "evaluation": EvaluationConfig,
    "questions_train": PrepareConfig,
    "questions_held_out": PrepareConfig,
    "sweep": SweepConfig,
}


@pytest.mark.parametrize(
    "path", sorted(FOLDER.rglob("*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_it_loads(path):
    by_name = {"demo": DEMO, "evaluation": {"smoke_tests": SmokeTests}}.get(path.parent.name, {})
    load_config(by_name.get(path.stem) or CLASSES[path.parent.name], path)


def test_the_sweep_compares_where_the_rate_falls():
    sweep = load_config(SweepConfig, FOLDER / "demo" / "sweep.json")
    for setting in make_settings(sweep, FOLDER / "demo" / sweep.config):
        steps = setting.config.num_steps
        assert sweep.halving.rungs[0] > steps - setting.config.optimizer.schedule.decay_steps(steps)


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_five_sizes_have_chinchilla_budgets(size):
    config = load_config(TrainConfig, FOLDER / "pretrain" / f"{size}.json")
    assert config.model.num_parameters == PARAMETERS[size]
    budget = 20 * PARAMETERS[size]
    assert budget <= config.num_tokens < budget + config.batches.batch_tokens
    assert config.batches.micro_batch_size == "auto"
    for processes in (1, 2, 4, 8):
        assert with_micro_batch(config, 1).batches.micro_steps(processes) * processes == config.batches.rows
    corpus = load_config(PrepareConfig, FOLDER / "corpus" / f"{size}.json")
    assert sum(source.max_tokens for source in corpus.sources) >= config.num_tokens
    names = {source.dataset for source in corpus.sources}
    assert names == {"HuggingFaceFW/fineweb-edu", "wikimedia/wikipedia", "allenai/c4", "Salesforce/wikitext"}


@pytest.mark.parametrize("size", LARGE)
def test_the_large_sizes_have_chinchilla_budgets(size):
    config = load_config(TrainConfig, FOLDER / "pretrain" / f"{size}.json")
    assert 20 * LARGE[size] <= config.num_tokens < 20 * LARGE[size] + config.batches.batch_tokens
    for nodes in (16, 32, 64) if size == "70b" else (1, 2, 4):
        assert config.batches.micro_steps(config.parallel.layout(8 * nodes).data) >= 1


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_five_sizes_are_fine_tuned_with_adapters(size):
    config = load_config(TrainConfig, FOLDER / "sft" / f"lora_{size}.json")
    assert config.lora is not None
    assert config.model is None
    assert config.final == "best"
    assert set(config.lora.tokens) <= set(SPECIAL_PIECES)
    base = load_config(TrainConfig, FOLDER / "pretrain" / f"{size}.json").model
    assert base is not None
    assert config.batches.sequence_length <= base.max_positions
    add_lora(on_meta(base), config.lora)  # the targets are linears of this model
    for processes in (1, 2, 4, 8):
        assert (
            config.batches.micro_steps(processes) * processes * config.batches.micro_batch_size
            == config.batches.rows
        )
    corpus = load_config(PrepareConfig, FOLDER / "corpus" / "chat.json")
    assert {source.name for source in corpus.sources} == {"alpaca", "dolly", "oasst", "smoltalk"}


def on_meta(shape):
    with torch.device("meta"):
        return Transformer(shape, REFERENCE)


def test_the_vocabularies_fit():
    tokenizer = load_config(TokenizerConfig, FOLDER / "tokenizer" / "32k.json")
    assert all(
        load_config(TrainConfig, FOLDER / "pretrain" / f"{size}.json").model.vocab_size
        == tokenizer.vocab_size
        for size in PARAMETERS
    )
    demo = load_config(TokenizerConfig, FOLDER / "demo" / "tokenizer.json")
    assert load_config(TrainConfig, FOLDER / "demo" / "pretrain.json").model.vocab_size == demo.vocab_size


def test_training_defaults_are_spelt_out():
    """A reader of a config sees the whole shape of the model and the run."""
    for path in sorted((FOLDER / "pretrain").glob("*.json")):
        data = read_json(path)
        assert {
            "model",
            "batches",
            "optimizer",
            "num_steps",
            "seed",
            "dtype",
            "validate_every",
            "save_every",
        } <= data.keys()
        assert ModelConfig(**data["model"]).num_parameters == (PARAMETERS | LARGE)[path.stem]
