import re

import pytest
from runs import final_weights, losses

import lumi.training.objective
from lumi.config import UserError
from lumi.training.preflight import Rehearsal


def test_the_line_for_people():
    line = Rehearsal(0.2, 0.4, 0.5, 3.0, 0.0125, 3 * 2**30).describe(
        4, 7200
    )  # three inner micro-steps, and the last
    assert line == (
        "preflight: a step takes about 1 s, 7,200 steps 2 h 0 min, a batch of validation 500 ms, "
        "a save 3 s (the loop waits 12.5 ms), peak memory 3,072 MiB"
    )
    unknown = Rehearsal(0.25, 0.25, None, 3.0, 0.0, None).describe(1, 1)
    assert "validation" not in unknown
    assert "memory" not in unknown


def test_it_rehearses_and_changes_nothing(start, capsys, monkeypatch):
    """An evaluation and a save happen before the first step; the run is the one that did not rehearse, and no
    trace is left."""
    plain = start("plain")
    capsys.readouterr()
    evaluated, real = [], lumi.training.objective.held_out_loss
    monkeypatch.setattr(
        lumi.training.objective,
        "held_out_loss",
        lambda *arguments: evaluated.append(arguments[5]) or real(*arguments),
    )
    rehearsed = start("rehearsed", preflight=True)
    printed = capsys.readouterr().out
    assert evaluated[0] == 2 * 32  # one micro-batch of tokens
    assert len(evaluated) == 1 + 3
    assert re.search(
        r"preflight: a step takes about .*, 12 steps .*, a batch of validation .*, "
        r"a save .* \(the loop waits .*\), peak",
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
