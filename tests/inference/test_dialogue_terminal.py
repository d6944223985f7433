"""`lumi chat` as a person uses it: a process on a terminal of its own."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from crafted_models import wanderer

from lumi.formats.hf_format import save_model
from lumi.inference.dialogue import Dialogue
from lumi.inference.generation import SamplingConfig

PATIENCE = 120  # seconds, for a machine that is busy with other things
CONTROL_C, CONTROL_D = "\x03", "\x04"


class Terminal:
    """A process on a pseudo-terminal, through which Ctrl-C reaches it as well."""

    def __init__(self, *command):
        # We hold both ends: reading would fail before the process has opened its own.
        self.master, self.slave = pty.openpty()
        # The first terminal that a session's leader opens becomes its own. Hence the shell.
        script = 'terminal=$1; shift; exec "$@" <"$terminal" >"$terminal" 2>&1'
        shell = ["sh", "-c", script, "sh", os.ttyname(self.slave)]
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*shell, *map(str, command)], start_new_session=True, env=environment)
        self.unread = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, pattern):
        """Wait until `pattern` is on the screen. Returns the match and drops the text up to its end."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.unread)):
            ready, _, _ = select.select([self.master], [], [], 1)
            late = time.monotonic() > deadline or self.process.poll() is not None
            assert ready or not late, f"{pattern!r} did not come, but {self.unread!r}"
            if ready:
                self.unread = (self.unread + os.read(self.master, 65536).decode()).replace("\r\n", "\n")
        self.unread = self.unread[match.end() :]
        return match

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def chat(tokenizer, tmp_path):
    """Starts `lumi chat` with a model that talks without end, and waits for its prompt."""
    terminals = []

    def start(max_positions, *options):
        save_model(tmp_path / "final", wanderer(tokenizer, max_positions), tokenizer)
        chat = (sys.executable, "-m", "lumi.cli", "chat", "--model-path", tmp_path / "final")
        terminals.append(Terminal(*chat, "--temperature", "0", *options))
        terminals[-1].expect(r"/help lists the commands.*\n> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_conversation(chat, tokenizer):
    terminal = chat(512, "--max-new-tokens", "12", "--system", "Be brief.")
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    here = Dialogue(wanderer(tokenizer, 512), tokenizer, sampling, system="Be brief.")

    def ask(question):
        terminal.type(question + "\n")
        return terminal.expect(r"\n([A-Za-z]+)\n\[cut after 12 tokens\]\n> ")[1]

    first, second = (here.answer(question, lambda piece: None).text for question in ("Hello there", "Go on"))
    assert first != second
    assert [ask("Hello there"), ask("Go on")] == [first, second]
    terminal.type("/undo\n")
    terminal.expect(r"\[turns that are left: 1\]\n> ")
    assert ask("Go on") == second
    terminal.type("/reset\n")
    terminal.expect(r"\[a new conversation\]\n> ")
    assert ask("Hello there") == first
    terminal.type("/system\n")
    terminal.expect(r"\[a new conversation, without a system message\]\n> ")
    assert ask("Hello there") != first
    terminal.type("/quit\n")
    terminal.expect(r"error: a command must be /reset, .*\n> ")
    terminal.type("/help\n")
    terminal.expect(r"/exit +leave.*\n> ")
    terminal.type(CONTROL_D)
    assert terminal.process.wait(PATIENCE) == 0


def test_control_c_stops_an_answer_and_not_the_program(chat):
    terminal = chat(40_000, "--max-new-tokens", "20000")
    for question in ("Hello there", "Go on"):  # the conversation survives, too
        terminal.type(question + "\n")
        terminal.expect(r"\n[A-Za-z]{20}")  # the answer streams: 20,000 tokens take far longer than this
        terminal.type(CONTROL_C)
        terminal.expect(r"\n\[interrupted\]\n> ")
    terminal.type("/undo\n")
    terminal.expect(r"\[turns that are left: 1\]\n> ")
    terminal.type(CONTROL_C)
    # A signal before Python's readline begins to wait is noticed with the next line only.
    terminal.type("\n")
    terminal.expect(r"\[Ctrl-C again leaves, as do /exit and Ctrl-D\]\n> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(PATIENCE) == 0
