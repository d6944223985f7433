"""A training as users start it: kill -9, resume, errors and exit codes."""

import os
import signal
import socket
import subprocess

import pytest
from runs import ENVIRONMENT, final_weights, launch, losses, wait_for_step


def kill_after(command, metrics, step, number):
    """Start a training, send it a signal once it has logged `step`; returns its exit code."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for_step(metrics, step, process)
    os.killpg(process.pid, number)
    return process.wait(timeout=60)


@pytest.mark.soak  # test_faults.py proves it in float32, at every kind of moment
def test_killed_and_resumed_is_bit_identical(command, tmp_path):
    """In bfloat16, started as users start it."""
    changes = {"num_steps": 30, "save_every": 4, "validate_every": 15, "dtype": "bfloat16"}
    launch(command("straight", **changes))
    killed = command("killed", "--resume-from-checkpoint", "auto", **changes)
    assert kill_after(killed, tmp_path / "killed" / "metrics.jsonl", 6, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()
    assert "resumed from" in launch(killed).stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "straight")


def two_processes(command, tmp_path):
    """Ranks 0 and 1 without torchrun, so that each can be signalled and its exit code read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command,
            env={**group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


@pytest.mark.soak  # test_faults.py counts the lines of every error that it makes
def test_an_error_of_the_main_process_is_said_once(command, start, tmp_path):
    start("used")
    processes = two_processes(command("used"), tmp_path)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "error: --output-dir must be new" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    assert "error:" not in errors[1]


def test_litter_of_an_interrupted_save_is_swept(start, tmp_path, capsys):
    litter = tmp_path / "run" / "checkpoints" / ".tmp-step-00000003-1"
    litter.mkdir(parents=True)
    start()
    assert not litter.exists()
    assert "removed" in capsys.readouterr().out
