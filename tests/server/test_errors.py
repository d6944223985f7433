"""Every error that a client can get, as OpenAI's client sees it."""

import json

import httpx2
import openai
import pytest
from served import NAME, make_service, served, wait_until

from lumi.config import UserError
from lumi.server.errors import ApiError, refused
from lumi.server.limits import Limits

TALK = [{"role": "user", "content": "a"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def locked(model, tokenizer):
    """A server with a key."""
    with served(make_service(model, tokenizer, Limits(max_body_bytes=2000)), api_key="se-cret") as server:
        wait_until(server.is_ready)
        yield server


class TestApiError:
    def test_it_has_the_form_of_the_api(self):
        error = ApiError(404, "no such model", param="model", code="model_not_found")
        expected = {"type": "not_found_error", "param": "model", "code": "model_not_found"}
        assert error.body == {"error": {"message": "no such model"} | expected}
        assert error.headers == {}

    @pytest.mark.parametrize(
        ("status", "kind", "headers"),
        [
            (400, "invalid_request_error", set()),
            (401, "authentication_error", {"WWW-Authenticate"}),
            (422, "invalid_request_error", set()),
            (429, "rate_limit_error", {"Retry-After"}),
            (500, "server_error", set()),
            (503, "server_error", {"Retry-After"}),
        ],
    )
    def test_each_status_has_its_type_and_headers(self, status, kind, headers):
        error = ApiError(status, "x")
        assert (error.error.type, error.headers.keys()) == (kind, headers)
        assert ApiError(status, "x", may_retry=False).headers.keys() == headers | {"x-should-retry"}

    def test_what_the_model_refuses_is_400(self):
        error = refused(UserError("a prompt", "must be shorter", got=3), "prompt")
        assert (error.status, error.error.message, error.error.param) == (
            400,
            "a prompt must be shorter, got 3",
            "prompt",
        )


class TestThroughTheClient:
    def test_a_prompt_that_is_too_long(self, client):
        for ask in (
            lambda: client.completions.create(model=NAME, prompt="a river " * 300),
            lambda: client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "a river " * 300}]
            ),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                ask()
            assert caught.value.code == "context_length_exceeded"
            assert "must be shorter than the model's 256 positions, got " in caught.value.message
            assert caught.value.param == ("messages" if "chat" in str(caught.value.request.url) else "prompt")

    @pytest.mark.parametrize("key", ["wrong", "se-cret2", "se-cre", "SE-CRET"])
    def test_a_wrong_key(self, key, locked):
        with locked.client(api_key=key) as client:
            for ask in (
                client.models.list,
                lambda: client.models.retrieve(NAME),
                lambda: client.completions.create(model=NAME, prompt="a"),
                lambda: client.chat.completions.create(model=NAME, messages=TALK),
            ):
                with pytest.raises(openai.AuthenticationError) as caught:
                    ask()
                assert caught.value.code == "invalid_api_key"
                assert caught.value.response.headers["www-authenticate"] == "Bearer"
                assert "got a wrong API key" in caught.value.message

    @pytest.mark.parametrize("given", [None, "", "Bearer", "Basic se-cret", "se-cret"])
    def test_no_key(self, given, locked):
        headers = {} if given is None else {"Authorization": given}
        for path in ("/v1/models", "/metrics"):
            answer = httpx2.get(locked.url + path, headers=headers)
            assert answer.status_code == 401
            assert "got no API key" in answer.json()["error"]["message"]

    def test_the_right_key(self, locked):
        with locked.client(api_key="se-cret") as client:
            assert client.models.retrieve(NAME).id == NAME
            assert client.completions.create(model=NAME, prompt="a").choices
        for path in ("/", "/health", "/openapi.json"):  # these say nothing of the model's texts
            assert httpx2.get(locked.url + path).status_code == 200

    def test_without_a_key_any_is_taken(self, server):
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic eDp5"}):
            assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "name", ["gpt-5", "", "../../etc/passwd", "/etc/passwd", "TINY", "tiny\0", "tiny/.."]
    )
    def test_another_model(self, name, client, server):
        for ask in (
            lambda: client.completions.create(model=name, prompt="a"),
            lambda: client.chat.completions.create(model=name, messages=TALK),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                ask()
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        if name:
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve(name)

    def test_another_route(self, client, server):
        with pytest.raises(openai.NotFoundError) as caught:
            client.embeddings.create(model=NAME, input="a")
        assert caught.value.body["type"] == "not_found_error"
        answer = httpx2.get(f"{server.url}/v1/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["message"] == "Method Not Allowed"

    def test_a_body_that_is_too_large(self, locked):
        with locked.client(api_key="se-cret") as client, pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=NAME, prompt="a" * 2000)
        assert caught.value.status_code == 413
        assert caught.value.body["message"] == "a request must have at most 2,000 bytes here"

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"temperature": 3}, "temperature"),
            ({"extra_body": {"frequency_penaltyy": 1}}, "frequency_penaltyy"),
            ({"extra_body": {"ä ö": 1}}, "ä ö"),
            ({"stop": ["a", 1]}, "stop.1"),
            ({"messages": [*TALK, {"role": "user", "content": 1}]}, "messages.1.content"),
            ({"messages": [*TALK, {"role": "user"}]}, "messages.1.content"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
            ({"max_completion_tokens": 65}, "max_completion_tokens"),
            ({"max_tokens": 65}, "max_tokens"),
            ({"top_logprobs": 3}, None),
        ],
        ids=str,
    )
    def test_a_wrong_field_is_named(self, change, param, client):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.chat.completions.create(**{"model": NAME, "messages": TALK} | change)
        assert caught.value.param == param
        assert caught.value.code == "invalid_fields"
        message = caught.value.body["message"]
        assert message.startswith(f"{param}: " if param else "top_logprobs must come with logprobs")
        assert not any(word in message for word in (".str", "[", "function", "Value error"))


