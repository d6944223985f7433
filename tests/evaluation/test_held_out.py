import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lumi.data.batches import BatchConfig
from lumi.evaluation import held_out_loss
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout

WORLD = SimpleNamespace(
    data_rank=0,
    layout=Layout(1, 1, 1),
    device=torch.device("cpu"),
    sum=lambda *values: list(values),
    fail_together=contextlib.nullcontext,
)


def test_bits_per_byte_by_hand():
    """Two documents in windows of 4; torch's own log_softmax gives each window's log-likelihoods."""
    model = Transformer(
        ModelConfig(vocab_size=11, num_layers=2, model_dim=16, num_heads=2, mlp_dim=24), REFERENCE
    ).init_weights(0)
    model.double().compute_dtype = torch.float64
    documents = [[1, 5, 6, 7, 8, 2], [1, 9, 2]]
    token_bytes = np.array([0, 0, 0, 0, 0, 1, 2, 3, 1, 4, 1])
    split = SimpleNamespace(
        tokens=np.concatenate(documents).astype(np.uint16),
        offsets=np.array([0, 6, 9], dtype=np.uint64),
        mask=None,
        pairs=False,
    )
    config = BatchConfig(sequence_length=4, batch_tokens=8, micro_batch_size=1)
    got = held_out_loss(model.train(), [split], token_bytes, config, WORLD)
    assert model.training

    # the stream is 1 5 6 7 8 2 | 1 9 2; row 0 sees [1 5 6 7] -> 5 6 7 8; row 1 sees [8 2 | 1 9] -> 2 . 9 2
    pieces = [([1, 5, 6, 7], [5, 6, 7, 8]), ([8], [2]), ([1, 9], [9, 2])]
    nats, num_bytes, count = 0.0, 0, 0
    for inputs, targets in pieces:
        with torch.no_grad():
            logits = torch.nn.functional.linear(model.hidden(torch.tensor([inputs]))[0], model.output_weight)
        nats -= logits.log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets)].sum().item()
        num_bytes += int(token_bytes[targets].sum())
        count += len(targets)
    assert (got.tokens, got.bytes) == (count, num_bytes) == (7, 1 + 2 + 3 + 1 + 4)
    assert got.loss == pytest.approx(nats / 7, rel=1e-12)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / 11, rel=1e-12)

    limited = held_out_loss(model, [split], token_bytes, config, WORLD, max_tokens=5)
    assert (limited.tokens, limited.bytes) == (4, 7)


def test_every_byte_of_the_text_is_counted(store_dir, tokenizer):
    from lumi.data.token_store import TokenStore

    split = TokenStore.open(store_dir).split("validation")
    model = Transformer(
        ModelConfig(vocab_size=384, num_layers=1, model_dim=16, num_heads=2, mlp_dim=24), REFERENCE
    ).init_weights(0)
    config = BatchConfig(sequence_length=64, batch_tokens=512, micro_batch_size=8)
    result = held_out_loss(model, [split], tokenizer.token_bytes, config, WORLD)
    text = b"".join(tokenizer.decode(split.document(i).tolist()).encode() for i in range(split.num_documents))
    assert result.bytes == len(text) == split.num_bytes
    assert result.tokens == split.num_tokens - split.num_documents
