"""The loop, in this process and as users start it: torchrun, kill -9, resume."""

import json
import os
import signal
import time

import pytest
import torch
from runs import losses

import lumi.model.transformer
from lumi.checkpoint.checkpoint import list_checkpoints
from lumi.config import from_dict
from lumi.host.interruption import StopSignal
from lumi.training.metrics import read_metrics
from lumi.training.run_config import TrainConfig


def test_it_learns_and_leaves_what_the_design_says(start, tokenizer, capsys):
    folder = start(num_steps=60, validate_every=20, save_every=20, draws=True)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "status.json",
        "metrics.jsonl",
        "loss.png",
        "tokenizer",
        "checkpoints",
        "final",
        ".lock",
    }
    curve = losses(folder)
    assert len(curve) == 60
    assert curve[0] == pytest.approx(
        torch.tensor(384.0).log().item(), rel=0.02
    )  # untrained: uniform over the vocabulary
    assert curve[-1] < 0.6 * curve[0]
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert from_dict(TrainConfig, json.loads((folder / "config.json").read_text())).num_steps == 60
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
        "step-00000040",
        "step-00000060",
    ]
    validation = [
        record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "validation"
    ]
    assert [record["step"] for record in validation] == [20, 40, 60]
    assert validation[-1]["bits_per_byte"] < validation[0]["bits_per_byte"]
    printed = capsys.readouterr().out
    for line in (
        "45,216 parameters",
        "60 of 256 tokens: 1 process x 4 micro-steps x 2 rows x 32",
        "FLOPs",
        "MiB",
        "epochs",
    ):
        assert line in printed
    assert printed.index("parameters") < printed.index("validation loss")


def test_micro_batches_change_rounding_only(start):
    whole = losses(start("whole", batches={"micro_batch_size": 8}))
    assert losses(start("slices", batches={"micro_batch_size": 1})) == pytest.approx(whole, rel=5e-5)
    assert losses(start("other seed", seed=1)) != pytest.approx(whole, rel=2e-3)


def test_a_second_signal_stops_at_once(monkeypatch):
    exits, now = [], iter([10.0, 10.2, 12.0])
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        signal.raise_signal(
            signal.SIGINT
        )  # a fifth of a second later: the same Ctrl-C, handed on by torchrun
        assert exits == []
        signal.raise_signal(signal.SIGINT)
        assert exits == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_compile_changes_rounding_only(start):
    short = {"num_steps": 2, "model": {"num_layers": 1}}
    plain = losses(start("plain", **short))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(start("compiled", compile=True, **short)) == pytest.approx(plain, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_what_a_step_draws_depends_on_seed_and_step_alone(start, monkeypatch):
    real = lumi.model.transformer.Transformer.forward
    monkeypatch.setattr(
        lumi.model.transformer.Transformer,
        "forward",
        lambda self, *arguments: real(self, *arguments) * (1 + 0.1 * torch.rand(())),
    )
    straight = losses(start())
    folder = start("resumed", keep_last=9)
    torch.rand(7)
    start("resumed", resume=str(folder / "checkpoints" / "step-00000004"))
    assert losses(folder) == straight
    assert losses(start("other", seed=1)) != straight
