"""Perplexity against a slow loop that computes every token by itself, and its windows by hand."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lumi.config import UserError, from_dict
from lumi.corpus import JsonlFiles, TextFiles
from lumi.evaluation.perplexity import (
    ScoredDocument,
    TextConfig,
    WindowConfig,
    count_words,
    perplexity,
    rolling_windows,
    store_documents,
    text_documents,
)


def make_document(length, seed=0, scored=None):
    rng = random.Random(seed)
    tokens = np.array([1] + [rng.randrange(6, 384) for _ in range(length)])
    marks = np.arange(length + 1) > 0 if scored is None else np.array(scored)
    return ScoredDocument(tokens, marks, words=7, bytes=40)


def log_probability(model, context, token):
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.from_numpy(context)[None]))[0, -1]
    return float(logits.double().log_softmax(-1)[token])


def windows_of(document, window, stride):
    """(first input, number of inputs, counted targets), by their places in the document."""
    found = []
    for part in rolling_windows(document, window, stride):
        first = document.tokens.tolist().index(part.inputs[0])
        assert part.inputs.tolist() == document.tokens[first : first + len(part.inputs)].tolist()
        assert part.targets.tolist() == document.tokens[first + 1 : first + 1 + len(part.inputs)].tolist()
        found.append((first, len(part.inputs), [first + 1 + int(i) for i in np.flatnonzero(part.scored)]))
    return found


def test_windows_by_hand():
    document = ScoredDocument(np.arange(100, 108), np.arange(8) > 0, 0, 0)  # BOS and seven tokens
    # As long as the window: the last one reaches back, so that a full window stands before its two tokens.
    assert windows_of(document, 5, 5) == [(0, 5, [1, 2, 3, 4, 5]), (2, 5, [6, 7])]
    assert windows_of(document, 4, 2) == [(0, 4, [1, 2, 3, 4]), (2, 4, [5, 6]), (3, 4, [7])]
    assert windows_of(document, 4, 1) == [(0, 4, [1, 2, 3, 4]), (1, 4, [5]), (2, 4, [6]), (3, 4, [7])]
    assert windows_of(document, 7, 7) == windows_of(document, 100, 30) == [(0, 7, [1, 2, 3, 4, 5, 6, 7])]
    answers = document._replace(scored=np.isin(np.arange(8), [2, 7]))
    assert windows_of(answers, 2, 2) == [
        (0, 2, [2]),
        (5, 2, [7]),
    ]  # windows without a counted token are not run


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, None), (16, 1), (16, 5)])
def test_it_is_the_slow_loop(opinionated_model, window, stride):
    documents = [make_document(count, seed) for seed, count in enumerate((1, 15, 16, 17, 40, 130))]
    size = window or opinionated_model.config.max_positions
    step = stride or size
    nats = 0.0
    for document in documents:
        last = len(document.tokens) - 1
        for place in range(1, last + 1):
            end = size  # of the window that predicts the token
            while end < place:
                end += step
            before = document.tokens[max(0, min(end, last) - size) : place]
            nats -= log_probability(opinionated_model, before, document.tokens[place])
    count = sum(len(document.tokens) - 1 for document in documents)
    config = WindowConfig(window_tokens=window, stride_tokens=stride)
    for batch_tokens in (1, 64, 4096):
        result = perplexity(opinionated_model, iter(documents), config, batch_tokens=batch_tokens)
        assert (result.tokens, result.words, result.bytes, result.documents) == (count, 6 * 7, 6 * 40, 6)
        assert (result.window_tokens, result.stride_tokens) == (size, step)
        assert result.nats == pytest.approx(nats, rel=1e-6)
        assert result.token_perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 240, rel=1e-6)
        assert result.byte_perplexity == pytest.approx(2**result.bits_per_byte)
        assert result.word_perplexity == pytest.approx(math.exp(nats / 42), rel=1e-4)


def test_trained_tokens_alone_count(opinionated_model):
    document = make_document(9, scored=[False, False, True, False, False, True, True, False, False, True])
    expected = -sum(
        log_probability(opinionated_model, document.tokens[:place], document.tokens[place])
        for place in (2, 5, 6, 9)
    )
    result = perplexity(opinionated_model, [document], WindowConfig(), batch_tokens=100)
    assert (result.tokens, result.nats) == (4, pytest.approx(expected, rel=1e-6))


def test_a_window_past_the_model_is_refused(opinionated_model):
    for config, message in (
        (
            WindowConfig(window_tokens=97),
            "windows.window_tokens must be at most the model's 96 positions, got 97",
        ),
        (
            WindowConfig(stride_tokens=97),
            "windows.stride_tokens must be at most the window, here the model's 96 positions, got 97",
        ),
    ):
        with pytest.raises(UserError, match=message):
            perplexity(opinionated_model, [make_document(3)], config, batch_tokens=10)
    with pytest.raises(UserError, match="mine: must hold at least one token to count, got none"):
        perplexity(opinionated_model, [], WindowConfig(), batch_tokens=10, name="mine")


def test_figures_past_a_float_are_none(opinionated_model):
    document = make_document(90)._replace(words=1, bytes=0)
    result = perplexity(opinionated_model, [document] * 9, WindowConfig(), batch_tokens=1000)
    assert result.nats / result.words < 700
    assert result.word_perplexity is not None
    assert (result.byte_perplexity, result.bits_per_byte) == (None, None)
    far = perplexity(
        opinionated_model, [document, *[document._replace(words=0)] * 9], WindowConfig(), batch_tokens=1000
    )
    assert far.nats > 700
    assert far.word_perplexity is None


def test_words_are_counted_as_the_harness_does():
    assert count_words("The river opens.") == 3
    assert count_words(" The  river\nopens . ") == 6  # four, and the empty pieces at both ends
    assert count_words("") == 1


def test_the_documents_of_a_text(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"body": text}) for text in ("The river.", "", "Löwe im  Tor"))
    )
    source = JsonlFiles(paths=(str(tmp_path / "a.jsonl"),))
    first, second = text_documents(TextConfig(name="t", source=source, text_field="body"), tokenizer)
    assert first.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("The river.")]
    assert first.scored.tolist() == [False] + [True] * (len(first.tokens) - 1)
    assert (first.words, first.bytes, second.words, second.bytes) == (2, 10, 3, 13)
    assert (
        len(text_documents(TextConfig(name="t", source=source, text_field="body", limit=1), tokenizer)) == 1
    )
    assert len(text_documents(TextConfig(name="t", source=source, text_field="body"), tokenizer, 1)) == 1
    with pytest.raises(
        UserError,
        match=r"text 't': jsonl: .*, record 1: 'text' must be a string, got no such field \(it has body\)",
    ):
        text_documents(TextConfig(name="t", source=source), tokenizer)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"text 'e': text: .*empty.txt: must hold text, got none"):
        text_documents(
            TextConfig(name="e", source=TextFiles(paths=(str(tmp_path / "empty.txt"),))), tokenizer
        )


def test_wikitext_is_measured_on_the_file_and_read_as_text(tokenizer, tmp_path):
    (tmp_path / "wiki").write_text(
        " \n = Rivers = \n \n A river @-@ bed , dry . \n \n = Stones = \n \n A stone . \n"
    )
    config = TextConfig(name="w", source=TextFiles(paths=(str(tmp_path / "wiki"),)), format="wikitext")
    first, second = text_documents(config, tokenizer)
    page = " = Rivers = \n \n A river @-@ bed , dry . \n "
    assert (first.words, first.bytes) == (len(page.split()) + 2, len(page))
    assert tokenizer.decode(first.tokens.tolist()) == " = Rivers =\n\nA river-bed, dry.\n"
    assert tokenizer.decode(second.tokens.tolist()) == " = Stones =\n\nA stone.\n"
    assert len(text_documents(config, tokenizer, 1)) == 1


def test_the_documents_of_a_store(store_dir, tokenizer):
    from lumi.data.token_store import TokenStore

    split = TokenStore.open(store_dir).split("validation")
    documents = list(store_documents(split, tokenizer))
    texts = [tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]
    assert sum(document.bytes for document in documents) == split.num_bytes
    assert [document.words for document in documents] == [count_words(text) for text in texts]
    assert (
        sum(int(document.scored.sum()) for document in documents)
        == split.num_tokens - 2 * split.num_documents
    )  # without BOS and EOS
    assert len(list(store_documents(split, tokenizer, 3))) == 3


def test_the_answers_of_a_store_of_conversations(tokenizer):
    ask, answer, more = (
        tokenizer.encode("What is it?"),
        tokenizer.encode("A stone."),
        tokenizer.encode("Or a river bed."),
    )
    parts = [
        ([tokenizer.bos_id], False),
        (ask, False),
        ([*answer, tokenizer.control_id("<|im_end|>")], True),
        (ask, False),
        ([*more, tokenizer.control_id("<|im_end|>")], True),
    ]
    tokens = np.array([token for ids, _ in parts for token in ids], dtype=np.uint16)
    mask = np.array([trained for ids, trained in parts for _ in ids])
    split = SimpleNamespace(
        tokens=tokens,
        offsets=np.array([0, len(tokens)]),
        mask=np.packbits(mask),
        num_documents=1,
        loss_mask=lambda a, b: mask[a:b].copy(),
    )
    [document] = store_documents(split, tokenizer)
    assert document.scored.tolist() == mask.tolist()
    assert (document.words, document.bytes) == (2 + 4, len("A stone.") + len("Or a river bed."))


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (WindowConfig, {"window_tokens": 0}, "window_tokens must be at least 1, got 0"),
        (
            WindowConfig,
            {"window_tokens": 4, "stride_tokens": 5},
            "stride_tokens must be at most window_tokens = 4, got 5",
        ),
        (
            TextConfig,
            {"name": "", "source": {"kind": "text", "paths": ["x"]}},
            'name and text_field must be names, got ""',
        ),
        (
            TextConfig,
            {"name": "n", "source": {"kind": "text", "paths": ["x"]}, "limit": 0},
            "limit must be at least 1, or null for all, got 0",
        ),
    ],
)
def test_bad_configs(cls, data, message):
    with pytest.raises(UserError) as error:
        from_dict(cls, data, "c")
    assert str(error.value) == f"c: {message}"
