"""What a request gives: the tokens of `lumi generate`, whatever else runs; and how it ends."""

import contextlib
import json
import socket
import threading
import time

import httpx2
import openai
import pytest
import torch
from crafted_models import wanderer
from hugging_face_tokenizers import CHATML, make
from served import NAME, expected_texts, make_service, served, wait_until

import lumi.server.service
from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.inference.pages import PAGE_SIZE
from lumi.server.limits import Limits
from lumi.tokenizer.loading import load_tokenizer

TEXTS = ["The river", "", "A much longer prompt than the others, é", "The river runs"]
TALK = [
    {"role": "developer", "content": "Brief."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
]
MESSAGES = [
    Message("system", "Brief."),
    Message("user", "a"),
    Message("assistant", "b"),
    Message("user", "c\nd"),
]


class TestTokens:
    def test_greedy_text_is_that_of_generate(self, client, model, tokenizer):
        expected = expected_texts(model, tokenizer, TEXTS, max_new_tokens=30)
        assert len(set(expected)) == len(TEXTS)
        for temperature in (0, 0.00005):
            for prompt, text in zip(TEXTS, expected, strict=True):
                answer = client.completions.create(
                    model=NAME, prompt=prompt, max_tokens=30, temperature=temperature
                )
                assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
                    (text, "length")
                ]

    def test_a_batch_of_texts_or_of_ids_is_each_of_them(self, client, model, tokenizer):
        expected = expected_texts(model, tokenizer, TEXTS)
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
        for prompts in (TEXTS, ids):
            answer = client.completions.create(model=NAME, prompt=prompts, temperature=0)
            assert [choice.text for choice in answer.choices] == expected
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            assert answer.usage.prompt_tokens == sum(map(len, ids))
            assert answer.usage.completion_tokens == 4 * 16
        [choice] = client.completions.create(model=NAME, prompt=ids[0], temperature=0).choices
        assert choice.text == expected[0]

    @pytest.mark.parametrize(
        "sampling",
        [{}, {"top_p": 0.7}, {"top_k": 5, "repetition_penalty": 1.3}, {"temperature": 0.4}],
        ids=str,
    )
    def test_choices_are_rows_of_one_seed(self, sampling, client, model, tokenizer):
        ours = {"temperature": 1.0, "seed": 7} | sampling
        expected = expected_texts(model, tokenizer, [TEXTS[0]] * 3, **ours)
        assert len(set(expected)) == 3
        own = {name: sampling[name] for name in ("top_k", "repetition_penalty") if name in sampling}
        theirs = {name: value for name, value in ours.items() if name not in own}
        answer = client.completions.create(model=NAME, prompt=TEXTS[0], n=3, extra_body=own, **theirs)
        assert [choice.text for choice in answer.choices] == expected

    def test_a_batch_with_several_choices_counts_on(self, client, model, tokenizer):
        expected = [
            text
            for number, prompt in enumerate(TEXTS[:2])
            for text in expected_texts(
                model, tokenizer, [prompt] * 2, temperature=1.0, seed=2**63 - 3 + 2 * number
            )
        ]
        answer = client.completions.create(model=NAME, prompt=TEXTS[:2], n=2, seed=-3)
        assert [choice.text for choice in answer.choices] == expected

    def test_without_a_seed_each_request_has_its_own(self, client):
        texts = {client.completions.create(model=NAME, prompt="The").choices[0].text for _ in range(3)}
        assert len(texts) == 3

    def test_a_top_p_of_zero_is_greedy(self, client, model, tokenizer):
        answer = client.completions.create(model=NAME, prompt=TEXTS[0], top_p=0)
        assert [answer.choices[0].text] == expected_texts(model, tokenizer, TEXTS[:1])

    def test_a_text_ends_with_the_model_s_positions(self, client, model, tokenizer):
        prompt = [tokenizer.bos_id, *tokenizer.encode("a")] * 110
        answer = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=64)
        assert answer.usage.completion_tokens == 256 - len(prompt)
        assert [answer.choices[0].text] == expected_texts(model, tokenizer, [prompt], max_new_tokens=64)


