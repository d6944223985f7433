"""Many clients at once, some of which leave in the middle: each gets the answer to its own question."""

import contextlib
import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import NAME, expected_ids, log_probabilities, make_service, served, wait_until

from lumi.inference.scheduler import Request
from lumi.server.limits import Limits

NUM_CLIENTS = 32
LENGTH = 40  # tokens of an answer at most
CLEAR = 1e-3  # nats between the two likeliest tokens: rounding does not change which one is chosen


def questions(model, tokenizer, count=16):
    """Prompts, many with the same beginning, and the greedy ids that each gets alone."""
    generator, found = random.Random(0), {}
    beginning = [tokenizer.bos_id, *(generator.randrange(10, 380) for _ in range(60))]
    while len(found) < count:
        tail = [generator.randrange(10, 380) for _ in range(generator.randrange(1, 40))]
        prompt = [*beginning[: generator.choice([1, 1, 20, 40, 61])], *tail]
        [ids] = expected_ids(model, tokenizer, [prompt], max_new_tokens=LENGTH)
        best = log_probabilities(model, tokenizer, [*prompt, *ids])[len(prompt) - 1 : -1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > CLEAR:
            found[tuple(prompt)] = ids
    return [(list(prompt), ids) for prompt, ids in found.items()]


class Visitor:
    """A client that asks, and leaves some of its questions before they are answered."""

    def __init__(self, server, tokenizer, asked, number):
        self.server, self.tokenizer, self.asked = server, tokenizer, asked
        self.generator = random.Random(number)
        self.client = server.client()
        self.num_answered = self.num_left = 0

    def visit(self, end):
        """Ask until the time `end`."""
        while time.monotonic() < end:
            prompt, ids = self.generator.choice(self.asked)
            length = self.generator.randrange(1, LENGTH + 1)
            text = self.tokenizer.decode(ids[:length], continues=True)
            options = {"model": NAME, "prompt": prompt, "max_tokens": length, "temperature": 0}
            kind = self.generator.choice(["whole", "stream", "leave", "several"])
            if kind == "whole":
                answer = self.client.completions.create(**options)
                assert [choice.text for choice in answer.choices] == [text]
                assert answer.usage.completion_tokens == length
            elif kind == "several":
                answer = self.client.completions.create(n=2, **options)
                assert [choice.text for choice in answer.choices] == [text] * 2
            else:
                self._stream(options, text, leaves=kind == "leave")
            self.num_answered += kind != "leave"

    def _stream(self, options, text, leaves):
        got, patience = "", self.generator.randrange(4)
        with contextlib.closing(self.client.completions.create(stream=True, **options)) as stream:
            for number, event in enumerate(stream):
                got += event.choices[0].text
                if leaves and number == patience:
                    break
        assert text.startswith(got) if leaves else got == text
        self.num_left += leaves


def resident_bytes():
    """What the process holds of the machine's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("seconds", [0.5, pytest.param(40, marks=pytest.mark.soak)])
def test_each_gets_its_own_answer_and_nothing_stays(seconds, model, tokenizer):
    asked = questions(model, tokenizer)
    # Few pages: requests wait for room, and what is known of prompts makes way.
    with served(make_service(model, tokenizer, Limits(max_batch=8), num_pages=40)) as server:
        wait_until(server.is_ready)
        visitors = [Visitor(server, tokenizer, asked, number) for number in range(NUM_CLIENTS)]
        sizes = [resident_bytes()]
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            for _ in range(3):
                end = time.monotonic() + seconds
                for done in [pool.submit(visitor.visit, end) for visitor in visitors]:
                    done.result(timeout=120)
                wait_until(server.is_idle)
                gc.collect()
                sizes.append(resident_bytes())
        answered = sum(visitor.num_answered for visitor in visitors)
        left = sum(visitor.num_left for visitor in visitors)
        print(f"{answered} answered, {left} left, {[size >> 20 for size in sizes]} MiB")
        assert answered > NUM_CLIENTS
        assert left > NUM_CLIENTS / 2
        pages = server.scheduler.pages
        assert sorted([*pages._unused, *pages._idle]) == list(range(40))
        assert not pages._holders
        # The engine's frame still holds the news of its last step.
        assert sum(type(thing) is Request for thing in gc.get_objects()) <= 8
        warmed_up, first = sizes[1], max(sizes[1] - sizes[0], 4 << 20)
        assert sizes[-1] <= warmed_up + first
        prompt, ids = asked[0]
        [choice] = (
            server.client()
            .completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=LENGTH)
            .choices
        )
        assert choice.text == tokenizer.decode(ids, continues=True)
