"""What the engine computed -> the API's objects, whole or as the events of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from lumi.inference.scheduler import Delta, Finish, Scored
from lumi.server import schema
from lumi.server.errors import ApiError
from lumi.server.service import Choices
from lumi.tokenizer.tokenizer import StreamDecoder, Tokenizer

News = AsyncGenerator[list[tuple[int, Delta]], None]


@dataclass
class _Part:
    """What a choice has got, since the last event or in all."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    finish: schema.FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.scored += [*(delta.prompt or ()), *delta.tokens]
        if delta.finish is not None:  # by itself: a failure has become an error before this
            self.finish = "stop" if delta.finish is Finish.STOP else "length"


class Wire(ABC):
    """One response.

    Args:
        choices: what it answers.
        news: what comes of them, see `lumi.server.service.Service.run`.
    """

    def __init__(self, tokenizer: Tokenizer, model_name: str, choices: Choices, news: News):
        self.tokenizer, self.choices, self.news = tokenizer, choices, news
        self._names = {token_id: name for name, token_id in tokenizer.control_ids.items()}
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    prefix: str

    @abstractmethod
    def whole(self, parts: Sequence[_Part]) -> BaseModel:
        """The response, from all that the choices got."""

    @abstractmethod
    def piece(self, parts: dict[int, _Part]) -> BaseModel:
        """An event, from what some choices got."""

    @abstractmethod
    def last(self) -> BaseModel:
        """The event with the usage."""

    async def collect(self) -> BaseModel:
        """The whole response. Raises ApiError as `news`."""
        parts = [_Part() for _ in self.choices.requests]
        async for batch in self.news:
            for number, delta in batch:
                parts[number].add(delta)
        return self.whole(parts)

    async def stream(self, first: list[tuple[int, Delta]], wants_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, from what came first on. An error ends them as an event of its own."""
        try:
            yield self._event(first)
            async for batch in self.news:
                yield self._event(batch)
        except ApiError as error:
            yield _sse(schema.ErrorResponse(error=error.error))
            return
        if wants_usage:
            yield _sse(self.last())
        yield b"data: [DONE]\n\n"

    def _event(self, batch: Sequence[tuple[int, Delta]]) -> bytes:
        parts: dict[int, _Part] = {}
        for number, delta in batch:
            parts.setdefault(number, _Part()).add(delta)
        return _sse(self.piece(parts))

    def _logprob(self, token: int, log_probability: float) -> dict[str, Any]:
        data = self.tokenizer.piece_bytes(token)
        return {"token": self._name(token), "logprob": log_probability, "bytes": list(data)}

    def _name(self, token: int) -> str:
        known = self._names.get(token)
        return self.tokenizer.piece_bytes(token).decode(errors="replace") if known is None else known


def _sse(data: BaseModel) -> bytes:
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class ChatWire(Wire):
    """Response of /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._has_begun: set[int] = set()

    def whole(self, parts: Sequence[_Part]) -> BaseModel:
        choices = [
            schema.ChatChoice(
                index=index,
                message=schema.Answer(content=part.text),
                logprobs=self._logprobs(index, part),
                finish_reason=part.finish,  # type: ignore[arg-type]
            )
            for index, part in enumerate(parts)
        ]
        return schema.ChatCompletion(**self.head, choices=choices, usage=self.choices.usage())

    def piece(self, parts: dict[int, _Part]) -> BaseModel:
        choices = []
        for index, part in parts.items():
            delta = schema.AnswerDelta(content=part.text)
            if index not in self._has_begun:
                self._has_begun.add(index)
                delta = schema.AnswerDelta(role="assistant", content=part.text)
            logprobs = self._logprobs(index, part)
            choices.append(
                schema.ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=part.finish)
            )
        return schema.ChatChunk(**self.head, object="chat.completion.chunk", choices=choices)

    def last(self) -> BaseModel:
        usage = self.choices.usage()
        return schema.ChatChunk(**self.head, object="chat.completion.chunk", choices=[], usage=usage)

    def _logprobs(self, index: int, part: _Part) -> schema.ChatLogprobs | None:
        if self.choices.requests[index].num_top is None:
            return None
        content = []
        for token, log_probability, top in part.scored:
            tops = [schema.TopLogprob(**self._logprob(*pair)) for pair in top]
            assert log_probability is not None
            chosen = self._logprob(token, log_probability)
            content.append(schema.TokenLogprob(**chosen, top_logprobs=tops))
        return schema.ChatLogprobs(content=content)


class TextWire(Wire):
    """Response of /v1/completions."""

    prefix = "cmpl"

    def __init__(
        self, tokenizer: Tokenizer, model_name: str, choices: Choices, news: News, echoes: Sequence[str]
    ):
        """`echoes`: what stands before the text of each choice; nothing without echo."""
        super().__init__(tokenizer, model_name, choices, news)
        self._echoes = dict(enumerate(echoes))
        self._decoders = [StreamDecoder(tokenizer) for _ in choices.requests]
        self._offsets = [0] * len(choices.requests)
        for index, echo in self._echoes.items():  # a space that the tokenizer puts before a text is not in it
            decoded = tokenizer.decode(choices.requests[index].prompt, continues=True)
            self._offsets[index] = len(echo) - len(decoded)

    def whole(self, parts: Sequence[_Part]) -> BaseModel:
        return self.piece(dict(enumerate(parts))).model_copy(update={"usage": self.choices.usage()})

    def piece(self, parts: dict[int, _Part]) -> BaseModel:
        choices = [
            schema.TextChoice(
                index=index,
                text=self._echoes.pop(index, "") + part.text,
                logprobs=self._logprobs(index, part),
                finish_reason=part.finish,
            )
            for index, part in parts.items()
        ]
        return schema.Completion(**self.head, object="text_completion", choices=choices)

    def last(self) -> BaseModel:
        usage = self.choices.usage()
        return schema.Completion(**self.head, object="text_completion", choices=[], usage=usage)

    def _logprobs(self, index: int, part: _Part) -> schema.TextLogprobs | None:
        if self.choices.requests[index].num_top is None:
            return None
        offsets = []
        for token, *_ in part.scored:
            offsets.append(max(self._offsets[index], 0))
            self._offsets[index] += len(self._decoders[index].feed(token))
        tops = [
            None if scored.log_probability is None else {self._name(token): log for token, log in scored.top}
            for scored in part.scored
        ]
        return schema.TextLogprobs(
            tokens=[self._name(scored.token) for scored in part.scored],
            token_logprobs=[scored.log_probability for scored in part.scored],
            top_logprobs=tops,
            text_offset=offsets,
        )