class TestConversation:
    def test_it_goes_through_the_template(self, client, model, tokenizer):
        prompt = prompt_ids(tokenizer, MESSAGES)
        [expected] = expected_texts(
            model, tokenizer, [prompt], stop_ids=stop_ids(tokenizer), max_new_tokens=64
        )
        answer = client.chat.completions.create(model=NAME, messages=TALK, temperature=0)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.prompt_tokens == len(prompt)
        for name in ("max_tokens", "max_completion_tokens"):
            answer = client.chat.completions.create(model=NAME, messages=TALK, temperature=0, **{name: 3})
            assert answer.usage.completion_tokens == 3

    def test_templates_of_others_are_theirs(self, tmp_path):
        refusing = CHATML.replace(
            "{% for",
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for",
            1,
        )
        tokenizer = load_tokenizer(make(tmp_path, "smollm2", refusing))
        model = wanderer(tokenizer)
        prompt = prompt_ids(tokenizer, [Message("user", "a")])
        assert prompt[0] == tokenizer.control_id("<|im_start|>")
        expected = expected_texts(model, tokenizer, [prompt], stop_ids=stop_ids(tokenizer), max_new_tokens=8)
        with served(make_service(model, tokenizer)) as server, server.client() as client:
            wait_until(server.is_ready)
            asked = {"model": NAME, "max_tokens": 8, "temperature": 0}
            answer = client.chat.completions.create(messages=TALK[1:2], **asked)
            assert [answer.choices[0].message.content] == expected
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(messages=TALK, **asked)
            assert "must accept the conversation, but says: no system" in refused.value.message
            assert refused.value.body["param"] == "messages"

    def test_a_model_without_a_template_only_continues_texts(self, model, tokenizer):
        with (
            served(make_service(model, tokenizer.with_chat_template(None))) as server,
            server.client() as client,
        ):
            wait_until(server.is_ready)
            with pytest.raises(openai.BadRequestError, match="must have a chat template"):
                client.chat.completions.create(model=NAME, messages=TALK)
            assert client.completions.create(model=NAME, prompt="a").choices[0].text

    @pytest.mark.parametrize(
        ("messages", "said"),
        [
            (TALK[:3], "the user's last, got system, user, assistant"),
            ([TALK[1], TALK[1]], "got user, user"),
            ([{"role": "user", "content": "x", "reasoning_content": "y"}], "message 1 has reasoning_content"),
            ([{"role": "user", "content": "a\ud800"}], "lone surrogate U+D800 at character 1"),
        ],
        ids="order twice reasoning surrogate".split(),
    )
    def test_what_is_no_conversation_is_refused(self, messages, said, server):
        body = json.dumps({"model": NAME, "messages": messages})
        headers = {"Content-Type": "application/json"}
        answer = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "messages"


class TestUsage:
    def test_what_was_computed_before_is_counted(self, model, tokenizer):
        long = [tokenizer.bos_id] + [20 + i for i in range(3 * PAGE_SIZE)]
        with served(make_service(model, tokenizer)) as server, server.client() as client:
            wait_until(server.is_ready)
            cached = []
            for prompt in (long, long, [*long[: PAGE_SIZE + 3], 5, 5], long[:PAGE_SIZE], [long, long]):
                answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
                cached.append(answer.usage.prompt_tokens_details.cached_tokens)
                prompts = prompt if isinstance(prompt[0], list) else [prompt]
                assert [choice.text for choice in answer.choices] == expected_texts(model, tokenizer, prompts)
        # The last token of a prompt is always computed, and pages are shared whole.
        assert cached == [0, 3 * PAGE_SIZE, PAGE_SIZE, 0, 6 * PAGE_SIZE]

    def test_a_prompt_counts_once_for_all_its_choices(self, client, tokenizer):
        usage = client.completions.create(model=NAME, prompt=TEXTS[:2], n=3, max_tokens=2, seed=0).usage
        size = sum(1 + len(tokenizer.encode(text)) for text in TEXTS[:2])
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (size, 12, size + 12)


class Gate:
    """Lets a scheduler make only the steps that a test allows."""

    def __init__(self, monkeypatch, scheduler):
        self.permits, self.is_open = threading.Semaphore(0), False
        self.num_begun = 0  # steps, with the one that is held
        step = scheduler.step

        def gated():
            self.num_begun += 1
            assert self.is_open or self.permits.acquire(timeout=60)
            return step()

        monkeypatch.setattr(scheduler, "step", gated)

    def allow(self, count):
        """Let the next steps happen, and wait until the one after them is held."""
        wait_until(lambda: self.num_begun)
        end = self.num_begun + count
        self.permits.release(count)
        wait_until(lambda: self.num_begun == end)

    def open(self):
        """Let all happen."""
        self.is_open = True
        self.permits.release()


