"""Log-likelihoods against the definition (no cache, one continuation at a time) and against transformers."""

import random

import pytest
import torch
from synthetic import document

from lumi.config import UserError
from lumi.evaluation.likelihood import ScoringRequest, encode_request, score
from lumi.formats.hf_format import save_model

# Logits are float32 and below 10 in size: an ulp is 1e-6, and at most 40 tokens are summed.
ROUNDING = 1e-4


def by_definition(model, context, continuation):
    """Sum of log_softmax over the continuation, and whether argmax gives it, from one pass."""
    window = (context + continuation)[-(model.config.max_positions + 1) :]
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor([window[:-1]])))[0, -len(continuation) :]
    found = logits.double().log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)]
    return float(found.sum()), logits.argmax(-1).tolist() == continuation


def some_requests(vocab_size, seed=0, longest=60):
    """Contexts of all lengths; some continuations are one token, some are shared in their beginnings."""
    rng = random.Random(seed)
    ids = lambda count: [rng.randrange(vocab_size) for _ in range(count)]
    requests = [
        ScoringRequest(
            ids(rng.randint(1, longest)), [ids(rng.randint(1, 30)) for _ in range(rng.randint(1, 4))]
        )
        for _ in range(12)
    ]
    requests += [ScoringRequest(ids(9), [[5], [6]]), ScoringRequest([1], [ids(3), ids(1)])]
    return requests


def assert_same(got, expected):
    assert len(got) == len(expected)
    for row, wanted in zip(got, expected, strict=True):
        assert [nats for nats, _ in row] == pytest.approx([nats for nats, _ in wanted], abs=ROUNDING)
        assert [is_greedy for _, is_greedy in row] == [is_greedy for _, is_greedy in wanted]


def greedy(model, context, count):
    """What greedy decoding says after a context, one pass for each token."""
    ids = list(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(context) :]


def test_greedy_continuations_are_known(opinionated_model):
    """All tokens must be the likeliest: one other at the beginning or the end makes a difference."""
    context = [1, 9, 8]
    said = greedy(opinionated_model, context, 4)
    others = [[said[0] + 1, *said[1:]], [*said[:-1], said[-1] + 1]]
    request = ScoringRequest(context, [said, said[:1], *others, [said[0] + 1]])
    [found] = score(opinionated_model, [request], batch_tokens=100)
    assert [scored.is_greedy for scored in found] == [True, True, False, False, False]


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_it_is_the_definition_whatever_the_batch(opinionated_model, batch_tokens):
    model = opinionated_model
    requests = some_requests(model.config.vocab_size)
    expected = [
        [by_definition(model, context, ids) for ids in continuations] for context, continuations in requests
    ]
    done = []
    assert_same(score(model, requests, batch_tokens=batch_tokens, on_done=done.append), expected)
    assert sum(done) == sum(len(continuations) for _, continuations in requests)


def test_one_token_choices_take_one_pass(opinionated_model, monkeypatch):
    passes = []
    real = opinionated_model.hidden
    monkeypatch.setattr(
        opinionated_model, "hidden", lambda *a, **k: passes.append(a[0].shape) or real(*a, **k)
    )
    score(
        opinionated_model,
        [ScoringRequest([1, 9, 8], [[5], [6]]), ScoringRequest([1, 7], [[5], [6]])],
        batch_tokens=100,
    )
    assert passes == [(2, 3)]
    score(opinionated_model, [ScoringRequest([1, 9, 8], [[5, 4, 3], [6, 2]])], batch_tokens=100)
    assert passes[1:] == [
        (1, 3),
        (2, 2),
    ]  # the context once, then the rest of both continuations without their last tokens


def test_long_contexts_are_cut_from_the_left(opinionated_model):
    positions = opinionated_model.config.max_positions
    rng = random.Random(1)
    context = [rng.randrange(384) for _ in range(positions + 20)]
    continuations = [[rng.randrange(384) for _ in range(count)] for count in (1, 2, 30, positions)]
    fitting = ScoringRequest(context[: positions - 1], [[3, 4]])  # exactly full
    got = score(opinionated_model, [ScoringRequest(context, continuations), fitting], batch_tokens=200)
    expected = [[by_definition(opinionated_model, context, ids) for ids in continuations]]
    expected += [[by_definition(opinionated_model, fitting.context, [3, 4])]]
    assert_same(got, expected)
    lost = score(opinionated_model, [ScoringRequest([5, 6, *context[2:]], continuations)], batch_tokens=200)
    assert_same(lost, expected[:1])  # what was cut off makes no difference
    with pytest.raises(
        UserError,
        match=f"a continuation must be at most as long as the model's {positions} positions,"
        f" got {positions + 1}",
    ):
        score(opinionated_model, [ScoringRequest([1], [[3] * (positions + 1)])], batch_tokens=200)


def test_it_is_what_transformers_says(opinionated_model, tokenizer, tmp_path):
    from transformers import LlamaForCausalLM

    save_model(tmp_path / "model", opinionated_model, tokenizer)
    judge = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    requests = [
        encode_request(tokenizer, document(i)[:60], [" " + document(i + j)[:25] for j in (1, 2, 3)])
        for i in range(8)
    ]
    got = score(opinionated_model, requests, batch_tokens=300)
    for (context, continuations), scores in zip(requests, got, strict=True):
        expected = []
        for ids in continuations:
            with torch.no_grad():
                logits = judge(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
            expected.append(
                float(logits.double().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())
            )
        nats = [scored.nats for scored in scores]
        assert nats == pytest.approx(expected, abs=ROUNDING)
        assert max(range(3), key=expected.__getitem__) == max(range(3), key=nats.__getitem__)


def test_white_space_at_the_end_goes_to_the_continuation(tokenizer):
    request = encode_request(tokenizer, "The river \n", ["opens", " stone"])
    assert request.context == [tokenizer.bos_id, *tokenizer.encode("The river")]
    assert [tokenizer.decode(ids) for ids in request.continuations] == [" \nopens", " \n stone"]
    whole = tokenizer.encode("The river \nopens")
    assert request.context[1:] + request.continuations[0] == whole


def test_nothing_is_lost_where_a_token_reaches_over_the_boundary(tokenizer):
    context, continuation = "The riv", "er opens"
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    assert whole[: len(alone)] != alone
    request = encode_request(tokenizer, context, [continuation])
    assert request.context[1:] == alone
    assert tokenizer.decode(request.continuations[0]) == continuation


def test_an_empty_context_is_bos_alone(tokenizer):
    assert encode_request(tokenizer, "", ["The river"]) == ScoringRequest(
        [tokenizer.bos_id], [tokenizer.encode("The river")]
    )
    assert encode_request(tokenizer, " \n", ["x"]).context == [tokenizer.bos_id]
    with pytest.raises(UserError, match="a continuation must hold at least one token, got ''"):
        encode_request(tokenizer, "The river", [""])


def test_a_broken_model_is_refused(opinionated_model):
    import copy

    broken = copy.deepcopy(opinionated_model)
    with torch.no_grad():
        broken.final_norm.weight[3] = float("nan")
    for continuations in ([[5]], [[5, 6]]):
        with pytest.raises(UserError, match="the model's output must be finite, got NaN or infinity"):
            score(broken, [ScoringRequest([1, 2], continuations)], batch_tokens=10)
