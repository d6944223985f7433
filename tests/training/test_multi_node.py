"""Several nodes: torchrun agents that meet on loopback addresses, one of them lost; the Slurm script, with
Slurm's part played here."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ENVIRONMENT, final_weights, launch, losses, merged, wait_for_step

from lumi.config import write_json
from lumi.training.run_status import read_status, write_status

ROOT = Path(__file__).parents[2]
SLURM_SCRIPT = ROOT / "configs" / "launch" / "slurm.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the workers of torchrun in /proc")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = str(ROOT / "lumi" / "train.py")
CHANGES = {"num_steps": 60, "save_every": 8, "validate_every": 60}


@pytest.fixture(scope="module")
def options(store_dir, tokenizer_dir, tmp_path_factory):
    """What follows `train.py` on the command line, the run folder left out."""
    config = tmp_path_factory.mktemp("config") / "config.json"
    write_json(config, merged(CHANGES))
    return [
        "--config",
        str(config),
        "--data-dirs",
        str(store_dir),
        "--tokenizer-dir",
        str(tokenizer_dir),
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """The run folder of two processes that nobody disturbed."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    launch([*TORCHRUN, "--standalone", "--nproc-per-node=2", TRAIN, *options, "--output-dir", str(run)])
    return run


def free_port(first=1024, last=65535):
    for port in random.sample(range(first, last + 1), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port of 100 tried between {first} and {last} is free")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_node(torchrun):
    """As a machine does that loses power: neither torchrun's process nor its workers, in sessions of their
    own, are told."""
    for pid in (torchrun, *children(torchrun)):
        os.kill(pid, signal.SIGKILL)


def end(process, seconds=120):
    """Wait for a process to leave by itself; one that does not is killed with what it started."""
    try:
        return process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            kill_node(process.pid)


@pytest.mark.soak  # a minute of waiting; test_faults.py loses a rank under one torchrun
def test_a_node_is_lost_and_another_takes_its_place(options, uninterrupted, tmp_path):
    """The survivor's torchrun waits for the new one, and both go on from the newest checkpoint, bit for
    bit."""
    run, endpoint = tmp_path / "run", f"127.0.0.1:{free_port()}"

    def agent(node, log):
        rendezvous = [
            "--rdzv-backend=c10d",
            "--rdzv-id=test",
            f"--rdzv-endpoint={endpoint}",
            f"--local-addr=127.0.0.{node + 1}",
        ]
        patience = f"--rdzv-conf=is_host={int(node == 0)},keep_alive_interval=1,keep_alive_max_attempt=8"
        command = [
            *TORCHRUN,
            "--nnodes=2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            *rendezvous,
            patience,
            TRAIN,
            *options,
        ]
        command += ["--output-dir", str(run), "--resume-from-checkpoint", "auto"]
        environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(tmp_path / log, "w") as output:
            return subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    survivor, lost = agent(0, "survivor"), agent(1, "lost")
    try:
        wait_for_step(run / "metrics.jsonl", 10, survivor, lost)
    finally:
        kill_node(lost.pid)
        lost.wait()
    replacement = agent(1, "replacement")
    codes = [end(process) for process in (survivor, replacement)]
    log = (tmp_path / "survivor").read_text()
    assert codes == [0, 0], log[-3000:]
    assert "resumed from" in log
    assert losses(run) == losses(uninterrupted)
    assert final_weights(run) == final_weights(uninterrupted)


# Slurm's part. srun: one task a node, here two on this machine, each an address; a task is the process that a
# signal goes to.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
rm -f "$PLAY/tasks"
for node in 0 1; do
    SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.$((node + 1)) "$@" &
    pids[node]=$!
    echo $! >>"$PLAY/tasks"
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] && kill -TERM $(<"$PLAY/tasks")
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.2\\n' ;;
    requeue) echo "$2" >>"$PLAY/requeued" ;;