@pytest.fixture
def gated(model, tokenizer, monkeypatch):
    """Starts a server with the limits that it is given; returns it and its gate."""
    with contextlib.ExitStack() as stack:

        def start(**limits):
            server = stack.enter_context(served(make_service(model, tokenizer, Limits(**limits))))
            wait_until(server.is_ready)
            gate = Gate(monkeypatch, server.scheduler)
            stack.callback(gate.open)
            return server, gate

        yield start


class Background:
    """A request on a thread of its own: `result` is the answer or the error, once it is there."""

    def __init__(self, ask):
        self.result = None
        self.thread = threading.Thread(target=self._run, args=(ask,))
        self.thread.start()

    def _run(self, ask):
        try:
            self.result = ask()
        except Exception as error:
            self.result = error

    def wait(self):
        self.thread.join(60)
        assert self.result is not None
        return self.result


def ask(server, **options):
    """Ask for a text in the background."""
    client = server.client()
    return Background(
        lambda: client.completions.create(**{"model": NAME, "prompt": "The", "temperature": 0} | options)
    )


def send(server, **options):
    """A request on a socket of its own, which the caller closes."""
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": NAME, "prompt": TEXTS[2], "max_tokens": 200, "temperature": 0} | options
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(address)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


class TestClientsThatLeave:
    """The engine stands in a step when the client goes. It ends that step, and then the request."""

    @pytest.mark.parametrize("stream", [True, False])
    def test_what_runs_ends_after_the_step(self, stream, gated):
        server, gate = gated()
        orders = server.service._engine._inbox
        with send(server, stream=stream, n=2) as connection:
            gate.allow(3)
            if stream:
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            assert len(server.scheduler.running) == 2
        wait_until(lambda: orders.qsize() == 2)
        gate.permits.release()
        wait_until(server.is_idle)
        assert gate.num_begun == 4

    def test_what_waits_never_starts(self, gated, model, tokenizer):
        server, gate = gated(max_batch=1)
        first = ask(server, prompt=TEXTS[0], temperature=0)
        gate.allow(1)
        with send(server):
            gate.allow(1)
            wait_until(lambda: server.service._engine._inbox.qsize() == 1 or server.scheduler.waiting)
            gate.allow(1)
            assert len(server.scheduler.waiting) == 1
        wait_until(lambda: not server.service._engine._inbox.empty())
        gate.allow(1)
        wait_until(lambda: not server.scheduler.waiting)
        assert len(server.scheduler.running) == 1
        gate.open()
        assert [first.wait().choices[0].text] == expected_texts(model, tokenizer, TEXTS[:1])
        wait_until(server.is_idle)

    def test_the_page_of_one_is_the_next_one_s(self, gated):
        server, gate = gated(max_batch=2)
        gate.open()
        for _ in range(8):
            with send(server, stream=True) as connection:
                connection.recv(1)
        wait_until(server.is_idle)
        assert ask(server).wait().choices[0].text


class TestLimits:
    def test_a_full_queue_is_429(self, gated):
        server, gate = gated(max_batch=1, max_queue=2, max_choices=3)
        asked = [ask(server, n=2), ask(server)]
        wait_until(lambda: server.service._num_open == 3)
        refused = ask(server).wait()
        assert isinstance(refused, openai.RateLimitError)
        assert refused.response.headers["retry-after"] == "1"
        assert (refused.body["type"], refused.body["code"]) == ("rate_limit_error", "queue_full")
        gate.open()
        assert sorted(len(background.wait().choices) for background in asked) == [1, 2]
        wait_until(server.is_idle)
        assert ask(server, n=3).wait().choices

    def test_the_client_s_own_retry_gets_through(self, gated):
        server, gate = gated(max_batch=1, max_queue=0, max_choices=1)
        first = ask(server)
        wait_until(lambda: server.service._num_open == 1)
        second = Background(
            lambda: server.client(max_retries=20).completions.create(model=NAME, prompt="The")
        )
        time.sleep(0.1)  # at least one refusal, unless the machine is very busy
        gate.open()
        assert first.wait().choices
        assert second.wait().choices

    @pytest.mark.parametrize("stream", [True, False])
    def test_what_takes_too_long_is_504(self, stream, gated):
        server, gate = gated(request_seconds=0.01, max_batch=1)
        both = [ask(server, stream=stream, n=1), ask(server, stream=stream)]  # one runs, one waits
        wait_until(lambda: server.service._num_open == 2)
        time.sleep(0.02)
        gate.open()
        for background in both:
            late = background.wait()
            assert isinstance(late, openai.InternalServerError)
            assert late.status_code == 504
            assert late.body["code"] == "timeout"
            assert "longer than 0.01 s" in late.message
            assert late.response.headers["x-should-retry"] == "false"
        wait_until(server.is_idle)

    def test_a_stream_that_takes_too_long_ends_with_an_error(self, gated):
        server, gate = gated(request_seconds=300.0)
        got = []

        def read():
            for event in server.client().completions.create(model=NAME, prompt="a", stream=True):
                got.append(event)

        reading = Background(read)
        for count in (1, 2):
            gate.allow(1)
            wait_until(lambda count=count: len(got) == count)
        server.scheduler.running[0].request.deadline = 0.0  # as if so much time had passed
        gate.open()
        late = reading.wait()
        assert isinstance(late, openai.APIError)
        assert (late.code, late.message) == (
            "timeout",
            "the request took longer than 300 s; lower max_tokens",
        )
        wait_until(server.is_idle)

    def test_choices_of_one_request_are_limited(self, client, monkeypatch):
        monkeypatch.setattr(lumi.server.service, "text_ids", None)  # they are counted before they are read
        for options in ({"n": 17}, {"n": 6, "prompt": ["a"] * 3}, {"prompt": ["a"] * 17}):
            with pytest.raises(openai.UnprocessableEntityError) as refused:
                client.completions.create(**{"model": NAME, "prompt": "a"} | options)
            assert refused.value.body["param"] == "n"


