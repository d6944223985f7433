"""Many requests to one model at once: they join and leave the batch between steps (continuous batching).

A step computes one new token of every request that generates, and a piece of the prompts of those that have
just come, so that a long prompt does not hold up the others. A request gets pages for all of its tokens
before it starts: once started, it always finishes. Requests start in the order in which they came.

Source: Yu et al. 2022, Orca, https://www.usenix.org/conference/osdi22/presentation/yu; Kwon et al. 2023,
https://arxiv.org/abs/2309.06180; Agrawal et al. 2023 (prompts in pieces), https://arxiv.org/abs/2308.16369.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from lumi.config import UserError
from lumi.inference.generation import SamplingConfig, check_prompts, draws, sample
from lumi.inference.paged_cache import NewTokens, PagedCache
from lumi.inference.pages import PAGE_SIZE, Held, Pages, num_pages
from lumi.inference.stop_strings import StoppingText
from lumi.kernels.wide_float import wide_float
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

PROMPT_TOKENS = 128  # of prompts in one step: enough to pay for reading the weights, few enough not to stall


class Finish(Enum):
    """Why a request ended."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # its limit of tokens, the model's positions, or the cache
    TIMEOUT = "timeout"
    ERROR = "error"


class Scored(NamedTuple):
    """A token, its log-probability in nats, and the likeliest tokens in its place, with theirs."""

    token: int
    log_probability: float | None  # None: the first token of a prompt has none
    top: list[tuple[int, float]]


class Delta(NamedTuple):
    """What a step adds to a request.

    Attributes:
        tokens: the new ones; scores are None where the request asks for none.
        prompt: the scored prompt, once, where the request asks for it.
    """

    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: Finish | None = None
    prompt: tuple[Scored, ...] | None = None
    error: str | None = None


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt that is to be continued.

    Attributes:
        prompt: token ids.
        sampling: how to choose tokens, and how many at most.
        stop_ids: they end it and are left out.
        stops: strings that end it and are left out.
        num_top: score each token and so many likeliest ones in its place; None: score nothing.
        scores_prompt: score the prompt, too.
        only_prompt: generate nothing.
        deadline: when it ends at the latest, by `time.monotonic`.
        deliver: gets each `Delta`, in the thread that runs the steps or as `lumi.inference.engine` says.
        num_shared: tokens of the prompt that were computed already for another request.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    stops: Sequence[str] = ()
    num_top: int | None = None
    scores_prompt: bool = False
    only_prompt: bool = False
    deadline: float = float("inf")
    deliver: Callable[[Delta], None] = lambda delta: None
    num_shared: int = 0
    _state: "_State | None" = field(default=None, repr=False)


@dataclass(eq=False)
class _State:
    """A request that runs."""

    request: Request
    held: Held
    text: StoppingText
    limit: int  # new tokens
    draws: Tensor | None
    tokens: list[int]
    num_computed: int
    prompt_scores: list[Scored] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.num_computed


