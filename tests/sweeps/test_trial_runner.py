import threading
import time

import pytest
import torch
import trial_processes

import lumi.sweeps.trial_runner
from lumi.host.interruption import StopSignal
from lumi.sweeps.trial import Trial
from lumi.sweeps.trial_runner import TrialRunner, environment_of


@pytest.fixture
def trials_of(settings_of, pretending, tmp_path):
    def trials_of(*rates, folder="out"):
        settings = settings_of(rates)
        return {
            setting.config.optimizer.peak_lr: Trial(setting, 0, tmp_path / folder / "t" / str(setting.index))
            for setting in settings
        }

    return trials_of


def runner(events, num_processes=2, deadline=None, stop=None):
    def report(trial, event):
        events.append((trial.setting.config.optimizer.peak_lr, event))

    return TrialRunner([], num_processes, "cpu", stop or StopSignal(), deadline, report)


def test_trials_end_finished_or_failed_and_are_not_repeated(trials_of):
    trials, events = trials_of(0.01, 0.1, 1e9, 1e10), []
    runner(events).run(trials.values(), None)
    assert (0.1, "finished: 2.0833 bits per byte") in events
    assert (1e9, "failed: the loss was not finite") in events
    killed = trials[1e10]
    assert (1e10, f"failed: it was ended by SIGKILL; see {killed.log}") in events
    assert killed.progress().status == "failed"  # in its folder too: the next call does not repeat it
    again = []
    runner(again).run(trials.values(), None)
    assert again == []
    assert [trial_processes.starts(trial.folder) for trial in trials.values()] == [1] * 4


def test_a_trial_pauses_at_a_rung_and_goes_on(trials_of):
    trials, events = trials_of(0.01, folder="waits"), []
    runner(events).run(trials.values(), 4)
    assert events[-1] == (0.01, "saved at step 4")
    assert trials[0.01].progress().validations.keys() == {4}
    runner(events).run(trials.values(), None)
    assert events[-1][1].startswith("finished")
    assert trials[0.01].progress().step == trial_processes.STEPS


@pytest.mark.parametrize("cause", ["time", "signal"])
def test_processes_end_when_the_time_is_up_or_a_signal_comes(cause, trials_of):
    trials, events, stop = trials_of(1e11), [], StopSignal()
    begun = trials[1e11].folder / "status.json"

    def interrupt():
        while not begun.exists():
            time.sleep(0.02)
        stop.received = 2

    if cause == "signal":
        threading.Thread(target=interrupt).start()
        late = None
    else:
        late = time.monotonic() + 0.5
    running = runner(events, deadline=late, stop=stop)
    running.run(trials.values(), None)
    assert running.is_over
    assert events == [(1e11, "begun"), (1e11, "not begun: stopped before step 1")]


def test_what_a_process_gets_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(lumi.sweeps.trial_runner, "num_cores", lambda: 8)
    assert environment_of(0, 3, "cpu") == {"OMP_NUM_THREADS": "2"}
    assert environment_of(0, 16, "cpu") == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    slots = [environment_of(slot, 3, "cuda")["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert slots == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert environment_of(1, 2, "cuda") == {"CUDA_VISIBLE_DEVICES": "7"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environment_of(0, 3, "cpu") == {}  # what the user says stays
