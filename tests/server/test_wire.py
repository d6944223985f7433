"""Responses and streams: text, log-probabilities, echo, stop strings and whole characters."""

import asyncio
import contextlib
import json

import httpx2
import openai
import pytest
from crafted_models import speller, wanderer
from llama_2_tokenizers import CONFIG, train_model
from served import (
    NAME,
    expected_ids,
    expected_texts,
    log_probabilities,
    make_service,
    served,
    wait_until,
)

from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.evaluation.likelihood import encode_request, score
from lumi.tokenizer.loading import load_tokenizer

PROMPT = "The river runs"
ASKED = [{"role": "user", "content": "a"}]


@contextlib.contextmanager
def speaking(tokenizer, text):
    """A client of a model that says `text` for ever, one token of one byte after the other."""
    ids = [find(tokenizer, byte) for byte in text.encode()]
    following = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    assert len(following) == len(ids), "each byte must stand once"
    model = speller(tokenizer, following | {None: ids[0]})
    with served(make_service(model, tokenizer)) as server, server.client() as client:
        wait_until(server.is_ready)
        yield client


def find(tokenizer, byte):
    """The token of a single byte."""
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.piece_bytes(i) == bytes([byte]))


def read(stream):
    """The texts and the finish reasons of a stream's events, by choice."""
    texts, reasons = {}, {}
    for event in stream:
        for choice in event.choices:
            text = choice.text if event.object == "text_completion" else choice.delta.content
            texts.setdefault(choice.index, []).append(text)
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    return texts, reasons


