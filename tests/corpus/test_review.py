import random

import pytest

from lumi.chat.messages import Message
from lumi.corpus.review import NUM_EXAMPLES, Bar, Glimpse, Review, excerpt_of, glimpse_of, rank_of, wanted


def texts_of(review, reason):
    return [example.text for example in review.examples(reason)]


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1_000])
def test_the_examples_are_those_of_the_lowest_ranks_for_any_batches_and_any_end(batch_size):
    texts = [f"document {random.Random(number).randrange(600)}" for number in range(1_000)]
    glimpses = [glimpse_of(text, text) for text in texts]
    for end in (9, 353, 1_000):
        review = Review()
        for start in range(0, len(texts), batch_size):
            batch = glimpses[start : start + batch_size]
            flags = wanted(("short", glimpse) for glimpse in batch)
            thinned = [
                each if flag else each._replace(excerpt="") for each, flag in zip(batch, flags, strict=True)
            ]
            for glimpse in thinned[: max(0, end - start)]:
                review.add("s", "short", glimpse, "", lambda: None)
        assert texts_of(review, "short") == sorted(set(texts[:end]), key=rank_of)[:NUM_EXAMPLES]


def test_documents_that_passed_the_filters_are_read_only_for_examples():
    review, read = Review(), []
    for number in range(1_000):
        document = f"document {number}"
        glimpse = glimpse_of(document, document)._replace(excerpt="")
        review.add("s", "", glimpse, "", lambda text=document: read.append(text) or text)
    documents = [f"document {number}" for number in range(1_000)]
    assert texts_of(review, "") == sorted(documents, key=rank_of)[:NUM_EXAMPLES]
    assert NUM_EXAMPLES < len(read) < 100


def test_malformed_records_show_what_is_wrong_and_nothing_is_no_example():
    review = Review()
    review.add("s", "malformed_json", Glimpse(), "a.jsonl:2: no", lambda: None)
    review.add("s", "empty", glimpse_of("", ""), "", lambda: None)
    assert review.examples("malformed_json") == [("s", "a.jsonl:2: no")]
    assert review.examples("empty") == []
    assert review.lengths == []


def test_histograms():
    review = Review()
    for length, language, reason in (
        (1, "en", ""),
        (3, "de", "language"),
        (2, "de", "language"),
        (9, "", "too_short"),
    ):
        review.add("s", reason, Glimpse(length, length, "x", language), "", lambda: None)
    assert review.lengths == [
        Bar("1 to 1", 1, 0),
        Bar("2 to 3", 0, 2),
        Bar("4 to 7", 0, 0),
        Bar("8 to 15", 0, 1),
    ]
    assert review.languages == [Bar("de", 0, 2), Bar("en", 1, 0)]
    assert [bar.total for bar in review.languages] == [2, 1]


def test_an_excerpt_is_the_beginning():
    assert excerpt_of("a" * 1_000) == "a" * 1_000
    assert excerpt_of("a" * 1_001) == "a" * 1_000 + " …"
    chat = (Message("user", "Why?"), Message("assistant", "So.", "Hm."))
    assert excerpt_of(chat) == "user: Why?\nassistant: Hm.\nassistant: So."
