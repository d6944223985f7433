import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from corpora import write_corpus
from synthetic import document

from lumi.host.interruption import Interrupted, StopSignal


def test_outside_of_a_block_a_signal_is_a_flag():
    with StopSignal() as stop:
        with stop.interrupting():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_within_a_block_a_signal_ends_the_work(number):
    before = signal.getsignal(number)
    seen = []

    def work():
        try:
            with contextlib.suppress(Exception):  # which an interruption is none of
                os.kill(os.getpid(), number)
                time.sleep(60)
            seen.append("went on")
        finally:
            seen.append("cleaned up")

    with (
        pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught,
        StopSignal() as stop,
        stop.interrupting(),
    ):
        work()
    assert (caught.value.number, stop.received, seen) == (number, number, ["cleaned up"])
    assert signal.getsignal(number) == before


def test_a_signal_before_a_block_ends_it_at_its_entry():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), stop.interrupting():
            pytest.fail("the block was entered")


def test_blocks_may_be_nested():
    def signal_behind_the_inner(stop):
        with stop.interrupting():
            pass
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the outer block had ended with the inner one")

    with StopSignal() as stop:
        with pytest.raises(Interrupted), stop.interrupting():
            signal_behind_the_inner(stop)
        assert stop.received == signal.SIGTERM
    with StopSignal() as stop:
        with pytest.raises(KeyError), stop.interrupting(), stop.interrupting():
            raise KeyError
        signal.raise_signal(signal.SIGTERM)  # both have ended, by an exception: a flag again
        assert stop.received == signal.SIGTERM


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_forgets_ends_the_work_with_the_block():
    class Careless:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    done = []

    def work():
        Careless()
        done.append("all of it")

    with pytest.raises(Interrupted), StopSignal() as stop, stop.interrupting():
        work()
    assert done == ["all of it"]


# A process that tokenizes again and again when it is told to, and says what came of it; signals reach it at
# random moments.
TOKENIZING = """
import json, signal, sys, threading, time
from pathlib import Path
from lumi.data import encoding
from lumi.host.interruption import Interrupted, StopSignal
from lumi.data.tokenization import tokenize
from lumi.tokenizer.loading import load_tokenizer

encoding.TASK_CHARACTERS = 1 << 16
corpus, tokenizer_dir, folder = sys.argv[1:]
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes too late

def attempt(output, num_workers):
    with StopSignal() as stop:
        print(json.dumps("ready"), flush=True)
        try:
            with stop.interrupting():
                tokenizer = load_tokenizer(tokenizer_dir)
                tokenize([corpus], tokenizer, output, validation_fraction=0.1, num_workers=num_workers)
        except Interrupted as interruption:
            return interruption.number
        return 0

for line in sys.stdin:
    output, num_workers = json.loads(line)
    begin = time.monotonic()
    number = attempt(output, num_workers)
    names = sorted(path.name for path in Path(folder).iterdir())
    print(json.dumps([number, time.monotonic() - begin, names, threading.active_count()]), flush=True)
"""


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory):
    """About 2 MB of text, which take half a second or so."""
    return write_corpus(tmp_path_factory.mktemp("large"), [document(seed) for seed in range(4_000)])


@pytest.fixture
def start(large_corpus, tokenizer_dir, tmp_path):
    """Starts processes of TOKENIZING; what they make goes into `tmp_path / "stores"`."""
    (tmp_path / "stores").mkdir()
    (tmp_path / "tokenizing.py").write_text(TOKENIZING)
    command = [sys.executable, tmp_path / "tokenizing.py", large_corpus, tokenizer_dir, tmp_path / "stores"]
    processes = []

    def start():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def attempt(process, output, num_workers, delay=None, signal_number=signal.SIGTERM):
    """Tokenize, and send a signal after `delay` seconds.

    Returns the signal that ended the work or 0, the seconds it took, the names in the folder of stores, and
    the number of threads; None if the process died.
    """
    print(json.dumps([str(output), num_workers]), file=process.stdin, flush=True)
    assert json.loads(process.stdout.readline()) == "ready"
    if delay is not None:
        time.sleep(delay)
        process.send_signal(signal_number)
    answer = process.stdout.readline()
    return json.loads(answer) if answer else None


@pytest.mark.parametrize("num_stops", [5, pytest.param(15, marks=pytest.mark.soak)])
def test_tokenizing_stops_at_any_moment_and_a_rerun_goes_on(start, tmp_path, num_stops):
    stores, rng, process = tmp_path / "stores", random.Random(0), start()
    number, seconds, names, num_threads = attempt(process, stores / "straight", 2)
    assert (number, names) == (0, ["straight"])
    stopped, deadline = 0, time.monotonic() + 120
    while stopped < num_stops and time.monotonic() < deadline:
        delay = rng.uniform(0, seconds)
        number, took, names, num_left = attempt(process, stores / "stopped", 1 + stopped % 3, delay)
        assert number in (0, signal.SIGTERM)
        assert num_left <= num_threads
        if names == ["straight"]:
            stopped += 1
        else:  # the work was done when the signal came: the store is whole
            assert names == ["stopped", "straight"]
            shutil.rmtree(stores / "stopped")
            seconds = min(seconds, took)
    assert stopped == num_stops
    if attempt(process, stores / "stopped", 2, seconds / 2, signal.SIGKILL) is None:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert attempt(start(), stores / "stopped", 2)[::2] == [0, ["stopped", "straight"]]
    files = {path.name: path.read_bytes() for path in (stores / "straight").iterdir()}
    assert {path.name: path.read_bytes() for path in (stores / "stopped").iterdir()} == files
