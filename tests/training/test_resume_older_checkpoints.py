"""Checkpoints of earlier versions: null for `num_kv_heads` and `head_dim`, no kind of `rope_scaling`, the
fingerprint of files."""

import hashlib
from dataclasses import replace

import pytest
from crafted_models import save_base

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.config import UserError, from_dict, to_dict
from lumi.formats.fingerprint import weights_fingerprint
from lumi.host.storage import sha256_file
from lumi.kernels.rope_scaling import Llama3Scaling
from lumi.training.resume import check_resumable
from lumi.training.run_config import TrainConfig

SHAPE = {"vocab_size": 384, "num_layers": 2, "model_dim": 32, "num_heads": 2, "mlp_dim": 64}
NULLS = {"num_kv_heads": None, "head_dim": None}
CONFIG = from_dict(
    TrainConfig,
    {
        "model": SHAPE,
        "batches": {"sequence_length": 32, "batch_tokens": 256, "micro_batch_size": 2},
        "optimizer": {"kind": "adamw", "peak_lr": 0.01, "schedule": {"kind": "cosine", "warmup_steps": 4}},
        "num_steps": 12,
    },
)


def identity():
    return {"model": to_dict(CONFIG.model), "start": None, "seed": 0}


def older(tmp_path, **changes):
    """A checkpoint as it was written then."""
    model = to_dict(CONFIG.model) | NULLS | changes
    state = {
        "step": 4,
        "identity": identity() | {"model": model},
        "config": to_dict(CONFIG) | {"model": model},
    }
    return Checkpoint(tmp_path, state, {}, {})


def test_an_older_checkpoint_is_resumed_in_silence(tmp_path):
    said = []
    checkpoint = older(tmp_path)
    check_resumable(checkpoint, identity(), CONFIG, None, said.append)
    assert said == []
    assert checkpoint.state["identity"]["model"]["head_dim"] is None  # what was read stays as it was


def test_the_scaling_of_positions_was_llama_3s(tmp_path):
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 32}
    model = replace(CONFIG.model, rope_scaling=Llama3Scaling(**numbers))
    now, said = identity() | {"model": to_dict(model)}, []
    check_resumable(
        older(tmp_path, rope_scaling=numbers), now, replace(CONFIG, model=model), None, said.append
    )
    assert said == []
    with pytest.raises(UserError, match=r"model\.rope_scaling\.factor was 9\.0, is 8\.0 now"):
        check_resumable(older(tmp_path, rope_scaling=numbers | {"factor": 9.0}), now, CONFIG, None, print)


def test_another_model_is_refused_all_the_same(tmp_path):
    with pytest.raises(UserError, match=r"go on from here: model\.num_heads was 4, is 2 now") as raised:
        check_resumable(older(tmp_path, num_heads=4), identity(), CONFIG, None, print)
    assert "null" not in str(raised.value)


def test_the_fingerprint_of_files_is_still_that_of_the_model_that_a_run_began_with(tokenizer, tmp_path):
    base = save_base(tokenizer, tmp_path / "base")
    now = identity() | {"start": weights_fingerprint(base)}
    then = hashlib.sha256(sha256_file(base / "model.safetensors").encode()).hexdigest()

    def resume(start):
        state = {"step": 4, "identity": identity() | {"start": start}, "config": to_dict(CONFIG)}
        check_resumable(Checkpoint(tmp_path, state, {}, {}), now, CONFIG, base, print)

    resume(then)
    resume(now["start"])
    with pytest.raises(UserError, match=r"go on from here: start was .*, is .* now"):
        resume("0" * 64)
