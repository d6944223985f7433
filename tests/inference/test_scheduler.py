import random
import time

import pytest
import torch
from crafted_models import speller, wanderer

from lumi.config import UserError
from lumi.evaluation.likelihood import log_probabilities_of
from lumi.inference.generation import SamplingConfig, filler_id, generate_ids
from lumi.inference.pages import PAGE_SIZE
from lumi.inference.scheduler import PROMPT_TOKENS, Finish, Request, Scheduler
from lumi.kernels.bundle import NATIVE, REFERENCE


def greedy(count):
    return SamplingConfig(max_new_tokens=count, temperature=0.0)


def prompts_of(tokenizer, count, seed=0, longest=60):
    draw = random.Random(seed)
    return [
        [tokenizer.bos_id, *draw.choices(range(262, tokenizer.vocab_size), k=draw.randrange(1, longest))]
        for _ in range(count)
    ]


def run(scheduler, requests, starts=None):
    """Run requests that come at the given steps; returns ids, text and finish of each."""
    got = {id(request): ([], "", None) for request in requests}
    coming = sorted(zip(starts or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while coming or scheduler.has_work:
        while coming and coming[0][0] <= step:
            scheduler.add(coming.pop(0)[1])
        for request, delta in scheduler.step():
            ids, text, finish = got[id(request)]
            assert finish is None
            new = [scored.token for scored in delta.tokens]
            got[id(request)] = ([*ids, *new], text + delta.text, delta.finish)
        step += 1
    assert scheduler.pages.num_held == 0
    return [got[id(request)] for request in requests]


@pytest.fixture(scope="module")
def model(tokenizer):
    return wanderer(tokenizer)


def build(model, tokenizer, max_batch=16, num_pages=200):
    return Scheduler(model, tokenizer, max_batch=max_batch, num_pages=num_pages)


@pytest.mark.parametrize("ops", [REFERENCE, NATIVE], ids=lambda ops: ops.name)
@pytest.mark.parametrize("seed", range(3))
def test_a_request_gets_what_it_gets_alone(tokenizer, ops, seed):
    """16 greedy requests that start at random moments, in less room than all of them need."""
    model = wanderer(tokenizer)
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    prompts = prompts_of(tokenizer, 16, seed)
    stop = frozenset(tokenizer.eos_ids)
    alone = [
        generate_ids(model, [prompt], greedy(30), stop_ids=stop, pad_id=filler_id(tokenizer))[0].ids
        for prompt in prompts
    ]
    assert len({tuple(ids) for ids in alone}) > 8
    starts = random.Random(seed).choices(range(60), k=16)
    requests = [Request(prompt=prompt, sampling=greedy(30), stop_ids=stop) for prompt in prompts]
    found = run(build(model, tokenizer, max_batch=7, num_pages=30), requests, starts)
    assert [ids for ids, _, _ in found] == alone
    assert [text for _, text, _ in found] == [tokenizer.decode(ids, continues=True) for ids in alone]


def test_a_seed_gives_what_it_gives_alone_beside_other_settings(model, tokenizer):
    prompts = prompts_of(tokenizer, 6)
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.3, "top_k": 5, "seed": 4},
        {"temperature": 1.0, "top_p": 0.6, "seed": 5},
        {"temperature": 1.0, "repetition_penalty": 1.7, "seed": 6},
        {"temperature": 0.0, "repetition_penalty": 1.7},
    ]
    configs = [SamplingConfig(max_new_tokens=25, **setting) for setting in settings]
    options = {"stop_ids": frozenset(), "pad_id": filler_id(tokenizer)}
    alone = [
        generate_ids(model, [prompt], config, **options)[0].ids
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    requests = [
        Request(prompt=prompt, sampling=config, stop_ids=frozenset())
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    assert [ids for ids, _, _ in run(build(model, tokenizer), requests)] == alone


def test_long_prompts_come_in_pieces_and_hold_nobody_up(tokenizer):
    model = wanderer(tokenizer, max_positions=1024)
    scheduler = build(model, tokenizer)
    [long] = prompts_of(tokenizer, 1, longest=2)
    long = long * 250
    running = Request(prompt=[1, 300], sampling=greedy(20), stop_ids=frozenset())
    scheduler.add(running)
    scheduler.step()
    late = Request(prompt=long, sampling=greedy(5), stop_ids=frozenset())
    scheduler.add(late)
    news = [scheduler.step() for _ in range(-(-len(long) // PROMPT_TOKENS))]
    assert all(running in [request for request, _ in step] for step in news)
    assert [late in [request for request, _ in step] for step in news] == [False] * (len(news) - 1) + [True]


def test_a_conversation_computes_its_beginning_once(model, tokenizer):
    scheduler, [prompt] = build(model, tokenizer), prompts_of(tokenizer, 1, seed=3)
    prompt = (prompt * 60)[:50]
    first = Request(prompt=prompt, sampling=greedy(30), stop_ids=frozenset())
    [(answer, *_)] = run(scheduler, [first])
    computed = []
    hidden = scheduler.cache.hidden
    scheduler.cache.hidden = lambda batch: (
        computed.append(sum(len(new.ids) for new in batch)) or hidden(batch)
    )
    following = [*prompt, *answer, 300, 301]
    second = Request(prompt=following, sampling=greedy(10), stop_ids=frozenset())
    [(found, *_)] = run(scheduler, [second])
    known = (len(prompt) + len(answer) - 1) // PAGE_SIZE * PAGE_SIZE  # the last token was never computed
    assert second.num_shared == known == 64
    assert sum(computed) == len(following) - known + 9
    options = {"stop_ids": frozenset(), "pad_id": filler_id(tokenizer)}
    assert found == generate_ids(model, [following], greedy(10), **options)[0].ids


def test_ends(tokenizer):
    """A stop token, a stop string, the limit, and the model's positions."""
    ids = tokenizer.encode("abcdefgh")
    following = dict(zip(ids, [*ids[1:], tokenizer.eos_id], strict=True))
    model = speller(tokenizer, {None: ids[0], **following}, max_positions=len(ids))
    scheduler = build(model, tokenizer)
    ends = frozenset(tokenizer.eos_ids)

    def ask(count, start=1, **options):
        prompt = [tokenizer.bos_id] * start
        request = Request(prompt=prompt, sampling=greedy(count), stop_ids=ends, **options)
        [found] = run(scheduler, [request])
        return found

    text = tokenizer.decode(ids, continues=True)
    assert len(ids) > 3
    whole = speller(tokenizer, {None: ids[0], **following}, max_positions=64)
    [(got, said, finish)] = run(
        build(whole, tokenizer), [Request(prompt=[1], sampling=greedy(60), stop_ids=ends)]
    )
    assert (got, said, finish) == (ids, text, Finish.STOP)
    assert ask(2) == (ids[:2], tokenizer.decode(ids[:2], continues=True), Finish.LENGTH)
    assert ask(60)[0] == ids[:-1]  # the prompt's token takes a position
    assert ask(60)[2] is Finish.LENGTH
    assert ask(60, stops=["c"])[1:] == ("ab", Finish.STOP)
    assert ask(60, only_prompt=True) == ([], "", Finish.LENGTH)


def test_what_cannot_run_is_refused(model, tokenizer):
    scheduler = build(model, tokenizer, num_pages=4)
    assert scheduler.max_tokens == 64 < model.config.max_positions
    for prompt, message in (
        ([], "at least one token"),
        ([1] * 64, "shorter than the cache's 64 tokens, got 64 tokens; .* more --cache-tokens"),
    ):
        with pytest.raises(UserError, match=message):
            scheduler.add(Request(prompt=prompt, sampling=greedy(1), stop_ids=frozenset()))
    assert not scheduler.has_work


def test_scores_are_the_models_own(model, tokenizer):
    """Of temperature 1, before the penalty; the prompt's, too, which comes in pieces and is not shared."""
    scheduler = build(model, tokenizer)
    [prompt] = prompts_of(tokenizer, 1, seed=5)
    prompt = (prompt * 200)[: PROMPT_TOKENS + 20]
    run(scheduler, [Request(prompt=prompt, sampling=greedy(2), stop_ids=frozenset())])
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.5, repetition_penalty=2.0)
    request = Request(prompt=prompt, sampling=sampling, stop_ids=frozenset(), num_top=3, scores_prompt=True)
    scheduler.add(request)
    deltas = []
    while scheduler.has_work:
        deltas += [delta for _, delta in scheduler.step()]
    assert request.num_shared == 0
    scored = [*deltas[0].prompt, *(scored for delta in deltas for scored in delta.tokens)]
    assert all(delta.prompt is None for delta in deltas[1:])
    ids = torch.tensor([scored.token for scored in scored])
    assert len(ids) == len(prompt) + 12
    assert ids[: len(prompt)].tolist() == prompt
    with torch.no_grad():
        hidden = model.hidden(ids[None])[0, :-1]
        expected = log_probabilities_of(model, hidden, ids[1:])
        logs = model.logits(hidden).log_softmax(-1)
    assert scored[0] == (prompt[0], None, [])
    found = torch.tensor([scored.log_probability for scored in scored[1:]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for row, (_, _, top) in zip(logs, scored[1:], strict=True):
        best = row.topk(3)
        assert [token for token, _ in top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([log for _, log in top]), best.values, rtol=1e-5, atol=1e-5)


def test_cancelling_ends_a_request_before_the_next_step(model, tokenizer):
    scheduler = build(model, tokenizer, max_batch=2)
    requests = [Request(prompt=[1, 300 + n], sampling=greedy(50), stop_ids=frozenset()) for n in range(3)]
    for request in requests:
        scheduler.add(request)
    assert [request for request, _ in scheduler.step()] == requests[:2]
    scheduler.cancel(requests[0])  # runs
    scheduler.cancel(requests[0])
    assert [request for request, _ in scheduler.step()] == requests[1:]
    late = Request(prompt=[1], sampling=greedy(5), stop_ids=frozenset())
    scheduler.add(late)
    scheduler.cancel(late)  # waits
    assert {request for request, _ in scheduler.step()} == set(requests[1:])
    for request in requests[1:]:
        scheduler.cancel(request)
    assert not scheduler.has_work
    assert scheduler.pages.num_held == 0


def test_a_large_request_is_not_overtaken(model, tokenizer):
    scheduler = build(model, tokenizer, num_pages=6)
    small, large, last = (
        Request(prompt=[1] * count, sampling=greedy(30), stop_ids=frozenset()) for count in (2, 50, 2)
    )
    for request in (small, large, last):
        scheduler.add(request)
    order = []
    while scheduler.has_work:
        order += [request for request, delta in scheduler.step() if delta.finish]
    assert order == [small, large, last]


def test_the_time_of_a_request_is_limited(model, tokenizer):
    scheduler = build(model, tokenizer, max_batch=1)
    now = time.monotonic()
    first, second = (
        Request(prompt=[1, 300], sampling=greedy(50), stop_ids=frozenset(), deadline=now + seconds)
        for seconds in (1000, -1)
    )
    scheduler.add(first)
    scheduler.add(second)
    assert [(request, delta.finish) for request, delta in scheduler.step()] == [(second, Finish.TIMEOUT)]
    while not (news := scheduler.step()):
        pass
    assert [(request, delta.finish) for request, delta in news] == [(first, None)]
    first.deadline = now - 1
    assert [(request, delta.finish) for request, delta in scheduler.step()] == [(first, Finish.TIMEOUT)]
    assert not scheduler.has_work


def test_a_broken_model_fails_its_requests_alone(tokenizer):
    model = wanderer(tokenizer)
    scheduler = build(model, tokenizer, max_batch=1)
    requests = [Request(prompt=[1, 300], sampling=greedy(3), stop_ids=frozenset()) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    scale = model.final_norm.weight
    before = scale.detach().clone()
    scale.data.fill_(float("nan"))
    with pytest.raises(UserError, match="finite"):
        scheduler.step()
    assert [(request, delta.finish, delta.error) for request, delta in scheduler.fail("broken")] == [
        (requests[0], Finish.ERROR, "broken")
    ]
    scale.data.copy_(before)
    finishes = []
    while scheduler.has_work:
        finishes += [(request, delta.finish) for request, delta in scheduler.step() if delta.finish]
    assert finishes == [(requests[1], Finish.LENGTH)]
