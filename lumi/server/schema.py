"""The OpenAI API's requests and responses, as far as they are served. Other fields are refused by name.

A field that changes nothing at its neutral value, such as `presence_penalty` 0, is taken at that value alone.

Source: https://platform.openai.com/docs/api-reference; `top_k`, `repetition_penalty` and `reasoning_content`
are named as in vLLM.
"""

import copy
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

# Taken only at the value that changes nothing.
NEUTRAL_FIELDS = frozenset(
    "presence_penalty frequency_penalty logit_bias tools tool_choice response_format suffix".split()
)
MAX_TOP = 20  # likeliest tokens that a request may ask for
Zero = Annotated[float, Field(ge=0, le=0)]
Some = Field(min_length=1, fail_fast=True)  # a long list has one error, not as many as items
Empty = Field(max_length=0)
Nothing = Annotated[list[Any], Empty] | Annotated[dict[str, Any], Empty] | None
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
_ROOM = "fewer where the model's positions or the cache end: then finish_reason is length"
MaxTokens = Annotated[int, Field(ge=1, description=f"default: the most that the server allows; {_ROOM}")]


class Strict(BaseModel):
    """Takes no unknown field, and no value of another type: true is no number, "1" neither."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False


def _show_null(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        if field.get("default") is not None:
            names = field.keys() - {"title", "description", "default"}
            field["anyOf"] = [{name: field.pop(name) for name in sorted(names)}, {"type": "null"}]


class Generation(Strict):
    """What both kinds of completion take. As in OpenAI's API, null is the default of what has one."""

    model_config = ConfigDict(json_schema_extra=_show_null)

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, description="below 0.0001: greedy")] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, description="0: all tokens")] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Field(description="changes nothing")] = None
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0
    logit_bias: Nothing = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in body.items() if value is not None or name not in optional}

    @field_validator("*", mode="before")
    @classmethod
    def _read_integers(cls, value: Any) -> Any:
        """1.0 is an integer in JSON, and some languages write theirs so. No field holds deeper ones."""
        if isinstance(value, list):
            return [[*map(_integer, item)] if isinstance(item, list) else _integer(item) for item in value]
        return _integer(value)

    @model_validator(mode="after")
    def _check_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must come with stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    reasoning_content: str | None = None


class ResponseFormat(Strict):
    """Text is the only one."""

    type: Literal["text"]


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Some]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: Annotated[MaxTokens | None, Field(description="newer for max_tokens")] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    response_format: ResponseFormat | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="changes nothing")] = None
    store: Annotated[Literal[False] | None, Field(description="nothing is stored")] = None
    metadata: Annotated[dict[str, str] | None, Field(description="changes nothing")] = None

    @field_validator("store", mode="before")
    @classmethod
    def _refuse_zero(cls, value: Any) -> Any:
        """0 equals False in Python, and a Literal asks for no more."""
        if value is not None and not isinstance(value, bool):
            raise ValueError("must be false")
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must come with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        return self


class CompletionRequest(Generation):
    """Body of /v1/completions."""

    prompt: Annotated[
        str
        | Annotated[list[TokenId], Some]
        | Annotated[list[str], Some]
        | Annotated[list[Annotated[list[TokenId], Some]], Some],
        Field(description="a text, its token ids, or several of either"),
    ]
    max_tokens: Annotated[int, Field(ge=0, description=f"0: only with echo; {_ROOM}")] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool = False
    suffix: None = None

    @model_validator(mode="after")
    def _check_length(self) -> "CompletionRequest":
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Body = TypeVar("Body", bound=Generation)


def limited(kind: type[Body], *, max_tokens: int, max_choices: int) -> type[Body]:
    """A kind of request that takes no more than one server allows, and says so in /openapi.json."""
    most = {"n": max_choices, "max_tokens": max_tokens, "max_completion_tokens": max_tokens}
    fields: dict[str, Any] = {}
    for name, bound in most.items():
        if name in kind.model_fields:
            field: FieldInfo = copy.copy(kind.model_fields[name])
            field.metadata = [*field.metadata, *Field(le=bound).metadata]
            if field.default is not None:
                field.default = min(field.default, bound)
            fields[name] = field.annotation, field
    return create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields)


class PromptDetails(BaseModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token that was likely in a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The chosen tokens of an answer."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """The chosen tokens of a text. `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    """The message that a model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class AnswerDelta(BaseModel):
    """A piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What an answer got."""

    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    """One continuation. In a stream, a piece of it; `finish_reason` is null until the last."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Response of /v1/completions, and an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served. `max_model_len`: tokens of prompt and answer together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lumi"] = "lumi"
    max_model_len: int


class ModelList(BaseModel):
    """Response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Response of /health."""

    status: Literal["ok", "loading"]


class Error(BaseModel):
    """What went wrong. `param` names a field of the request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: Error
