"""Which requests are taken: JSON of the right types, nothing that would be ignored."""

import inspect

import pytest
from openai.resources.chat import Completions as ChatCompletions
from openai.resources.completions import Completions
from pydantic import ValidationError

from lumi.server.schema import ChatRequest, CompletionRequest, limited

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "m", "prompt": "x"}
OWN = {"top_k", "repetition_penalty"}  # of vLLM
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(
    ("kind", "body", "method"),
    [(ChatRequest, CHAT, ChatCompletions.create), (CompletionRequest, TEXT, Completions.create)],
    ids=["chat", "text"],
)
def test_every_parameter_of_openai_is_taken_or_refused_by_name(kind, body, method):
    names = inspect.signature(method).parameters.keys() - OF_THE_CLIENT
    assert kind.model_fields.keys() - OWN <= names
    others = names - kind.model_fields.keys()
    assert {"service_tier", "functions"} & names <= others
    for name in [*others, "max_token"]:
        with pytest.raises(ValidationError) as refused:
            kind.model_validate(body | {name: None})
        assert [error["loc"] for error in refused.value.errors()] == [(name,)]


@pytest.mark.parametrize(
    "change",
    [
        {"n": True},
        {"n": "1"},
        {"n": 0},
        {"n": 129},
        {"temperature": "1"},
        {"temperature": False},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"stream": 1},
        {"stream": "true"},
        {"stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": 1}},
        {"stream": True, "stream_options": {"other": True}},
        {"stop": ""},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stop": "x" * 1001},
        {"stop": [1]},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {"1": 2}},
        {"logit_bias": [1]},
        {"user": 1},
        {"model": 1},
        {"max_tokens": 1.5},
        {"seed": float("inf")},
    ],
    ids=str,
)
def test_values_that_neither_kind_takes(change):
    for kind, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        kind.model_validate(body)
        with pytest.raises(ValidationError) as refused:
            kind.model_validate(body | change)
        assert {*(error["loc"][:1] for error in refused.value.errors())} <= {(name,) for name in change} | {
            ()
        }


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]},
        {"max_tokens": 0},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"top_logprobs": 0},
        {"top_logprobs": 21, "logprobs": True},
        {"logprobs": 1},
        {"tools": [{}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"store": True},
        {"store": 0},
        {"store": 0.0},
        {"store": "false"},
    ],
    ids=str,
)
def test_what_is_no_chat(change):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | change)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", 1]},
        {"prompt": [1, True]},
        {"prompt": [1.5]},
        {"prompt": [-1]},
        {"prompt": [[1], "a"]},
        {"prompt": None},
        {"max_tokens": 0},
        {"max_tokens": -1, "echo": True},
        {"logprobs": 21},
        {"logprobs": True},
        {"suffix": ""},
        {"echo": 1},
    ],
    ids=str,
)
def test_what_is_no_completion(change):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(TEXT | change)


@pytest.mark.parametrize("wrong", [1.5, None, {}, [1.5]], ids=str)
def test_a_long_list_has_few_errors(wrong):
    """The text of an error for each item would take a server seconds."""
    for kind, body in (
        (CompletionRequest, TEXT | {"prompt": [wrong] * 1000}),
        (ChatRequest, CHAT | {"messages": [wrong] * 1000}),
        (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [wrong] * 1000}]}),
    ):
        with pytest.raises(ValidationError) as refused:
            kind.model_validate(body)
        assert refused.value.error_count() < 8


def test_neutral_values_are_taken():
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": [], "seed": None}
    ChatRequest.model_validate(CHAT | neutral | {"tools": [], "tool_choice": "none", "n": 1})
    ChatRequest.model_validate(CHAT | {"response_format": {"type": "text"}, "user": "x", "temperature": 1})
    numbers = {"n": 2.0, "seed": -3.0, "max_tokens": 4.0, "prompt": [5.0]}  # integers in JSON
    assert CompletionRequest.model_validate(TEXT | numbers).model_dump().items() >= numbers.items()
    CompletionRequest.model_validate(TEXT | neutral | {"suffix": None, "max_tokens": 0, "echo": True})


@pytest.mark.parametrize(
    ("kind", "body", "method"),
    [(ChatRequest, CHAT, ChatCompletions.create), (CompletionRequest, TEXT, Completions.create)],
    ids=["chat", "text"],
)
def test_null_is_the_default(kind, body, method):
    """Of more fields than OpenAI's types let be null: of all but those that a request must have."""
    nulls = dict.fromkeys(kind.model_fields.keys() - body.keys())
    assert kind.model_validate(body | nulls) == kind.model_validate(body)
    shown = kind.model_json_schema()["properties"]
    others = [name for name in nulls if {"type": "null"} not in shown[name].get("anyOf", [])]
    assert [shown[name]["type"] for name in others] == ["null"] * len(others)
    for name in body:
        with pytest.raises(ValidationError):
            kind.model_validate(body | {name: None})


def test_prompts_of_each_kind():
    for given, prompts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ):
        assert CompletionRequest.model_validate(TEXT | {"prompt": given}).prompts == prompts


def test_a_server_s_limits_are_part_of_its_schema():
    chat = limited(ChatRequest, max_tokens=8, max_choices=3)
    text = limited(CompletionRequest, max_tokens=8, max_choices=3)
    chat.model_validate(CHAT | {"n": 3, "max_tokens": 8})
    for kind, body, names in (
        (chat, CHAT, ("max_tokens", "max_completion_tokens")),
        (text, TEXT, ("max_tokens",)),
    ):
        for name, value in {"n": 4, **dict.fromkeys(names, 9)}.items():
            with pytest.raises(ValidationError) as refused:
                kind.model_validate(body | {name: value})
            assert refused.value.errors()[0]["loc"] == (name,)
            shown = kind.model_json_schema()["properties"][name]
            assert (shown.get("anyOf") or [shown])[0]["maximum"] == value - 1
    assert text.model_validate(TEXT).max_tokens == 8  # the API's default, 16, is more
    assert "maximum" not in CompletionRequest.model_json_schema()["properties"]["max_tokens"]["anyOf"][0]
    assert chat.__name__ == "ChatRequest"