class TestBodies:
    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            (b"", 422, "the body must be a JSON object, sent as application/json"),
            (b"null", 422, "the body must be a JSON object, sent as application/json"),
            (b"[1]", 422, "the body must be a JSON object, sent as application/json"),
            (b'"x"', 422, "the body must be a JSON object, sent as application/json"),
            (b'{"model"', 400, "the body must be JSON, got an error at character 8: Expecting ':' delimiter"),
            (b'{"a": 1}x', 400, "the body must be JSON, got an error at character 8: Extra data"),
            (b"{}", 422, "model: Field required; prompt: Field required"),
            (b'{"a": "\xff"}', 400, "the body must be UTF-8, got byte 0xff at 7"),
            (b"[" * 100_000, 400, "the body must be JSON of a few levels, got hundreds of lists or objects"),
            (
                b'{"a":' * 2000 + b"1" + b"}" * 2000,
                400,
                "the body must be JSON of a few levels, got hundreds",
            ),
            (
                b'{"seed": ' + b"9" * 5000 + b"}",
                400,
                "the body must be JSON that can be read: Exceeds the limit",
            ),
            (
                b'{"user": "a", "user": "b"}',
                400,
                "the body must be JSON that can be read: duplicate key 'user'",
            ),
            (b'{"stream_options": {"x": 1, "x": 1}}', 400, "duplicate key 'x'"),
            (b'{"model": "tiny", "prompt": "a", "top_p": NaN}', 422, "top_p: Input should be less than"),
            (b'{"model": "tiny", "prompt": "a", "top_p": -Infinity}', 422, "top_p: Input should be greater"),
            (b'{"model": "tiny", "prompt": "a", "top_p": 1e999}', 422, "top_p: Input should be less than"),
            (b'{"model": "tiny", "prompt": ["\\udfff"]}', 400, "lone surrogate U+DFFF at character 0"),
            (b'{"model": "\\udfff", "prompt": "a"}', 404, "the model '\\udfff' is not here"),
            (b'{"model": "tiny", "prompt": "a", "stop": "\\udfff"}', 422, "stop: "),
            (b'{"model": "tiny", "prompt": "a", "\\udfff": 1}', 422, ""),
            (b'{"model": "tiny", "prompt": [%d]}' % 10**30, 400, "prompt: ids must be below 384"),
            (b'{"model": "tiny", "prompt": [384]}', 400, "prompt: ids must be below 384, got 384"),
            (b'{"model": "tiny", "prompt": "a", "top_k": %d}' % 10**30, 200, ""),
        ],
        ids=lambda value: ascii(value)[:40],
    )
    def test_a_strange_body_is_refused_in_the_same_form(self, body, status, said, server):
        answer = httpx2.post(f"{server.url}/v1/completions", content=body, headers=JSON)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/json"
        if status != 200:
            assert said in answer.json()["error"]["message"]
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert not said.startswith("the body") or error["param"] is None

    @pytest.mark.parametrize(
        "field", ["prompt", "user", "logit_bias", "stop", "temperature", "suffix", "other"]
    )
    @pytest.mark.parametrize("pair", ["[]", "{}"])
    def test_lists_within_lists_are_no_fault_of_the_program(self, field, pair, server, caplog):
        inner = {"[]": ("[", "]"), "{}": ('{"a":', "}")}[pair]
        for depth in (3, 100, 300, 500, 700, 900, 960, 1000):
            deep = inner[0] * depth + "1" + inner[1] * depth
            for path, rest in (("completions", '"prompt": "a"'), ("chat/completions", '"messages": []')):
                rest = "" if field == "prompt" and path == "completions" else f", {rest}"
                body = f'{{"model": "{NAME}", "{field}": {deep}{rest}}}'
                answer = httpx2.post(f"{server.url}/v1/{path}", content=body, headers=JSON)
                assert answer.status_code in (400, 422), (depth, answer.text)
                assert len(answer.text) < 1000
        assert not caplog.records

    def test_what_a_client_sends_does_not_come_back_whole(self, server):
        long = "x" * 100_000
        for change in ({"model": long}, {long: 1}, {"prompt": [10**4000]}, {"stream_options": {long: 1}}):
            body = {"model": NAME, "prompt": "a"} | change
            answer = httpx2.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code in (400, 404, 422)
            assert len(answer.text) < 3000
        answer = httpx2.post(f"{server.url}/v1/completions", json={"model": long, "prompt": "a"})
        said = f"the model '{long[:100]}...' is not here; this server has '{NAME}'"
        assert answer.json()["error"]["message"] == said

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"stop": ""}, "stop: String should have at least 1 character"),
            ({"stop": ["a", 1]}, "stop.1: Input should be a valid string"),
            ({"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
            ({"prompt": [[1, -1]]}, "prompt.0.1: Input should be greater than or equal to 0"),
            ({"logit_bias": {"1": 2}}, "logit_bias: is not supported here; leave it out"),
            ({"stop": 1}, "stop: Input should be a valid string; stop: Input should be a valid list"),
        ],
        ids=str,
    )
    def test_a_value_is_measured_as_what_it_is(self, change, said, server):
        body = {"model": NAME, "prompt": "a"} | change
        error = httpx2.post(f"{server.url}/v1/completions", json=body).json()["error"]
        assert error["message"].startswith(said)
        assert "; ".join(error["message"].split("; ")[: said.count("; ") + 1]) == error["message"]
        assert error["param"] == said.split(":")[0]

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
    )
    def test_what_a_foreign_page_may_send_without_asking_is_no_json(self, kind, server):
        """A browser sends these kinds anywhere; others it sends only where the server allows it."""
        body = json.dumps({"model": NAME, "prompt": "a"}).encode()
        headers = {} if kind is None else {"Content-Type": kind}
        answer = httpx2.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert answer.status_code in (400, 422)
        asked = httpx2.options(f"{server.url}/v1/completions", headers={"Origin": "https://evil.example"})
        assert asked.status_code == 405
        assert "access-control-allow-origin" not in asked.headers

    def test_a_body_in_chunks_has_the_same_limit(self, locked):
        chunks = (b"x" * 500 for _ in range(5))
        headers = JSON | {"Authorization": "Bearer se-cret"}
        answer = httpx2.post(f"{locked.url}/v1/completions", content=chunks, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "a request must have at most 2,000 bytes here"


def test_a_fault_of_the_program_is_500_and_says_little(model, tokenizer, monkeypatch):
    with served(make_service(model, tokenizer)) as server, server.client() as client:
        wait_until(server.is_ready)

        def fails(request):
            raise ZeroDivisionError("a detail of the inside")

        monkeypatch.setattr(server.scheduler, "limit", fails)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=NAME, prompt="a")
        assert caught.value.status_code == 500
        assert caught.value.body["message"] == "the server failed: ZeroDivisionError"