esac
"""


@pytest.fixture
def slurm(options, tmp_path):
    """Start the Slurm script as sbatch would: `start(run)`; `requeued()` counts how often the job was sent
    back to the queue."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(free_port(20000, 29999) - 20000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    started = []

    class Slurm:
        def start(self, run):
            command = ["bash", str(SLURM_SCRIPT), str(run), *options]
            restarts = {"SLURM_RESTART_COUNT": str(len(started))} if started else {}
            environment = {**ENVIRONMENT, **job, **restarts, "PATH": path, "PLAY": str(tmp_path)}
            with open(tmp_path / "log", "a") as output:
                started.append(
                    subprocess.Popen(
                        command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
                    )
                )
            return started[-1]

        def tasks(self):
            tasks = tmp_path / "tasks"
            return [int(pid) for pid in tasks.read_text().split()] if tasks.exists() else []

        def requeued(self):
            requeued = tmp_path / "requeued"
            return requeued.read_text().split().count(job["SLURM_JOB_ID"]) if requeued.exists() else 0

        def log(self):
            return (tmp_path / "log").read_text()

    yield Slurm()
    for process in started:
        if process.poll() is None:
            process.kill()
            for task in Slurm().tasks():
                with contextlib.suppress(FileNotFoundError):  # this one has left by itself
                    kill_node(task)


@pytest.mark.soak  # a minute of waiting; the tests below run the script on tasks that end at once
def test_a_slurm_job_saves_before_its_time_is_up_and_is_requeued(slurm, uninterrupted, tmp_path):
    run = tmp_path / "run"
    job = slurm.start(run)
    wait_for_step(run / "metrics.jsonl", 7, job)
    job.send_signal(signal.SIGUSR1)  # `--signal=B:USR1@300`: to the script alone
    assert job.wait(timeout=90) == 0, slurm.log()[-3000:]
    assert read_status(run)["status"] == "preempted"
    assert read_status(run)["step"] == len(losses(run))
    assert slurm.requeued() == 1

    job = slurm.start(run)
    assert job.wait(timeout=90) == 0, slurm.log()[-3000:]
    assert read_status(run)["status"] == "finished"
    assert slurm.requeued() == 1
    assert losses(run) == losses(uninterrupted)
    assert final_weights(run) == final_weights(uninterrupted)


# A task that does not train: it leaves the status that it is told to say.
TASK = """#!/bin/bash
say() { echo "{\\"status\\": \\"$1\\", \\"step\\": 8}" >"$PLAY/run/status.json"; }
"""


@pytest.mark.parametrize(
    ("task", "code", "requeued"),
    [
        ("say preempted; exit 1", 0, 1),  # a signal to a node alone, as from its owner who wants it back
        ("say failed; exit 1", 1, 0),
        ("say finished; exit 0", 0, 0),
        ("exit 1", 1, 0),  # what an earlier start said would send the job back to the queue for ever
    ],
)
def test_a_slurm_job_is_requeued_for_what_its_own_tasks_say(slurm, tmp_path, task, code, requeued):
    write_status(tmp_path / "run", "preempted", 7)
    (tmp_path / "commands" / "srun").write_text(TASK + task)
    assert slurm.start(tmp_path / "run").wait(timeout=30) == code
    assert slurm.requeued() == requeued


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slurm_job_that_is_cancelled_is_not_requeued(slurm, tmp_path):
    write_status(tmp_path / "run", "running", 7)
    saves = "trap 'kill $!; say preempted; exit 1' TERM; sleep 60 & echo $$ >$PLAY/tasks; wait"
    (tmp_path / "commands" / "srun").write_text(TASK + saves)
    job = slurm.start(tmp_path / "run")
    wait_until(slurm.tasks)
    for pid in (job.pid, *slurm.tasks()):
        os.kill(pid, signal.SIGTERM)  # `scancel`: to the script and to every task
    assert job.wait(timeout=30) == 1
    assert read_status(tmp_path / "run")["status"] == "preempted"
    assert slurm.requeued() == 0


def test_a_slurm_job_whose_save_outlasts_its_time_is_requeued(slurm, tmp_path):
    write_status(tmp_path / "run", "running", 7)
    told, end = tmp_path / "told", tmp_path / "end"
    saves = (
        "trap 'touch $PLAY/told' TERM; echo $$ >$PLAY/tasks; "
        "until [[ -e $PLAY/end ]]; do sleep 0.1; done; say preempted; exit 1"
    )
    (tmp_path / "commands" / "srun").write_text(TASK + saves)
    job = slurm.start(tmp_path / "run")
    try:
        wait_until(slurm.tasks)
        job.send_signal(signal.SIGUSR1)
        wait_until(told.exists)
        job.send_signal(signal.SIGTERM)  # the time limit
    finally:
        end.touch()
    assert job.wait(timeout=30) == 0
    assert slurm.requeued() == 1


def test_the_slurm_script_is_told_its_run_folder():
    done = subprocess.run(["bash", str(SLURM_SCRIPT)], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "usage: sbatch configs/launch/slurm.sh RUN_FOLDER" in done.stderr
