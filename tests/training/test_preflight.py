import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from runs import final_weights, losses

import lumi.train
import lumi.training.resolved_run
import lumi.training.trainer
import lumi.training.validation
from lumi.config import UserError
from lumi.data.batches import BatchConfig
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout
from lumi.training.memory import memory_of
from lumi.training.micro_batch import USABLE, choose_micro_batch, free_memory, with_micro_batch
from lumi.training.preflight import Rehearsal
from lumi.training.run_config import TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16),
    batches=BatchConfig(sequence_length=16, batch_tokens=16 * 24, micro_batch_size="auto"),
    num_steps=1,
)


def world(data, least=lambda value: value):
    return SimpleNamespace(layout=Layout(data, 1, 1), device=torch.device("cpu"), least=least)


def chosen(free, data=1, **rest):
    return choose_micro_batch(CONFIG, world(data, **rest), "reference", free, None).batches.micro_batch_size


def needed(size, data=1):
    return memory_of(with_micro_batch(CONFIG, size), Layout(data, 1, 1), "cpu", "reference")["total"]


def test_the_largest_micro_batch_that_fits():
    """A process has 24 rows a step: each divisor of them is chosen with just enough memory, and not with one byte less."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 24]
    assert chosen(2**40) == 24
    for smaller, size in itertools.pairwise(sizes):
        enough = needed(size) / USABLE
        assert chosen(int(enough) + 1) == size
        assert chosen(int(enough) - 1) == smaller


def test_the_batch_stays_as_it_is():
    assert chosen(2**40, data=4) == 6
    config = choose_micro_batch(CONFIG, world(4), "reference", 2**40, None)
    assert config.batches.rows == CONFIG.batches.rows
    assert config.batches.micro_steps(4) == 1


def test_the_process_with_the_least_memory_decides():
    poor = int(needed(3, data=2) / USABLE) + 1
    assert chosen(2**40, data=2, least=lambda value: min(value, poor)) == 3


def test_a_resumed_run_keeps_its_micro_batch_where_it_fits():
    """Another one would round otherwise."""
    keep = lambda before, free: (
        choose_micro_batch(CONFIG, world(1), "reference", free, None, before).batches.micro_batch_size
    )
    assert keep(4, 2**40) == 4
    assert keep(5, 2**40) == 24  # the run had another batch then
    assert keep(8, int(needed(4) / USABLE) + 1) == 4


def test_refuses_what_does_not_fit():
    with pytest.raises(
        UserError,
        match=r"needs about .* MiB for micro-batches of one row, and has 0 MiB .* gradient_checkpointing",
    ):
        chosen(1000)
    with pytest.raises(
        UserError, match=r"must be a number on this system, which does not say how much memory is free"
    ):
        chosen(None)
    with pytest.raises(
        UserError, match=r"sequence_length x micro_batch_size x processes = 16 x 1 x 5, got 384"
    ):
        chosen(2**40, data=5)


def test_a_number_is_taken_as_it_is():
    config = TrainConfig(model=CONFIG.model, num_steps=1)
    assert choose_micro_batch(config, world(1), "reference", None, None) is config


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = free_memory(torch.device("cpu"))
    assert 2**20 < alone < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert free_memory(torch.device("cpu")) < alone / 100


def test_the_line_for_people():
    line = Rehearsal(0.2, 0.4, 0.5, 3.0, 0.0125, 3 * 2**30).describe(
        4, 7200
    )  # three inner micro-steps, and the last
    assert line == (
        "preflight: a step takes about 1 s, 7,200 steps 2 h 0 min, a batch of validation 500 ms, "
        "a save 3 s (the loop waits 12.5 ms), peak memory 3,072 MiB"
    )
    assert "validation" not in Rehearsal(0.25, 0.25, None, 3.0, 0.0, 0).describe(1, 1)


def test_it_rehearses_and_changes_nothing(start, capsys, monkeypatch):
    """An evaluation and a save happen before the first step; the run is the one that did not rehearse, and no trace is left."""
    plain = start("plain")
    capsys.readouterr()
    evaluated, real = [], lumi.training.validation.held_out_loss
    monkeypatch.setattr(
        lumi.training.validation,
        "held_out_loss",
        lambda *arguments: evaluated.append(arguments[5]) or real(*arguments),
    )
    rehearsed = start("rehearsed", preflight=True)
    printed = capsys.readouterr().out
    assert evaluated[0] == 2 * 32  # one micro-batch of tokens
    assert len(evaluated) == 1 + 3
    assert re.search(
        r"preflight: a step takes about .*, 12 steps .*, a batch of validation .*, a save .* \(the loop waits .*\), peak",
        printed,
    )
    assert printed.index("preflight:") < printed.index("step 4:")
    assert losses(rehearsed) == losses(plain)
    assert final_weights(rehearsed) == final_weights(plain)
    assert sorted(path.name for path in (rehearsed / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]
    start("rehearsed", resume="auto", preflight=True, num_steps=13)
    assert "preflight" not in capsys.readouterr().out  # it has shown that it can


def test_a_save_that_cannot_be_is_found_before_the_first_step(start, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lumi.checkpoint.saver.save_tensors", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device"):
        start(preflight=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_auto_reaches_the_run(start, monkeypatch, capsys):
    monkeypatch.setattr(lumi.training.resolved_run, "free_memory", lambda device: 2**40)
    whole = losses(start("whole", batches={"micro_batch_size": 8}))
    assert losses(start("auto", batches={"micro_batch_size": "auto"})) == whole
    assert "1 process x 1 micro-steps x 8 rows x 32" in capsys.readouterr().out
