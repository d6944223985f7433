"""The demo's plan, with the seconds of a step given."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from lumi.config import read_json
from lumi.planning import pace
from lumi.planning.pace import (
    LEAST_SHARES,
    MARGIN,
    OTHER_SECONDS,
    Pace,
    Rehearsal,
    pace_of,
    plan,
    step_seconds,
)

TEXT_TOKENS, ANSWER_TOKENS = 200_000, 10_000
GONE = 60.0


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine: seconds of its large step in float32, and how many times faster bfloat16 is."""

    def make(seconds, bfloat16=None):
        monkeypatch.setattr(pace, "fast_bfloat16", lambda device: bfloat16 is not None)
        monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: GONE))

        def measured(pace, name):
            of_large = {"pretrain": 1.0, "pretrain_small": 0.25, "finetune": 0.7}[name]
            return seconds * of_large / (bfloat16 if pace.dtype == "bfloat16" else 1.0)

        monkeypatch.setattr(pace, "step_seconds", measured)

    return make


def planned(minutes):
    return plan(minutes, 0.0, TEXT_TOKENS, ANSWER_TOKENS)


def test_a_fast_machine_does_all(machine, capsys):
    machine(0.3, bfloat16=1.5)
    assert planned(4.5) == Pace("pretrain", "bfloat16", 1.0)
    printed = capsys.readouterr().out
    assert "rehearsal: float32 0.30 s/step, bfloat16 0.20 s/step" in printed
    text, answers = TEXT_TOKENS / 4096 * 0.2 / 3, ANSWER_TOKENS / 4096 * 0.14 / 3
    stages = {
        "pre-train": 520 * 0.2 + 4 * text,
        "fine-tune": 260 * 0.14 + 5 * answers,
        "evaluate": text + answers,
    }
    stages["the rest"] = OTHER_SECONDS
    for name, seconds in stages.items():
        assert re.search(rf"^  {name} +{seconds:.0f} s", printed, flags=re.MULTILINE), (name, printed)
    assert f"plan: about {(GONE + sum(stages.values())) / 60:.1f} min in all; 60 s are gone" in printed


def test_bfloat16_that_is_no_faster_is_not_used(machine):
    machine(0.2, bfloat16=0.9)
    assert planned(4.5).dtype == "float32"


@pytest.mark.parametrize("seconds", [0.27, 0.5, 0.87])
def test_a_slower_machine_is_cut_to_the_minutes(machine, seconds):
    machine(seconds)
    chosen = planned(4.5)
    assert chosen.name == ("pretrain" if seconds == 0.27 else "pretrain_small")
    assert LEAST_SHARES[chosen.name] <= chosen.share <= 1
    rehearsal = Rehearsal(pace.step_seconds(chosen, chosen.name), 0.7 * seconds, TEXT_TOKENS, ANSWER_TOKENS)
    left = (4.5 * 60 - GONE) * MARGIN
    assert rehearsal.total(chosen) <= left
    assert chosen.share == 1 or rehearsal.total(chosen._replace(share=chosen.share + 0.01)) > left


def test_the_least_training_is_done_if_it_takes_less_than_ten_minutes(machine, capsys):
    machine(2.0)
    assert planned(4.5) == Pace("pretrain_small", "float32", LEAST_SHARES["pretrain_small"])
    assert "the demo takes longer than --minutes allow" in capsys.readouterr().out


def test_beyond_ten_minutes_what_fits_is_done(machine, capsys):
    machine(8.0)
    chosen = planned(4.5)
    assert chosen.share < LEAST_SHARES["pretrain_small"]
    needed = int(re.search(r"--minutes (\d+) would be enough", capsys.readouterr().out)[1])
    assert planned(needed + 1).share >= LEAST_SHARES["pretrain_small"]


def test_no_minutes_mean_all_steps(machine):
    machine(50.0)
    assert planned(0) == Pace("pretrain", "float32", 1.0)


def test_a_cut_training_validates_and_saves_at_its_end():
    config = Pace("pretrain_small", "float32", 0.25).config("pretrain_small")
    assert (config.num_steps, config.validate_every, config.save_every, config.dtype) == (
        225,
        225,
        225,
        "float32",
    )
    assert config.optimizer.schedule.warmup_steps == 5  # a quarter of 20
    full = Pace("pretrain", "bfloat16", 1.0).config("pretrain")
    assert (full.num_steps, full.validate_every, full.save_every) == (520, 130, 260)
    assert Pace("pretrain", "bfloat16", 0.0001).config("finetune").num_steps == 1


@pytest.mark.parametrize(
    "chosen", [Pace("pretrain", "float32", 1.0), Pace("pretrain_small", "bfloat16", 0.5)]
)
def test_the_pace_of_a_run_that_has_begun(chosen):
    assert pace_of(chosen.config(chosen.name)) == chosen


def test_the_rehearsal_trains_whole_steps_of_both_trainings(monkeypatch, tmp_path):
    """The optimizer's part is in what is timed: each of four steps changes every trained parameter."""
    for path in pace.CONFIGS.glob("*.json"):
        batches = {"batches": {"sequence_length": 16, "batch_tokens": 64, "micro_batch_size": 2}}
        (tmp_path / path.name).write_text(json.dumps(read_json(path) | batches))
    monkeypatch.setattr(pace, "CONFIGS", tmp_path)
    changed, step = [], pace.Optimizer.step

    def observed(self, lr, clip):
        before = {name: parameter.detach().clone() for name, parameter in self.named.items()}
        step(self, lr, clip)
        changed.append(all((p.detach() != before[name]).any() for name, p in self.named.items()))

    monkeypatch.setattr(pace.Optimizer, "step", observed)
    begin = time.perf_counter()
    small = Pace("pretrain_small", "float32", 1.0)
    seconds = [step_seconds(small, name) for name in ("pretrain_small", "finetune")]
    assert 0 < 2 * sum(seconds) <= time.perf_counter() - begin
    assert len(changed) == 8
    assert all(changed[:4])
    assert all(changed[5:])  # an adapter's A has no gradient before its B has left zero
