"""Micro-batches as the thread that reads hands them over."""

import pytest
import torch

from lumi.data.batches import collate
from lumi.data.rows import TokenRow
from lumi.kernels.bundle import NATIVE, REFERENCE, TRITON
from lumi.model.transformer import ModelConfig, Transformer
from lumi.training.prepared_batch import prepared

SHAPE = ModelConfig(
    vocab_size=17, num_layers=2, model_dim=16, num_heads=2, mlp_dim=24, window=4, full_attention_layers=1
)


def batch():
    """Two rows of nine tokens; the first holds two documents."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for starts in ((0, 4), (0,)):
        tokens = torch.randint(17, (10,), generator=generator).numpy()
        begins, trained = (torch.zeros(10, dtype=torch.bool).numpy() for _ in range(2))
        begins[list(starts)] = trained[:] = True
        rows.append(TokenRow(tokens, begins, trained, [0]))
    return collate(rows)


@pytest.fixture
def pinning(monkeypatch):
    """Played: without a GPU nothing can be pinned."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)


@pytest.mark.parametrize("ops", [NATIVE, TRITON])
def test_plans_are_made_before_the_turn_of_a_batch(ops, pinning, monkeypatch):
    """A plan for each window; with them the model makes none, and computes the same."""
    model, plain = Transformer(SHAPE, ops).init_weights(0), batch()
    ready = prepared(plain, model, torch.device("cuda"))
    assert ready.plans.keys() == {None, 4}
    assert ready.plans[4].first_key.device.type == "cpu"
    arguments = lambda batch: (batch.tokens, batch.targets, batch.positions, batch.documents)
    expected = model(*arguments(plain))
    monkeypatch.setattr(Transformer, "attention_plans", lambda *_: pytest.fail("made again"))
    assert torch.equal(model(*arguments(ready)), expected)


def test_the_masks_of_the_reference_are_made_where_they_are_needed(pinning):
    ready = prepared(batch(), Transformer(SHAPE, REFERENCE), torch.device("cuda"))
    assert not ready.plans


def test_a_gpu_gets_pinned_memory(pinning):
    plain = batch()
    ready = prepared(plain, Transformer(SHAPE, TRITON), torch.device("cuda"))
    assert ready.tokens is not plain.tokens
    assert torch.equal(ready.tokens, plain.tokens)


def test_a_batch_for_a_cpu_stays_as_it_is():
    plain = batch()
    assert prepared(plain, Transformer(SHAPE, NATIVE), torch.device("cpu")) is plain