class TestStreams:
    def test_a_stream_of_choices_is_the_whole_response(self, client):
        for ask, options in (
            (client.completions.create, {"prompt": [PROMPT, "a"]}),
            (client.chat.completions.create, {"messages": ASKED}),
        ):
            options |= {"model": NAME, "seed": 3, "n": 2, "max_tokens": 20}
            whole = ask(**options)
            texts, reasons = read(ask(stream=True, **options))
            got = [getattr(choice, "text", None) or choice.message.content for choice in whole.choices]
            assert ["".join(texts[index]) for index in range(len(got))] == got
            assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}

    def test_the_async_client_streams_with_usage(self, server, model, tokenizer):
        prompt = prompt_ids(tokenizer, [Message("user", "a")])
        [expected] = expected_texts(
            model, tokenizer, [prompt], stop_ids=stop_ids(tokenizer), max_new_tokens=9
        )

        async def main():
            async with server.client(openai.AsyncOpenAI) as client:
                stream = await client.chat.completions.create(
                    model=NAME,
                    messages=ASKED,
                    temperature=0,
                    max_tokens=9,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                return [event async for event in stream]

        *events, last = asyncio.run(main())
        assert "".join(event.choices[0].delta.content for event in events) == expected
        assert [event.choices[0].delta.role for event in events] == ["assistant", *[None] * (len(events) - 1)]
        assert {event.id for event in events} == {last.id}
        assert all(event.usage is None for event in events)
        assert last.choices == []
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 9)

    def test_the_events_are_those_of_the_api(self, server):
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 3, "stream": True, "temperature": 0}
        answer = httpx2.post(f"{server.url}/v1/completions", json=body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        *events, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        data = [json.loads(event.removeprefix("data: ")) for event in events]
        assert data[-1]["choices"][0]["finish_reason"] == "length"
        assert all(event["object"] == "text_completion" for event in data)

    def test_characters_of_several_bytes_come_whole(self, tokenizer):
        with speaking(tokenizer, "aé漢🎉") as client:
            options = {"model": NAME, "prompt": "x", "temperature": 0, "max_tokens": 12}
            texts, _ = read(client.completions.create(stream=True, **options))
            assert "".join(texts[0]) == "aé漢🎉a�"
            assert "�" not in "".join(texts[0][:-1])
            assert client.completions.create(**options).choices[0].text == "aé漢🎉a�"


class TestStopStrings:
    @pytest.mark.parametrize(
        ("stop", "text", "reason"),
        [
            ("cd", "ab", "stop"),
            ("bcdefg", "a", "stop"),
            (["zz", "fg", "ef"], "abcd", "stop"),
            (["cdx", "gh"], "abcdef", "stop"),
            ("a", "", "stop"),
            ("hé", "abcdefg", "stop"),
            ("é", "abcdefgh", "stop"),
            ("xyz", "abcdefghéab", "length"),
            ("abx", "abcdefghéab", "length"),
            ([], "abcdefghéab", "length"),
        ],
        ids=str,
    )
    def test_they_are_cut_out_also_across_tokens(self, stop, text, reason, tokenizer):
        with speaking(tokenizer, "abcdefghé") as client:
            options = {"model": NAME, "prompt": "x", "temperature": 0, "max_tokens": 12, "stop": stop}
            [choice] = client.completions.create(**options).choices
            assert (choice.text, choice.finish_reason) == (text, reason)
            texts, reasons = read(client.completions.create(stream=True, **options))
            assert ("".join(texts[0]), reasons[0]) == (text, reason)

    def test_a_stop_token_ends_an_answer_and_does_not_count(self, tokenizer):
        for ends, ask in ((stop_ids(tokenizer), "chat"), ({tokenizer.eos_id}, "text")):
            for end in ends:
                first = find(tokenizer, ord("a"))
                model = speller(tokenizer, {None: first, first: end})
                with served(make_service(model, tokenizer)) as server, server.client() as client:
                    wait_until(server.is_ready)
                    if ask == "chat":
                        answer = client.chat.completions.create(model=NAME, messages=ASKED, stop="ab")
                        text = answer.choices[0].message.content
                    else:
                        answer = client.completions.create(model=NAME, prompt="x", stop="ab")
                        text = answer.choices[0].text
                assert (text, answer.choices[0].finish_reason) == ("a", "stop")
                assert answer.usage.completion_tokens == 1


def close(values):
    """To the rounding of two float32 passes in different order."""
    return pytest.approx(values, abs=2e-4)


class TestLogProbabilities:
    @pytest.mark.parametrize(
        "sampling", [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9, "seed": 1}], ids=str
    )
    def test_of_texts(self, sampling, client, model, tokenizer):
        prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
        [ids] = expected_ids(model, tokenizer, [prompt], **sampling)
        [choice] = client.completions.create(model=NAME, prompt=PROMPT, logprobs=3, **sampling).choices
        logs_TV = log_probabilities(model, tokenizer, [*prompt, *ids])[len(prompt) - 1 : -1]
        found = choice.logprobs
        assert found.token_logprobs == close(logs_TV[range(len(ids)), ids].tolist())
        assert found.tokens == [tokenizer.piece_bytes(i).decode(errors="replace") for i in ids]
        assert len(found.text_offset) == len(ids)
        if not sampling["temperature"]:  # ASCII alone
            rests = ["".join(found.tokens[i:]) for i in range(len(ids))]
            assert [choice.text[start:] for start in found.text_offset] == rests
        for row, top in enumerate(found.top_logprobs):
            assert list(top.values()) == close(logs_TV[row].topk(3).values.tolist())
        assert len(found.top_logprobs) == len(ids)

    def test_of_conversations(self, client, model, tokenizer):
        prompt = prompt_ids(tokenizer, [Message("user", "a")])
        [ids] = expected_ids(model, tokenizer, [prompt], stop_ids=stop_ids(tokenizer), max_new_tokens=7)
        options = {"model": NAME, "messages": ASKED, "temperature": 0, "max_tokens": 7, "logprobs": True}
        [choice] = client.chat.completions.create(top_logprobs=2, **options).choices
        logs_TV = log_probabilities(model, tokenizer, [*prompt, *ids])[len(prompt) - 1 : -1]
        content = choice.logprobs.content
        assert [bytes(token.bytes) for token in content] == list(map(tokenizer.piece_bytes, ids))
        assert [token.logprob for token in content] == close(logs_TV[range(len(ids)), ids].tolist())
        for row, token in enumerate(content):
            values, best = logs_TV[row].topk(2)
            assert [top.logprob for top in token.top_logprobs] == close(values.tolist())
            assert [bytes(top.bytes) for top in token.top_logprobs] == [
                tokenizer.piece_bytes(i) for i in best.tolist()
            ]
        [choice] = client.chat.completions.create(**options).choices
        assert [token.top_logprobs for token in choice.logprobs.content] == [[]] * 7

    def test_a_stream_has_those_of_its_text(self, client):
        options = {"model": NAME, "seed": 5, "max_tokens": 12}
        whole = client.chat.completions.create(messages=ASKED, logprobs=True, **options).choices[0]
        events = client.chat.completions.create(messages=ASKED, logprobs=True, stream=True, **options)
        content = [token for event in events for token in event.choices[0].logprobs.content]
        assert [token.token for token in content] == [token.token for token in whole.logprobs.content]
        assert [t.logprob for t in content] == close([t.logprob for t in whole.logprobs.content])
        whole = client.completions.create(prompt=PROMPT, logprobs=0, echo=True, **options).choices[0].logprobs
        events = list(client.completions.create(prompt=PROMPT, logprobs=0, echo=True, stream=True, **options))
        for name in ("tokens", "text_offset"):
            got = [value for event in events for value in getattr(event.choices[0].logprobs, name)]
            assert got == getattr(whole, name)