class TestFailures:
    def test_a_failed_step_ends_what_runs_and_nothing_else(self, gated, monkeypatch, capfd, model, tokenizer):
        server, gate = gated(max_batch=1)
        hidden = server.scheduler.cache.hidden
        calls = []

        def fails_once(batch):
            calls.append(len(batch))
            if len(calls) == 2:
                raise RuntimeError("no such kernel")
            return hidden(batch)

        monkeypatch.setattr(server.scheduler.cache, "hidden", fails_once)
        first = ask(server, prompt=TEXTS[0])
        wait_until(lambda: server.service._num_open == 1)
        second = ask(server, prompt=TEXTS[2], temperature=0)
        wait_until(lambda: server.service._num_open == 2)
        gate.open()
        failed = first.wait()
        assert isinstance(failed, openai.InternalServerError)
        assert failed.status_code == 500
        assert failed.body["message"] == "the model failed: no such kernel"
        assert failed.response.headers["x-should-retry"] == "false"
        assert [second.wait().choices[0].text] == expected_texts(model, tokenizer, TEXTS[2:3])
        wait_until(server.is_idle)
        assert "RuntimeError: no such kernel" in capfd.readouterr().err

    def test_a_request_that_is_late_when_a_step_fails_is_told(self, gated, monkeypatch):
        server, gate = gated(max_batch=1)

        def fails(batch):
            raise RuntimeError("broken")

        monkeypatch.setattr(server.scheduler.cache, "hidden", fails)
        running = ask(server)
        wait_until(lambda: server.service._num_open == 1)
        server.service.limits = Limits(request_seconds=0.01)
        waiting = ask(server)
        wait_until(lambda: server.service._num_open == 2)
        time.sleep(0.02)
        gate.open()
        assert running.wait().status_code == 500
        assert waiting.wait().status_code == 504

    def test_weights_that_are_broken_are_said(self, tokenizer, capfd):
        model = wanderer(tokenizer)
        with torch.no_grad():
            model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
        with served(make_service(model, tokenizer)) as server, server.client() as client:
            wait_until(server.is_ready)
            for stream in (True, False):
                with pytest.raises(openai.InternalServerError, match="must be finite, got NaN"):
                    client.completions.create(model=NAME, prompt="a", stream=stream, logprobs=1)
        assert capfd.readouterr().err == ""  # no fault of the program

    def test_while_the_model_loads_all_is_503(self, model, tokenizer):
        may_load = threading.Event()
        service = make_service(model, tokenizer, before=lambda: may_load.wait(60))
        with served(service) as server, server.client() as client:
            try:
                for ask in (
                    lambda: client.completions.create(model=NAME, prompt="a"),
                    lambda: client.chat.completions.create(model=NAME, messages=TALK[1:2]),
                    client.models.list,
                ):
                    with pytest.raises(openai.InternalServerError) as refused:
                        ask()
                    assert (refused.value.status_code, refused.value.body["code"]) == (503, "loading")
                    assert refused.value.response.headers["retry-after"] == "1"
                health = httpx2.get(f"{server.url}/health")
                assert (health.status_code, health.json()) == (503, {"status": "loading"})
            finally:
                may_load.set()
            wait_until(server.is_ready)
            assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
            assert client.completions.create(model=NAME, prompt="a").choices
