"""Requests of the API -> requests of the engine, and what comes of them. It lives in the event loop."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lumi.chat.messages import MalformedConversation
from lumi.chat.rendering import stop_ids
from lumi.config import UserError
from lumi.inference.completions import conversation_ids
from lumi.inference.engine import Engine, News
from lumi.inference.generation import SamplingConfig, text_ids
from lumi.inference.scheduler import Delta, Finish, Request, Scheduler
from lumi.server.errors import ApiError, refused, shortened
from lumi.server.limits import Limits
from lumi.server.metrics import Metrics
from lumi.server.schema import ChatRequest, CompletionRequest, Generation, PromptDetails, Usage
from lumi.tokenizer.tokenizer import Tokenizer


@dataclass
class Choices:
    """The choices of one API request, in the order of their prompts and `n`."""

    requests: list[Request]
    num_prompts: int
    num_generated: int = 0

    def usage(self) -> Usage:
        """Counts of tokens so far. A prompt counts once, however many choices it has."""
        firsts = self.requests[:: len(self.requests) // self.num_prompts]
        prompt = sum(len(request.prompt) for request in firsts)
        cached = sum(request.num_shared for request in firsts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.num_generated,
            total_tokens=prompt + self.num_generated,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )


class Service:
    """One model, for the requests of many clients.

    Args:
        model_name: as clients name it.
        load: makes the scheduler; runs in the engine's thread.
        on_ready: called in the event loop when the model is loaded, or could not be: then with the error.
    """

    def __init__(
        self,
        model_name: str,
        load: Callable[[], Scheduler],
        limits: Limits,
        on_ready: Callable[[BaseException | None], None] = lambda error: None,
    ):
        self.model_name, self.limits, self.metrics = model_name, limits, Metrics()
        self.created = int(time.time())
        self._load, self._on_ready = load, on_ready
        self._num_open = 0  # choices that wait or run

    def start(self) -> None:
        """Begin to load the model. Call it in the event loop."""
        loop = asyncio.get_running_loop()

        def on_ready(error: BaseException | None) -> None:
            loop.call_soon_threadsafe(self._on_ready, error)

        def on_news(news: News) -> None:
            loop.call_soon_threadsafe(self._pass_on, news)

        self._engine = Engine(self._load, on_ready, on_news)
        self._engine.start()

    def stop(self) -> None:
        """End the engine."""
        self._engine.close()

    @property
    def scheduler(self) -> Scheduler:
        """Raises ApiError while the model is loading."""
        if (scheduler := self._engine.scheduler) is None:
            raise ApiError(503, "the model is loading; try again in a moment", code="loading")
        return scheduler

    @property
    def tokenizer(self) -> Tokenizer:
        """As `scheduler`."""
        return self.scheduler.tokenizer

    def check_model(self, name: str) -> None:
        """Raises ApiError if another model is asked for."""
        if name != self.model_name:
            message = f"the model {shortened(name)!r} is not here; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, body: ChatRequest) -> Choices:
        """The choices of a conversation. Raises ApiError for one that cannot be answered."""
        self.check_model(body.model)
        tokenizer, data = self.tokenizer, [message.model_dump() for message in body.messages]
        try:  # in a thread: a template of others takes a process and up to seconds
            prompt = await asyncio.to_thread(conversation_ids, tokenizer, data)
            ends = await asyncio.to_thread(stop_ids, tokenizer)
        except (UserError, MalformedConversation) as error:
            raise refused(error, "messages") from error
        return self._choices(
            body,
            [prompt],
            ends,
            max_tokens=body.max_completion_tokens or body.max_tokens or self.limits.max_tokens,
            num_top=(body.top_logprobs or 0) if body.logprobs else None,
        )

    async def complete(self, body: CompletionRequest) -> Choices:
        """The choices of prompts. Raises ApiError for one that cannot be continued."""
        self.check_model(body.model)
        tokenizer, prompts = self.tokenizer, []
        if (count := body.n * len(body.prompts)) > (most := self.limits.max_choices):  # before the work
            message = f"n times the prompts must be at most {most} here, got {count}"
            raise ApiError(422, message, param="n", code="invalid_value")
        for prompt in body.prompts:
            if isinstance(prompt, str):
                try:
                    prompts.append(await asyncio.to_thread(text_ids, tokenizer, prompt))
                except UserError as error:
                    raise refused(error, "prompt") from error
            elif max(prompt) >= tokenizer.vocab_size:
                wrong = f"prompt: ids must be below {tokenizer.vocab_size}, got {max(prompt)}"
                raise ApiError(400, wrong, param="prompt", code="invalid_value")
            else:
                prompts.append(prompt)
        return self._choices(
            body,
            prompts,
            frozenset(tokenizer.eos_ids),
            max_tokens=body.max_tokens,
            num_top=body.logprobs,
            echo=body.echo,
        )

    def _choices(
        self,
        body: Generation,
        prompts: Sequence[Sequence[int]],
        ends: frozenset[int],
        *,
        max_tokens: int,
        num_top: int | None,
        echo: bool = False,
    ) -> Choices:
        seed = secrets.randbelow(2**63) if body.seed is None else body.seed
        requests = []
        for number in range(body.n * len(prompts)):
            sampling = SamplingConfig(
                max_new_tokens=max(max_tokens, 1),
                temperature=body.temperature if body.temperature >= 1e-4 else 0.0,
                top_k=body.top_k,
                top_p=max(body.top_p, 1e-6),
                repetition_penalty=body.repetition_penalty,
                seed=(seed + number) % 2**63,
            )
            request = Request(
                prompt=prompts[number // body.n],
                sampling=sampling,
                stop_ids=ends,
                stops=body.stops,
                num_top=num_top,
                scores_prompt=echo and num_top is not None,
                only_prompt=not max_tokens,
                deadline=time.monotonic() + self.limits.request_seconds,
            )
            self._check_length(request, "messages" if isinstance(body, ChatRequest) else "prompt")
            requests.append(request)
        return Choices(requests, len(prompts))

    def _check_length(self, request: Request, param: str) -> None:
        try:
            self.scheduler.limit(request)
        except UserError as error:
            code = "context_length_exceeded" if request.prompt else "invalid_value"
            raise ApiError(400, str(error), param=param, code=code) from error

    async def run(self, choices: Choices) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Yields what is new, with the numbers of the choices. An early end cancels what is left.

        Raises:
            ApiError: too many are waiting, the model failed, or it took too long.
        """
        if self._num_open + len(choices.requests) > self.limits.max_batch + self.limits.max_queue:
            raise ApiError(429, "too many requests are waiting; try again later", code="queue_full")
        self._num_open += len(choices.requests)
        inbox: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        started, is_first, finished = time.monotonic(), True, False
        unfinished = dict(enumerate(choices.requests))
        try:
            for number, request in unfinished.items():
                request.deliver = partial(_put, inbox, number)
                self._engine.submit(request)
            while unfinished:
                news = [await inbox.get()]
                while not inbox.empty():  # a slow client gets what has gathered in one piece
                    news.append(inbox.get_nowait())
                for number, delta in news:
                    choices.num_generated += len(delta.tokens)
                    if delta.finish is not None:
                        del unfinished[number]
                        _require_success(delta, self.limits)
                if is_first:
                    self.metrics.first_token.observe(time.monotonic() - started)
                    is_first = False
                yield news
            finished = True
        finally:
            for request in unfinished.values():
                self._engine.cancel(request)
            self._num_open -= len(choices.requests)
            self.metrics.count(choices.usage(), time.monotonic() - started, finished)

    def _pass_on(self, news: News) -> None:
        for request, delta in news:
            request.deliver(delta)


def _put(inbox: asyncio.Queue[tuple[int, Delta]], number: int, delta: Delta) -> None:
    inbox.put_nowait((number, delta))


def _require_success(delta: Delta, limits: Limits) -> None:
    if delta.finish is Finish.TIMEOUT:
        message = f"the request took longer than {limits.request_seconds:g} s; lower max_tokens"
        raise ApiError(504, message, code="timeout", may_retry=False)
    if delta.finish is Finish.ERROR:
        raise ApiError(500, f"the model failed: {delta.error}", code="model_error", may_retry=False)
