"""Processes of which one hangs, for test_watchdog.py; `case_server.py` starts them, or torchrun.

A fault is what goes wrong: "sleep", "stop rank 0", "slow save", "hung save", "stop in save" or "stop store".
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from saver_processes import DEADLINE_SECONDS, end_with, served_store

import lumi.host.tensor_files
from lumi.checkpoint.saver import Saver
from lumi.parallel.watchdog import Watchdog

LIMIT_SECONDS = 3.0


def load(fault, step, rank, size, folder):
    if (fault, step, rank) == ("sleep", 3, 1):
        time.sleep(1000)
    if (fault, step, rank) == ("stop rank 0", 3, size - 1):
        os.kill(int((folder / "pid-0").read_text()), signal.SIGSTOP)


def hang(path):
    time.sleep(1000)


def save_slowly(saver, watchdog, rank):
    real, lumi.host.tensor_files._CHUNK_BYTES = os.fsync, 1

    def fsync(file):
        if rank == 0 and sys._getframe(1).f_code.co_name == "save_tensors":
            time.sleep(LIMIT_SECONDS / 3)
        real(file)

    os.fsync = fsync
    saver.begin(3, {"model": {"a": torch.ones(2)}}, {})  # rank 0 writes it, a byte at a time
    start = time.monotonic()
    if rank == 2:  # waits without patience of its own
        dist.barrier()
    else:
        with watchdog.patience("saving"):
            saver.wait()
            assert rank or time.monotonic() - start > 2 * LIMIT_SECONDS
        dist.barrier()


def work(fault, folder):
    """One process of the group that the environment describes: four steps."""
    dist.init_process_group("gloo")
    rank, size, saving = dist.get_rank(), dist.get_world_size(), dist.new_group()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    saver = Saver(folder / "checkpoints", rank, size, saving)

    def on_stop(message):
        time.sleep(2)  # a slow disk
        with open(folder / "stopped", "a") as file:
            file.write(f"{rank} {message}\n")

    def progress():
        return (0, time.monotonic()) if fault == "stop in save" else saver.progress

    with Watchdog(dist.group.WORLD, LIMIT_SECONDS, on_stop, progress) as watchdog:
        for step in range(1, 5):
            watchdog.mark(step, "waiting for data")
            load(fault, step, rank, size, folder)
            watchdog.mark(step, "counting targets")
            dist.all_reduce(torch.ones(1))
            if fault == "slow save" and step == 3:
                save_slowly(saver, watchdog, rank)
            if fault == "hung save":
                with watchdog.patience("saving"):
                    saver.begin(step, {"model": {"a": torch.ones(3)}}, {}, hang)
            if fault == "stop in save" and step == 3:
                with watchdog.patience("saving"):
                    time.sleep(LIMIT_SECONDS)
                    if rank == 1:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    dist.barrier()
        if fault == "stop store":
            server = int((folder / "server").read_text())
            dist.barrier()
            os.kill(server, signal.SIGSTOP)
            time.sleep(1)
    saver.close()
    dist.destroy_process_group()
    (folder / f"done-{rank}").touch()
    if fault == "stop store":
        end_while_the_store_goes_on(server)


def end_while_the_store_goes_on(server):
    class GoesOn:
        def __del__(self):  # while the interpreter ends
            os.kill(server, signal.SIGCONT)
            time.sleep(1)

    sys.modules["goes_on"] = GoesOn()
    sys.exit(7)


def fork_ranks(fault, size, folder):
    """Fork the processes, and leave in the folder what becomes of each."""
    ranks = []
    for rank in range(size):
        if (process := os.fork()) == 0:
            signal.alarm(DEADLINE_SECONDS)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
            end_with(lambda: work(fault, folder))
        ranks.append(process)
    (folder / "pids").write_text(" ".join(map(str, ranks)))
    for _ in ranks:
        process, status = os.wait()
        (folder / f"code-{ranks.index(process)}").write_text(str(os.waitstatus_to_exitcode(status)))


def fork_store():
    """Fork a process that serves a store; returns its id and the port."""
    receiving, sending = os.pipe()
    if (process := os.fork()) == 0:
        signal.alarm(2 * DEADLINE_SECONDS)
        with served_store() as store:
            os.write(sending, str(store.port).encode())
            while True:
                signal.pause()
    return process, os.read(receiving, 10).decode()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def main(fault, store, size, folder):
    """Fork `size` processes; `store` says who serves theirs: "rank 0", or "another" process."""
    folder = Path(folder)
    if store == "rank 0":
        port = free_port()
    else:
        server, port = fork_store()
        (folder / "server").write_text(str(server))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(store != "rank 0")
    (folder / "port").write_text(port)
    fork_ranks(fault, int(size), folder)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))  # under torchrun
