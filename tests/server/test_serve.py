"""`lumi serve` as a process: how it starts, what it refuses, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import openai
import pytest
import torch
from served import expected_texts, wait_until

import lumi.server.serve
from lumi.cli import dispatch
from lumi.command_line import run
from lumi.config import UserError
from lumi.formats.hf_format import save_model
from lumi.formats.pretrained import Pretrained
from lumi.inference.paged_cache import bytes_per_token
from lumi.server.limits import Limits
from lumi.server.serve import default_name, make_scheduler

SECONDS = 120  # for a start on a busy machine


@pytest.fixture(scope="module")
def model_dir(model, tokenizer, tmp_path_factory):
    """A run whose model is `model`."""
    folder = tmp_path_factory.mktemp("models") / "letters" / "final"
    save_model(folder, model, tokenizer)
    return folder


class Process:
    """A running `lumi serve`. Its output is gathered as it comes."""

    def __init__(self, *options, **environment):
        # A start as a shell in the background gives it ignores SIGINT; Python then would, too.
        command = [sys.executable, "-m", "lumi.cli", "serve", "--port", "0", *map(str, options)]
        clean = {name: value for name, value in os.environ.items() if name != "LUMI_API_KEY"}
        self.process = subprocess.Popen(
            command,
            env=clean | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output += line

    def __enter__(self):
        wait_until(lambda: "Ctrl-C ends it." in self.output or self.process.poll() is not None, SECONDS)
        assert self.process.poll() is None, self.output
        self.url = re.search(r"^(http://\S+): a chat page", self.output, re.MULTILINE)[1]
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.wait()

    def send(self, number):
        self.process.send_signal(number)

    def wait(self):
        """The exit code, when all output is read."""
        code = self.process.wait(SECONDS)
        self.reader.join()
        return code

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)


class Reading:
    """A long answer that is read on a thread of its own."""

    def __init__(self, client, name, **options):
        self.texts, self.error = [], None
        self.stream = client.completions.create(
            model=name, prompt="The", max_tokens=200, temperature=0, stream=True, **options
        )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        wait_until(lambda: self.texts)

    def _read(self):
        try:
            for event in self.stream:
                self.texts.append(event.choices[0].text)
        except Exception as error:
            self.error = error


def refuses_connections(url):
    try:
        httpx2.get(f"{url}/health")
    except httpx2.ConnectError:
        return True
    return False


class TestProcess:
    def test_it_answers_and_sigterm_lets_it_finish(self, model_dir, model, tokenizer):
        key = "k3y-that-nobody-may-see"
        with Process("--model-path", model_dir, LUMI_API_KEY=key) as process:
            with pytest.raises(openai.AuthenticationError):
                process.client("wrong").models.list()
            client = process.client(key)
            assert [listed.id for listed in client.models.list()] == ["letters"]
            assert client.chat.completions.create(
                model="letters", messages=[{"role": "user", "content": "a"}], max_tokens=3
            ).choices
            reading = Reading(client, "letters")
            process.send(signal.SIGTERM)
            wait_until(lambda: refuses_connections(process.url))
            reading.thread.join(SECONDS)
            code = process.wait()
        assert reading.error is None
        assert ["".join(reading.texts)] == expected_texts(model, tokenizer, ["The"], max_new_tokens=200)
        assert code == -signal.SIGTERM
        loading, ready, how, closing = process.output.splitlines()  # nothing else, no request and no key
        assert loading == f"loading letters for {process.url}"
        assert re.fullmatch(rf"{process.url}: .* 16 at a time, a cache of 4,096 tokens in 0.00 GB\.", ready)
        assert how == "Ctrl-C ends it."
        assert closing.startswith("closing: requests that have begun are answered")

    def test_a_second_ctrl_c_ends_it_at_once(self, model_dir):
        with Process("--model-path", model_dir, "--model-name", "x", "--max-batch", "1") as process:
            client = process.client()
            first = Reading(client, "x", n=16)  # one after the other: it takes seconds
            process.send(signal.SIGINT)
            wait_until(lambda: refuses_connections(process.url))
            assert process.process.poll() is None
            process.send(signal.SIGINT)
            assert process.wait() == 128 + signal.SIGINT
            first.thread.join(SECONDS)
        assert len(process.output.splitlines()) == 4

    def test_ctrl_c_without_requests(self, model_dir):
        with Process("--model-path", model_dir) as process:
            process.send(signal.SIGINT)
            assert process.wait() == 130
        assert len(process.output.splitlines()) == 4


def serve(*options):
    """`lumi serve` in this process; its exit code."""
    return run(dispatch, ["serve", *map(str, options)])


class TestRefusals:
    """One line that says what was expected, and exit code 2."""

    def check(self, capsys, code, said):
        error = capsys.readouterr().err
        assert code == 2
        assert error.count("\n") == 1
        assert error.startswith(f"error: {said}")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--host", "0.0.0.0"], "--host must be 127.0.0.1 where there is no key"),
            (["--api-key", ""], "the API key must be visible ASCII"),
            (["--api-key", "a b"], "the API key must be visible ASCII"),
            (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
            (["--port", "-1"], "--port must be between 0 and 65535, got -1"),
            (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
            (["--max-batch", "1", "--max-queue", "0", "--max-choices", "2"], "--max-choices must be at most"),
            (["--model-name", ""], "--model-name must not be empty, got ''; leave it out"),
            (["--model-name", " "], "--model-name must not be empty, got ' '; leave it out"),
            (["--request-seconds", "nan"], "--request-seconds must be above 0, got nan"),
            (["--cache-tokens", "0"], "--cache-tokens must be at least 1, got 0"),
            (["--host", "192.0.2.1", "--api-key", "k"], "--port must be free on an address of this machine"),
            (["--host", "a..b", "--api-key", "k"], "--port must be free on an address of this machine"),
        ],
        ids=str,
    )
    def test_options(self, options, said, capsys, monkeypatch):
        monkeypatch.delenv("LUMI_API_KEY", raising=False)
        self.check(capsys, serve("--model-path", "none", *options), said)

    def test_a_key_of_the_environment_is_checked_too(self, capsys, monkeypatch):
        monkeypatch.setenv("LUMI_API_KEY", "s3cret ")
        code = serve("--model-path", "none", "--port", 0)
        assert "s3cret" not in str(capsys.readouterr())
        assert code == 2
        monkeypatch.setenv("LUMI_API_KEY", "")  # as if it was not set
        self.check(capsys, serve("--model-path", "none", "--host", "::"), "--host must be 127.0.0.1 where")

    def test_a_port_that_is_taken(self, capsys):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code = serve("--model-path", "none", "--port", port)
        self.check(capsys, code, "--port must be free on an address of this machine, got 127.0.0.1:")

    def test_a_model_that_is_not_there(self, tmp_path, capsys):
        code = serve("--model-path", tmp_path / "none", "--port", 0)
        self.check(capsys, code, f"{tmp_path / 'none'}")

    def test_a_cache_that_does_not_fit(self, model_dir, monkeypatch, capsys):
        monkeypatch.setattr(lumi.server.serve, "free_memory", lambda device: 10_000_000)
        code = serve("--model-path", model_dir, "--port", 0, "--cache-tokens", 1_000_000)
        self.check(
            capsys,
            code,
            "--cache-tokens must fit into the free memory, 0.01 GB, got 1000000 tokens, which take 0.26 GB; "
            "lower it",
        )
        code = serve("--model-path", model_dir, "--port", 0, "--max-batch", 1_000_000)
        self.check(
            capsys,
            code,
            "the cache of --max-batch must fit into the free memory, 0.01 GB, got 1000000 choices "
            "with 256000000 tokens, which take 65.54 GB; lower --max-batch, or choose --cache-tokens",
        )

    def test_packages_that_are_not_installed(self, monkeypatch, capsys):
        for name in [name for name in sys.modules if name.startswith("lumi.server.serve")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(lumi.server, "serve")
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        code = serve("--model-path", "none")
        self.check(
            capsys,
            code,
            "the package uvicorn must be installed for this; run: pip install 'lumi-train[serve]'",
        )


class TestScheduler:
    def test_the_cache_is_as_large_as_asked(self, model, tokenizer, monkeypatch):
        pretrained = Pretrained(model, tokenizer, *[None] * (len(Pretrained._fields) - 2))
        for limits, count in (
            (Limits(max_batch=3, max_choices=3), 3 * 256 // 16),  # no more than the model's positions each
            (Limits(cache_tokens=100), 7),
        ):
            scheduler = make_scheduler(pretrained, limits)
            assert (scheduler.pages.count, scheduler.max_batch) == (count, limits.max_batch)
            held = sum(t.nbytes for layer in scheduler.cache.layers for t in (layer.k_PSGK, layer.v_PSGK))
            assert held == count * 16 * bytes_per_token(model.config, torch.float32)

    def test_a_cache_that_just_fits_and_one_that_does_not(self, model, tokenizer, monkeypatch):
        pretrained = Pretrained(model, tokenizer, *[None] * (len(Pretrained._fields) - 2))
        size = 1600 * bytes_per_token(model.config, torch.float32)
        monkeypatch.setattr(lumi.server.serve, "free_memory", lambda device: size / 0.9 + 1)
        assert make_scheduler(pretrained, Limits(cache_tokens=1600)).pages.count == 100
        with pytest.raises(UserError, match="must fit into the free memory"):
            make_scheduler(pretrained, Limits(cache_tokens=1601))
        monkeypatch.setattr(lumi.server.serve, "free_memory", lambda device: None)  # nobody knows
        assert make_scheduler(pretrained, Limits(cache_tokens=1601)).pages.count == 101


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (("runs/my/final", None), "my"),
        (("runs/my/checkpoints/step-00000100", None), "step-00000100"),
        (("runs/my", None), "my"),
        (("models/smol.gguf", None), "smol"),
        (("models/base-1.5", "runs/tuned/final"), "tuned"),
    ],
)
def test_a_model_is_called_like_its_folder(paths, name):
    assert default_name(*paths) == name
