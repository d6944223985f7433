"""Choices of a run reach it, or are refused."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import losses

from lumi.data.batches import BatchConfig
from lumi.host.memory import USABLE
from lumi.kernels.bundle import NATIVE
from lumi.model.lora import LoraConfig, trained_tensors
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout
from lumi.training.memory import memory_of
from lumi.training.micro_batch import with_micro_batch
from lumi.training.resolved_run import resolve_run
from lumi.training.run_config import Paths, TrainConfig
from lumi.training.run_model import build
from lumi.training.trainer import Trainer


def test_switches_reach_the_run(start, monkeypatch):
    seen = {}
    real = Trainer.run_to_the_end

    def spy(self):
        seen.update(
            compute_dtype=self.model.compute_dtype,
            checkpointing=self.model.gradient_checkpointing,
            ops=self.run.ops.name,
        )
        return real(self)

    monkeypatch.setattr(Trainer, "run_to_the_end", spy)
    short = {"num_steps": 4}
    plain = losses(start("plain", **short))
    assert seen == {"compute_dtype": torch.float32, "checkpointing": False, "ops": "native"}
    assert losses(start("recomputing", gradient_checkpointing=True, **short)) == plain
    assert seen["checkpointing"]
    for dtype in ("bfloat16", "float16"):
        narrow = losses(start(dtype, dtype=dtype, **short))
        assert seen["compute_dtype"] == getattr(torch, dtype)
        assert narrow != plain
        assert narrow == pytest.approx(plain, rel=0.02)
    small = {
        "num_steps": 2,
        "validation_tokens": 32,
        "model": {"num_layers": 1},
        "batches": {"batch_tokens": 64, "micro_batch_size": 1},
    }
    reference = losses(start("reference", **small))
    assert losses(start("triton", kernels="triton", **small)) == pytest.approx(reference, rel=1e-5)
    assert seen["ops"] == "triton"


CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16),
    batches=BatchConfig(sequence_length=16, batch_tokens=16 * 24, micro_batch_size="auto"),
    num_steps=1000,
)


def resolve(config, data=1, least_free=None, **paths):
    """`resolve_run` on the first of `data` processes, one of which has only `least_free` bytes."""
    world = SimpleNamespace(
        layout=Layout(data, 1, 1),
        device=torch.device("cpu"),
        is_main=True,
        gather=lambda value: [value, least_free] if least_free and isinstance(value, int) else [value],
        fail_together=lambda **_: contextlib.nullcontext(),
    )
    return resolve_run(config, Paths([], "", Path("nowhere"), **paths), world)


def test_every_choice_is_made():
    run = resolve(CONFIG, data=2)
    assert (run.ops, run.start, run.num_trained) == (NATIVE, None, None)
    assert run.config.batches.micro_batch_size == 12  # all that a process has in a step
    assert run.micro_steps == 1
    by_hand = replace(CONFIG, batches=replace(CONFIG.batches, micro_batch_size=3))
    run = resolve(by_hand, data=2)
    assert run.config is by_hand
    assert run.micro_steps == 4
    assert [run.rows(1, index) for index in range(4)] == [(12, 15), (15, 18), (18, 21), (21, 24)]


def test_the_process_with_the_least_memory_decides():
    needed = memory_of(with_micro_batch(CONFIG, 3), Layout(2, 1, 1), "cpu", "native")["total"]
    assert resolve(CONFIG, 2, least_free=int(needed / USABLE) + 1).config.batches.micro_batch_size == 3


def test_a_resumed_run_keeps_the_micro_batch_of_its_config_or_checkpoint(start, tmp_path, capsys):
    folder = start(batches={"micro_batch_size": 4}, keep_last=9)
    for resume in ("auto", str(folder / "checkpoints" / "step-00000008")):
        start(batches={"micro_batch_size": "auto"}, resume=resume, num_steps=12)
        assert "1 process x 2 micro-steps x 4 rows x 32" in capsys.readouterr().out


def test_adapters_are_counted_before_they_are_built(start, tokenizer, tmp_path):
    base = start("base", num_steps=1)
    lora = LoraConfig(
        rank=3, dora=True, targets=("q_proj", "down_proj"), tokens=("<|im_start|>", "<|im_end|>")
    )
    config = TrainConfig(
        lora=lora,
        num_steps=1000,
        batches=BatchConfig(sequence_length=16, batch_tokens=16, micro_batch_size=1),
    )
    run = resolve(config, model_path=base)
    model = build(run.config, run.shape, run.start, tokenizer, run.ops)
    assert run.num_trained == sum(tensor.numel() for tensor in trained_tensors(model).values())
