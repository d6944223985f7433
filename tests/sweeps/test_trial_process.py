"""`begin` itself is tested where a sweep trains: test_sweep.py."""

import os
import signal

from lumi.sweeps.trial_process import _stop_after


def test_the_end_of_the_sweep_ends_the_trial(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    reading, writing = os.pipe()
    os.close(writing)  # as the death of a parent does
    _stop_after(reading)
    os.close(reading)
    assert sent == [(os.getpid(), signal.SIGTERM)]
