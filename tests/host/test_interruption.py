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
from synthetic import document

from lumi.corpus.folder import CorpusWriter
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


# Tokenizing, with signals at random moments: a process that is told to tokenize again and again, and says what became of it.

TOKENIZING = """
import json, signal, sys, threading, time
from pathlib import Path
from lumi.data import encoding
from lumi.host.interruption import Interrupted, StopSignal
from lumi.data.tokenization import tokenize
from lumi.tokenizer.tokenizer import Tokenizer

encoding.TASK_CHARACTERS = 1 << 16
corpus, tokenizer_dir, folder = sys.argv[1:]
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes too late

def attempt(output, num_workers):
    with StopSignal() as stop:
        print(json.dumps("ready"), flush=True)
        try:
            with stop.interrupting():
                tokenize([corpus], Tokenizer.load(tokenizer_dir), output, validation_fraction=0.1, num_workers=num_workers)
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
    """About 4 MB of text, which take a second or so."""
    folder = tmp_path_factory.mktemp("large") / "corpus"
    with CorpusWriter(folder, 1 << 20) as writer:
        for seed in range(8_000):
            text = document(seed)
            writer.add(text, "synthetic", len(text.encode()))
        writer.commit({"documents": 8_000, "sources": []}, "a card")
    return folder


@pytest.fixture
def start(large_corpus, tokenizer_dir, tmp_path):
    """Starts processes of TOKENIZING; what they make goes into `tmp_path / "stores"`."""
    (tmp_path / "stores").mkdir()
    (tmp_path / "tokenizing.py").write_text(TOKENIZING)
    command = [
        sys.executable,
        str(tmp_path / "tokenizing.py"),
        str(large_corpus),
        str(tokenizer_dir),
        str(tmp_path / "stores"),
    ]
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

    Returns the signal that ended it or 0, the seconds it took, the names in its folder, the number of its threads; None if it died.
    """
    print(json.dumps([str(output), num_workers]), file=process.stdin, flush=True)
    assert json.loads(process.stdout.readline()) == "ready"
    if delay is not None:
        time.sleep(delay)
        process.send_signal(signal_number)
    answer = process.stdout.readline()
    return json.loads(answer) if answer else None


def test_tokenizing_stops_at_any_moment_and_a_rerun_goes_on(start, tmp_path):
    stores, rng, process = tmp_path / "stores", random.Random(0), start()
    number, seconds, names, num_threads = attempt(process, stores / "straight", 2)
    assert (number, names) == (0, ["straight"])
    stopped, deadline = 0, time.monotonic() + 120
    while stopped < 15 and time.monotonic() < deadline:
        number, took, names, num_left = attempt(
            process, stores / "stopped", 1 + stopped % 3, rng.uniform(0, seconds)
        )
        assert number in (0, signal.SIGTERM)
        assert num_left <= num_threads
        if names == ["straight"]:
            stopped += 1
        else:  # the work was done when the signal came: the store is whole
            assert names == ["stopped", "straight"]
            shutil.rmtree(stores / "stopped")
            seconds = min(seconds, took)
    assert stopped == 15
    if attempt(process, stores / "stopped", 2, seconds / 2, signal.SIGKILL) is None:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert attempt(start(), stores / "stopped", 2)[::2] == [0, ["stopped", "straight"]]
    files = {path.name: path.read_bytes() for path in (stores / "straight").iterdir()}
    assert {path.name: path.read_bytes() for path in (stores / "stopped").iterdir()} == files
