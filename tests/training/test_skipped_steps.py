"""Steps that are skipped, and the end of a run that skips too many."""

import itertools

import pytest
import torch

import lumi.model.transformer
from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.config import UserError
from lumi.training.metrics import read_metrics


def spoil(monkeypatch, bad_steps, value):
    """Make the training loss of some steps `value`."""
    real, micro_batches = (
        lumi.model.transformer.Transformer.forward,
        itertools.count(4),
    )  # four micro-batches a step

    def forward(self, *arguments):
        loss = real(self, *arguments)
        bad = torch.is_grad_enabled() and next(micro_batches) // 4 in bad_steps
        return loss * value if bad else loss

    monkeypatch.setattr(lumi.model.transformer.Transformer, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_named(start, monkeypatch, capsys, store_dir, value):
    spoil(monkeypatch, {5}, value)
    folder = start()
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records if record["skipped"]] == [5]
    assert records[4]["loss"] is None
    assert all(record["loss"] < 7 for record in records[5:])
    printed = capsys.readouterr().out
    assert f"step 5 skipped: loss {value}" in printed
    assert printed.count(f"step 5: loss {value} in a micro-batch of {store_dir} documents [") == 4


def test_many_of_them_stop_the_run_with_a_checkpoint(start, monkeypatch, tmp_path):
    spoil(monkeypatch, range(6, 99), float("nan"))
    with pytest.raises(
        UserError, match=r"not finite in 3 steps running, up to step 8; to inspect: .*step-00000008"
    ):
        start(max_skipped_steps=3)
    tensors = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000008").tensors("model")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
