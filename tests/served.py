"""A server in this process, on a thread of its own, and what it ought to answer."""

import contextlib
import threading
import time

import openai
import torch
import uvicorn

from lumi.inference.generation import SamplingConfig, filler_id, generate_ids, text_ids
from lumi.inference.scheduler import Scheduler
from lumi.server.app import create_app
from lumi.server.errors import ApiError
from lumi.server.limits import Limits
from lumi.server.service import Service

NAME = "tiny"


def make_service(model, tokenizer, limits=None, *, name=NAME, num_pages=64, before=lambda: None):
    """A service whose cache has `num_pages`; `before` runs in the engine's thread, first."""
    limits = limits or Limits()

    def load():
        before()
        return Scheduler(model, tokenizer, max_batch=limits.max_batch, num_pages=num_pages)

    return Service(name, load, limits)


class Served:
    """A service under a URL of this machine."""

    def __init__(self, service, url):
        self.service, self.url = service, url

    @property
    def scheduler(self):
        return self.service.scheduler

    def is_ready(self):
        """Whether the model is loaded."""
        try:
            return bool(self.scheduler)
        except ApiError:
            return False

    def is_idle(self):
        """Whether nothing waits or runs, and nothing is held."""
        return (
            not self.scheduler.has_work and not self.scheduler.pages.num_held and not self.service._num_open
        )

    def client(self, kind=openai.OpenAI, **options):
        """The official client. It does not try again."""
        defaults = {"api_key": "none", "max_retries": 0, "timeout": 60}
        return kind(base_url=f"{self.url}/v1", **defaults | options)


@contextlib.contextmanager
def served(service, **options):
    """Serve until the block ends; `options` are those of `create_app`."""
    config = uvicorn.Config(create_app(service, **options), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(service, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()


def wait_until(holds, seconds=60):
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def expected_ids(model, tokenizer, prompts, *, stop_ids=None, **sampling):
    """What `lumi generate` adds to prompts (texts or ids), greedy unless `sampling` says else."""
    ids = [text_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    completions = generate_ids(
        model,
        ids,
        SamplingConfig(**{"temperature": 0.0, "max_new_tokens": 16} | sampling),
        stop_ids=frozenset(tokenizer.eos_ids) if stop_ids is None else stop_ids,
        pad_id=filler_id(tokenizer),
        vocab_size=tokenizer.vocab_size,
    )
    return [completion.ids for completion in completions]


def expected_texts(model, tokenizer, prompts, **options):
    """As `expected_ids`, in text."""
    return [
        tokenizer.decode(ids, continues=True) for ids in expected_ids(model, tokenizer, prompts, **options)
    ]


@torch.inference_mode()
def log_probabilities(model, tokenizer, ids):
    """(T, V) float64: row t is of the token after `ids[: t + 1]`, by one pass over all of them."""
    logits_TV = model.logits(model.hidden(torch.tensor([ids]))[0])[:, : tokenizer.vocab_size]
    return logits_TV.double().log_softmax(dim=-1)
