"""The largest micro-batch that fits, by the memory estimate."""

import dataclasses
import itertools

import pytest
from runs import losses

import lumi.training.resolved_run
from lumi.config import UserError
from lumi.data.batches import BatchConfig
from lumi.host.memory import USABLE
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout
from lumi.training.memory import memory_of
from lumi.training.micro_batch import CPU_TOKENS, choose_micro_batch, with_micro_batch
from lumi.training.run_config import TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16),
    batches=BatchConfig(sequence_length=16, batch_tokens=16 * 24, micro_batch_size="auto"),
    num_steps=1000,
)


def choose(free, data=1, before=None, device_type="cpu", config=CONFIG):
    return choose_micro_batch(config, Layout(data, 1, 1), device_type, "reference", free, None, before)


def chosen(free, data=1, before=None):
    return choose(free, data, before).batches.micro_batch_size


def needed(size, data=1):
    return memory_of(with_micro_batch(CONFIG, size), Layout(data, 1, 1), "cpu", "reference")["total"]


def test_the_largest_micro_batch_that_fits():
    """A process has 24 rows a step: each divisor of them is chosen with just enough memory, and not with one
    byte less."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 24]
    assert chosen(2**40) == 24
    for smaller, size in itertools.pairwise(sizes):
        enough = needed(size) / USABLE
        assert chosen(int(enough) + 1) == size
        assert chosen(int(enough) - 1) == smaller


def test_the_batch_stays_as_it_is():
    assert chosen(2**40, data=4) == 6
    config = choose(2**40, data=4)
    assert config.batches.rows == CONFIG.batches.rows
    assert config.batches.micro_steps(4) == 1


def test_a_resumed_run_keeps_its_micro_batch_where_it_fits():
    """Another one would round otherwise."""
    assert chosen(2**40, before=4) == 4
    assert chosen(2**40, before=5) == 24  # the run had another batch then
    assert chosen(int(needed(4) / USABLE) + 1, before=8) == 4


def test_a_cpu_gains_nothing_from_more_than_some_tokens():
    model = dataclasses.replace(CONFIG.model, max_positions=CPU_TOKENS)
    for length, rows in ((1024, CPU_TOKENS // 1024), (CPU_TOKENS, 1)):
        batches = BatchConfig(sequence_length=length, batch_tokens=64 * length, micro_batch_size="auto")
        config = TrainConfig(model=model, batches=batches, num_steps=1000)
        assert choose(2**50, config=config).batches.micro_batch_size == rows
        assert choose(2**50, device_type="cuda", config=config).batches.micro_batch_size == 64
        assert choose(2**50, before=64, config=config).batches.micro_batch_size == 64


def test_the_message_is_about_one_row_whatever_the_run_had_before():
    model = ModelConfig(vocab_size=100, num_layers=4, model_dim=128, num_heads=2, mlp_dim=512)
    batches = BatchConfig(sequence_length=1024, batch_tokens=4096, micro_batch_size="auto")
    config, layout = TrainConfig(model=model, batches=batches, num_steps=1000), Layout(1, 1, 1)
    one, two = (
        f"{memory_of(with_micro_batch(config, size), layout, 'cpu', 'reference')['total'] / 2**20:,.0f} MiB"
        for size in (1, 2)
    )
    assert one != two
    with pytest.raises(UserError, match=f"needs about {one} for micro-batches of one row"):
        choose_micro_batch(config, layout, "cpu", "reference", 1000, None, before=1)


def test_refuses_what_does_not_fit():
    with pytest.raises(
        UserError,
        match=r"needs about .* MiB for micro-batches of one row, and has 0 MiB .* gradient_checkpointing",
    ):
        chosen(1000)
    with pytest.raises(
        UserError, match=r"must be a number on this system, which does not say how much memory is free"
    ):
        chosen(0)
    with pytest.raises(
        UserError, match=r"sequence_length x micro_batch_size x processes = 16 x 1 x 5, got 384"
    ):
        chosen(2**40, data=5)


def test_auto_reaches_the_run(start, monkeypatch, capsys):
    monkeypatch.setattr(lumi.training.resolved_run, "free_memory", lambda device: 2**40)
    whole = losses(start("whole", batches={"micro_batch_size": 8}))
    assert losses(start("auto", batches={"micro_batch_size": "auto"})) == whole
    assert "1 process x 1 micro-steps x 8 rows x 32" in capsys.readouterr().out
