"""`lumi serve`: a socket, a model on its thread, and uvicorn around the routes."""

import os
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from lumi.config import UserError
from lumi.formats.pretrained import Pretrained
from lumi.host.memory import USABLE, free_memory
from lumi.inference.paged_cache import bytes_per_token
from lumi.inference.pages import PAGE_SIZE, num_pages
from lumi.inference.scheduler import Scheduler
from lumi.server.app import create_app
from lumi.server.limits import Limits, check_key, is_loopback
from lumi.server.service import Service

_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_TOKENS_OF_CHOICE = 1024  # in the cache, where nothing else is asked for


def serve(
    load: Callable[[], Pretrained],
    model_name: str,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    opens_browser: bool = False,
) -> int:
    """Serve a model until a signal comes.

    SIGTERM and Ctrl-C let the requests finish that have begun. A second one ends the process at once.

    Args:
        load: loads the model; called in the engine's thread.
        port: 0: any free one.
        api_key: what clients must send; None: nothing.

    Raises:
        UserError: the address cannot be used, or is open to others without a key; the model cannot be loaded,
            or the memory is too small for its cache.
    """
    check_key(host, api_key)
    listener = _listen(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listener.getsockname()[1]}"
    print(f"loading {model_name} for {url}", flush=True)
    failures: list[BaseException] = []

    def on_ready(error: BaseException | None) -> None:
        if error is not None:
            failures.append(error)
            server.should_exit = True
            return
        print(f"{url}: a chat page; {url}/v1: the API, see {url}/docs. {_describe(service.scheduler)}")
        print("Ctrl-C ends it.", flush=True)
        if opens_browser:
            webbrowser.open(url)

    service = Service(model_name, lambda: make_scheduler(load(), limits), limits, on_ready)
    hosts = {*_LOCAL_NAMES, name} if is_loopback(host) else ()
    config = uvicorn.Config(
        create_app(service, api_key=api_key, hosts=sorted(hosts)),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.request_seconds) + 1,
    )
    server = _Server(config)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    return 0


class _Server(uvicorn.Server):
    """Uvicorn's would wait for the step, and for the thread of a template, before a second signal ends it."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        print("closing: requests that have begun are answered; a second signal ends it at once", flush=True)
        super().handle_exit(sig, frame)


def make_scheduler(pretrained: Pretrained, limits: Limits) -> Scheduler:
    """A scheduler with a cache as large as the limits say. Raises UserError if the memory is too small."""
    model, shape = pretrained.model, pretrained.model.config
    num_tokens = limits.cache_tokens or limits.max_batch * min(_TOKENS_OF_CHOICE, shape.max_positions)
    count = num_pages(num_tokens)
    needed = count * PAGE_SIZE * bytes_per_token(shape, model.compute_dtype)
    free = free_memory(model.output_weight.device)
    if free is not None and needed > USABLE * free:
        came = f"{count * PAGE_SIZE} tokens, which take {needed / 1e9:.2f} GB"
        subject, got, remedy = "--cache-tokens", came, "lower it"
        if limits.cache_tokens is None:
            subject, got = "the cache of --max-batch", f"{limits.max_batch} choices with {came}"
            remedy = "lower --max-batch, or choose --cache-tokens"
        expectation = f"must fit into the free memory, {free / 1e9:.2f} GB"
        raise UserError(subject, expectation, got=got, remedy=remedy)
    return Scheduler(model, pretrained.tokenizer, max_batch=limits.max_batch, num_pages=count)


def default_name(model_path: str | Path, adapter_path: str | Path | None) -> str:
    """What clients call a model: the name of its folder, or of the run around `final` and `checkpoints`."""
    path = Path(adapter_path or model_path).resolve()
    parents = [path, *path.parents]
    while len(parents) > 1 and parents[0].name in ("final", "checkpoints"):
        del parents[0]
    return parents[0].stem if parents[0].suffix == ".gguf" else parents[0].name


def _describe(scheduler: Scheduler) -> str:
    model, count = scheduler.model, scheduler.pages.count * PAGE_SIZE
    size = count * bytes_per_token(model.config, model.compute_dtype)
    return f"{scheduler.max_batch} at a time, a cache of {count:,} tokens in {size / 1e9:.2f} GB."


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UserError("--port", "must be between 0 and 65535", got=port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:  # a name such as "a..b" is no text for a name server
        reason = getattr(error, "strerror", None) or "no name of a machine"
        got, remedy = f"{host}:{port}: {reason}", "choose another, 0 takes any free one"
        raise UserError(
            "--port", "must be free on an address of this machine", got=got, remedy=remedy
        ) from error