class Scheduler:
    """Runs requests step by step. It belongs to one thread.

    Args:
        max_batch: requests that run at the same time.
        num_pages: of the cache, `PAGE_SIZE` tokens each.

    Attributes:
        waiting: requests that have not started, the next one first.
        running: those that have, the oldest first.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, max_batch: int, num_pages: int):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.cache, self.pages = PagedCache(model, num_pages), Pages(num_pages)
        self.waiting: deque[Request] = deque()
        self.running: list[_State] = []

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.running)

    @property
    def max_tokens(self) -> int:
        """The most tokens that a request can have, with those that it generates."""
        return min(self.model.config.max_positions, self.pages.count * PAGE_SIZE)

    def limit(self, request: Request) -> int:
        """The most tokens that a request can generate. Raises UserError for an empty or too long prompt."""
        positions, room, length = self.model.config.max_positions, self.max_tokens, len(request.prompt)
        if room < positions and length >= room:
            remedy = "shorten it, or have the server started with more --cache-tokens"
            expectation = f"must be shorter than the cache's {room} tokens"
            raise UserError("a prompt", expectation, got=f"{length} tokens", remedy=remedy)
        check_prompts([request.prompt], positions)
        if request.only_prompt:
            return 0
        return min(request.sampling.max_new_tokens, room - length)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. Raises UserError as `limit`."""
        self.limit(request)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request without a word and give back its pages. One that has ended already is none."""
        if request._state is not None:
            self._end(request._state)
        elif request in self.waiting:
            self.waiting.remove(request)

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Delta]]:
        """Compute the next tokens. Returns what is new, for each request that has something.

        Raises:
            UserError: the model's output is not finite. All requests stay; `fail` ends them.
        """
        if news := self._expire():  # alone, so that no failure below loses it
            return news
        self._start()
        batch = self._plan()
        if not batch:
            return []
        new = [_new_tokens(state, count) for state, count in batch]
        hidden_ND = self.cache.hidden(new)
        rows, ready = [], []
        end = 0
        for state, count in batch:
            start, end = end, end + count
            if state.request.scores_prompt and state.num_computed < len(state.request.prompt):
                state.prompt_scores += self._prompt_scores(state, hidden_ND[start:end])
            self._advance(state, count)
            if not state.remaining:
                rows.append(end - 1)
                ready.append(state)
        if not ready:
            return []
        return self._accept(ready, self.model.logits(hidden_ND[rows])[:, : self.tokenizer.vocab_size])

    def fail(self, message: str) -> list[tuple[Request, Delta]]:
        """End all requests that run, because a step failed."""
        ended = [state.request for state in self.running]
        for state in list(self.running):
            self._end(state)
        return [(request, Delta(finish=Finish.ERROR, error=message)) for request in ended]

    def _expire(self) -> list[tuple[Request, Delta]]:
        now = time.monotonic()
        requests = [*self.waiting, *(state.request for state in self.running)]
        late = [request for request in requests if request.deadline < now]
        for request in late:
            self.cancel(request)
        return [(request, Delta(finish=Finish.TIMEOUT)) for request in late]

    def _start(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            limit, sampling = self.limit(request), request.sampling
            length = len(request.prompt) + limit
            held = self.pages.hold(request.prompt, length, may_share=not request.scores_prompt)
            if held is None:  # those behind it wait, too: else a large request might wait for ever
                return
            self.waiting.popleft()
            request.num_shared = held.num_shared
            request._state = _State(
                request,
                held,
                StoppingText(self.tokenizer, request.stops),
                limit,
                None if sampling.temperature == 0 else draws(sampling.seed, sampling.max_new_tokens),
                list(request.prompt),
                held.num_shared,
            )
            self.running.append(request._state)

    def _plan(self) -> list[tuple[_State, int]]:
        """Who computes how many tokens in this step, those with one first."""
        room, batch = PROMPT_TOKENS, []
        for state in self.running:
            if state.remaining == 1:
                batch.append((state, 1))
            elif room:
                batch.append((state, min(state.remaining, room)))
                room -= batch[-1][1]
        return sorted(batch, key=lambda entry: entry[1] > 1)

    def _advance(self, state: _State, count: int) -> None:
        before, state.num_computed = state.num_computed, state.num_computed + count
        if before // PAGE_SIZE < state.num_computed // PAGE_SIZE:
            self.pages.publish(state.held, state.tokens[: state.num_computed])

    def _prompt_scores(self, state: _State, hidden_TD: Tensor) -> list[Scored]:
        """The scores of the prompt's tokens after those in `hidden_TD`; of the first one, too."""
        start, prompt = state.num_computed, state.request.prompt
        targets = list(prompt[start + 1 : start + 1 + len(hidden_TD)])
        first = [Scored(prompt[0], None, [])] if start == 0 else []
        if not targets:
            return first
        logits_TV = self.model.logits(hidden_TD[: len(targets)])[:, : self.tokenizer.vocab_size]
        return first + _score(logits_TV, targets, state.request.num_top or 0)

    def _accept(self, ready: Sequence[_State], logits_BV: Tensor) -> list[tuple[Request, Delta]]:
        chosen = _choose(logits_BV, ready)
        news = []
        for row, (state, token) in enumerate(zip(ready, chosen, strict=True)):
            request, prompt = state.request, None
            if request.scores_prompt and not state.num_new:
                prompt = tuple(state.prompt_scores)
            delta = self._add(state, token, logits_BV[row])._replace(prompt=prompt)
            if delta.finish is not None:
                self._end(state)
            news.append((request, delta))
        return news

    def _add(self, state: _State, token: int, logits_V: Tensor) -> Delta:
        """Give a request its next token."""
        request = state.request
        if not state.limit:
            return Delta(finish=Finish.LENGTH)
        if token in request.stop_ids:
            return Delta(state.text.flush(), finish=Finish.STOP)
        state.tokens.append(token)
        scored = Scored(token, None, [])
        if request.num_top is not None:
            [scored] = _score(logits_V[None], [token], request.num_top)
        text, finish = state.text.feed(token), None
        if state.text.stopped:
            finish = Finish.STOP
        elif state.num_new == state.limit:
            text, finish = text + state.text.flush(), Finish.LENGTH
        return Delta(text, (scored,), finish)

    def _end(self, state: _State) -> None:
        self.running.remove(state)
        self.pages.release(state.held)
        state.request._state = None


def _new_tokens(state: _State, count: int) -> NewTokens:
    start, end = state.num_computed, state.num_computed + count
    return NewTokens(state.tokens[start:end], start, state.held.pages[: num_pages(end)])


def _choose(logits_BV: Tensor, states: Sequence[_State]) -> list[int]:
    """The next token of each state. Rows with the same settings are sampled together."""
    groups: dict[SamplingConfig, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(replace(state.request.sampling, seed=0, max_new_tokens=1), []).append(row)
    chosen = [0] * len(states)
    for config, rows in groups.items():
        is_penalised = config.repetition_penalty != 1.0  # else nobody looks at the tokens
        tokens = [torch.tensor(states[row].tokens if is_penalised else []) for row in rows]
        lengths = torch.tensor([len(ids) for ids in tokens], device=logits_BV.device)
        padded = torch.nn.utils.rnn.pad_sequence(tokens, True).to(logits_BV.device)
        drawn = [state.draws[state.num_new] for row in rows if (state := states[row]).draws is not None]
        draw_B = torch.stack(drawn).to(logits_BV.device, wide_float(logits_BV.device)) if drawn else None
        tokens_B = sample(logits_BV[rows], padded, lengths, config, draw_B)
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            chosen[row] = token
    return chosen


def _score(logits_TV: Tensor, targets: Sequence[int], num_top: int) -> list[Scored]:
    """Log-probabilities by the model itself: of temperature 1, before any penalty."""
    logs_TV = logits_TV.log_softmax(dim=-1)
    found = logs_TV[torch.arange(len(targets)), list(targets)].tolist()
    values, ids = (t.tolist() for t in logs_TV.topk(min(num_top, logs_TV.shape[1]), dim=-1))
    tops = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [Scored(*scored) for scored in zip(targets, found, tops, strict=True)]
