"""A server on a CPU, one client and sixteen, against `transformers serve`.

    python benchmarks/cpu_serving.py [--output-dir benchmarks/results] [--rounds 1]

A model of the shape of SmolLM2-135M with random weights, in float32: 30 layers of 576, 9 heads that share 3
kv heads, 49,152 pieces, tied. Every client sends one greedy request to /v1/completions: a prompt of some 40
tokens, 32 new ones. Both servers run all the time, as processes of their own; only one works at a time. The
texts of both must be the same. `transformers serve` is measured as it starts by default, and with
--continuous-batching.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peers
from results import Results, main

from lumi.formats.hf_format import save_model
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

SHAPE = ModelConfig(
    vocab_size=49_152,
    num_layers=30,
    model_dim=576,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    max_positions=2048,
    rope_theta=100_000.0,
    tied_embeddings=True,
)
NEW, CLIENTS = 32, (1, 16)
OVER_ONE, OVER_HF = 4.0, 2.0
START_SECONDS = 120
HERE = Path(sys.executable).parent  # the environment's commands


def save_folder(folder: Path) -> None:
    """The model, and a tokenizer of bytes. It has a name for each id, so that all of them can be written."""
    letters = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 256) if code != 173]
    others = [chr(256 + number) for number in range(256 - len(letters))]
    vocab = {"<end>": 0} | {letter: index for index, letter in enumerate(letters + others, start=1)}
    vocab |= {f"w{index}": index for index in range(len(vocab), SHAPE.vocab_size)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<end>", "special": True} | flags],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    save_model(folder, Transformer(SHAPE, REFERENCE).init_weights(0), load_tokenizer(folder))


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """A server that answers /health; yields its port."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server did not answer within {START_SECONDS} s")
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def complete(port: int, model: str, client: int, new: int = NEW) -> str:
    """The text of one greedy request; every client has another prompt."""
    prompt = f"client {client}: " + "the quick brown fox " * 2
    body = {"model": model, "prompt": prompt[:40], "max_tokens": new, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["text"]


def all_clients(port: int, model: str, count: int) -> list[str]:
    """The texts of so many clients at once."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda client: complete(port, model, client), range(count)))


def run(results: Results) -> None:
    peers.packages("transformers", "fastapi", "uvicorn", "openai")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch) / "model"
        save_folder(folder)
        lumi = [str(HERE / "lumi"), "serve", "--model-path", str(folder), "--port", "8301"]
        theirs = [str(HERE / "transformers"), "serve", str(folder), "--device", "cpu"]
        theirs += ["--attn-implementation", "sdpa", "--dtype", "float32"]
        servers = {
            "lumi": (lumi, 8301, "model"),
            "transformers": ([*theirs, "--port", "8302"], 8302, str(folder)),
            "transformers, batching": (
                [*theirs, "--port", "8303", "--continuous-batching"],
                8303,
                str(folder),
            ),
        }
        ports = {}
        for name, (command, port, model) in servers.items():
            with contextlib.nullcontext() if name == "lumi" else results.leaving_out(name):
                stack.enter_context(running(command, port))
                complete(port, model, 0, new=2)  # loads and warms up
                ports[name] = port
        times, texts = {}, {}

        def calls(name: str, count: int) -> Callable[[], list[Callable[[], None]]]:
            def send() -> None:
                texts[name] = all_clients(ports[name], servers[name][2], count)

            return lambda: [send]

        for count in CLIENTS:
            case = f"float32, {count} client{'s' if count > 1 else ''}"
            with results.case(case):
                rounds = results.rounds * (5 if count == 1 else 1)  # sixteen take transformers half a minute
                candidates = {name: calls(name, count) for name in ports}
                times[count] = results.time(case, candidates, rounds=rounds)["lumi"]
                results.compare(case, at_least=OVER_HF)
                results.claim(f"{case}: tokens per second", count * NEW / times[count])
        one, many = CLIENTS
        if one in times and many in times:
            gain = many * times[one] / times[many]
            results.claim(f"float32: {many} clients over one, tokens per second", gain, at_least=OVER_ONE)
        for name in texts.keys() - {"lumi"}:
            same = sum(a == b for a, b in zip(texts["lumi"], texts[name], strict=True))
            results.claim(f"texts that are the same as those of {name}, of {many}", same)


if __name__ == "__main__":
    sys.exit(main("cpu_serving", __doc__, run, device_type="cpu", rounds=1))