class TestEcho:
    def test_a_scored_text_is_that_of_the_evaluation(self, client, model, tokenizer):
        context, continuations = "The river", [" runs down to the sea", " é", " runs"]
        request = encode_request(tokenizer, context, continuations)
        [expected] = score(model, [request], batch_tokens=4096)
        prompts = [[*request.context, *ids] for ids in request.continuations]
        answer = client.completions.create(model=NAME, prompt=prompts, max_tokens=0, echo=True, logprobs=0)
        found = [choice.logprobs.token_logprobs for choice in answer.choices]
        assert [sum(logs[len(request.context) :]) for logs in found] == close(
            [scored.nats for scored in expected]
        )
        assert [logs[0] for logs in found] == [None] * 3
        assert [choice.text for choice in answer.choices] == [context + text for text in continuations]
        assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
        assert answer.usage.completion_tokens == 0

    @pytest.mark.parametrize("num_words", [1, 300])
    def test_a_long_text_is_scored_in_pieces(self, num_words, client, model, tokenizer):
        prompt = [tokenizer.bos_id, *tokenizer.encode("a river runs " * 100)][:num_words][:255]
        for _ in range(2):  # what the cache holds of it changes nothing
            [choice] = client.completions.create(
                model=NAME, prompt=prompt, max_tokens=0, echo=True, logprobs=1
            ).choices
            logs_TV = log_probabilities(model, tokenizer, prompt)
            assert choice.logprobs.token_logprobs[1:] == close(
                logs_TV[range(len(prompt) - 1), prompt[1:]].tolist()
            )
            assert [list(top.values()) for top in choice.logprobs.top_logprobs[1:]] == [
                close([value]) for value in logs_TV[:-1].max(dim=-1).values.tolist()
            ]

    def test_prompt_and_text_stand_together(self, client, model, tokenizer):
        ids = [tokenizer.bos_id, *tokenizer.encode("é")]
        for prompt, text in ((PROMPT, PROMPT), (ids, "é"), ("", "")):
            [expected] = expected_texts(model, tokenizer, [prompt], max_new_tokens=5)
            options = {"model": NAME, "prompt": prompt, "max_tokens": 5, "temperature": 0, "echo": True}
            assert client.completions.create(n=2, **options).choices[1].text == text + expected
            texts, _ = read(client.completions.create(stream=True, **options))
            assert "".join(texts[0]) == text + expected
            [choice] = client.completions.create(logprobs=0, **options).choices
            assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
            assert choice.text.endswith("".join(choice.logprobs.tokens[-5:]))
            assert choice.logprobs.text_offset[-5] == len(text)

    def test_a_space_of_the_tokenizer_s_own_is_no_text(self, tmp_path):
        folder = train_model(tmp_path)
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
        tokenizer = load_tokenizer(folder)
        with served(make_service(wanderer(tokenizer), tokenizer)) as server, server.client() as client:
            wait_until(server.is_ready)
            for prompt in (PROMPT, [tokenizer.bos_id, *tokenizer.encode(PROMPT)]):
                options = {"model": NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0}
                [choice] = client.completions.create(echo=True, logprobs=0, **options).choices
                assert choice.text.startswith(PROMPT)
                assert choice.logprobs.text_offset[-4] == len(PROMPT)
                assert choice.text[len(PROMPT) :] == client.completions.create(**options).choices[0].text
