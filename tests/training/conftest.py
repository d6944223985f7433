"""Preference tuning in this process: the models to begin with, and a run."""

import pytest

DPO_CONFIG = {
    "dpo": {},
    "batches": {"sequence_length": 256, "batch_tokens": 1024, "micro_batch_size": 2},
    "optimizer": {"peak_lr": 0.005, "weight_decay": 0.0, "schedule": {"kind": "cosine", "warmup_steps": 2}},
    "num_steps": 8,
    "dtype": "float32",
    "validate_every": 4,
    "save_every": 4,
    "preflight": False,
}


@pytest.fixture(scope="session")
def dpo_models(tokenizer, tmp_path_factory):
    """A folder with two small models: `reference`, which runs begin with, and `policy`."""
    from lumi.formats.hf_format import save_model
    from lumi.kernels.bundle import REFERENCE
    from lumi.model.transformer import ModelConfig, Transformer

    folder, sizes = tmp_path_factory.mktemp("models"), {"num_layers": 2, "model_dim": 32, "num_heads": 2}
    shape = ModelConfig(vocab_size=384, mlp_dim=64, max_positions=256, **sizes)
    for name, seed in (("policy", 1), ("reference", 0)):
        save_model(folder / name, Transformer(shape, REFERENCE).init_weights(seed), tokenizer)
    return folder


@pytest.fixture
def start_dpo(pairs_dir, dpo_models, tokenizer_dir, tmp_path, monkeypatch):
    """Train on pairs; returns the run folder. Keywords are changes to DPO_CONFIG."""
    from runs import merged, touch_picture

    import lumi.training.run_log
    from lumi.config import from_dict
    from lumi.training.run import train
    from lumi.training.run_config import Paths, TrainConfig

    monkeypatch.setattr(lumi.training.run_log, "draw_loss", touch_picture)

    def start(name="run", resume=None, expect=0, data_dirs=(pairs_dir,), base="reference", **changes):
        path = base and dpo_models / base
        paths = Paths([str(d) for d in data_dirs], str(tokenizer_dir), tmp_path / name, None, resume, path)
        assert train(from_dict(TrainConfig, merged(changes, DPO_CONFIG)), paths, "cpu") == expect
        return tmp_path / name

    return start
