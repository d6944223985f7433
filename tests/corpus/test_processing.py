import pytest

from lumi.chat.messages import Message
from lumi.chat.pairs import Pair
from lumi.corpus import (
    CleaningConfig,
    ConversationFilterConfig,
    DeduplicationConfig,
    FilterConfig,
    processing,
)
from lumi.corpus.deduplication import fingerprint
from lumi.corpus.documents import Record
from lumi.corpus.evaluation_sets import EvaluationSet
from lumi.corpus.overlaps import Overlaps
from lumi.corpus.processing import Outcome, RecordRules, make_batches, process_batch
from lumi.corpus.review import NUM_EXAMPLES, Glimpse

PROSE = "The fox lives in the forest and hunts at dusk; its den lies under an old oak."
DEDUPLICATION = DeduplicationConfig()
TEXTS = RecordRules(CleaningConfig(), FilterConfig(min_chars=10, max_chars=100), DEDUPLICATION)
CHATS = RecordRules(CleaningConfig(), ConversationFilterConfig(max_chars=60), DEDUPLICATION)


def test_one_outcome_for_each_text_in_order():
    records = [
        Record(PROSE + "\r\n"),
        Record(None, "malformed_json", "a.jsonl:2: no"),
        Record("x" * 101),
        Record(" \n"),
        Record("short", unused=("url",)),
        Record("Für alle, immer.", unused=("id", "url")),
    ]
    first, second = fingerprint([PROSE + "\n", "Für alle, immer."], DEDUPLICATION)
    outcomes = process_batch(TEXTS, records)
    assert [outcome._replace(glimpse=Glimpse()) for outcome in outcomes] == [
        Outcome(PROSE + "\n", first, len(PROSE) + 1),
        Outcome(None, None, reason="malformed_json", detail="a.jsonl:2: no"),
        Outcome(None, None, reason="too_long"),
        Outcome(None, None, reason="empty"),
        Outcome(None, None, reason="too_short", unused=("url",)),
        Outcome("Für alle, immer.", second, 17, unused=("id", "url")),
    ]
    seen = [outcome.glimpse for outcome in outcomes]
    assert [glimpse.num_chars for glimpse in seen] == [len(PROSE) + 1, 0, 101, 2, 5, 16]
    assert [glimpse.excerpt for glimpse in seen] == ["", "", "x" * 101, "", "short", ""]


@pytest.mark.parametrize("rules", [TEXTS, CHATS])
def test_a_document_that_shares_text_with_an_evaluation_set_is_dropped(rules):
    texts = ["Cold rivers open at noon.", "Cold rivers close at noon, mostly."]
    if rules is CHATS:
        texts = [(Message("user", "Cold rivers?"), Message("assistant", text)) for text in texts]
    found = EvaluationSet("exam", "", [], 1, ["rivers open at noon"])
    rules = rules._replace(overlaps=Overlaps([found], 13))
    first, second = process_batch(rules, [Record(texts[0], unused=("id",)), Record(texts[1])])
    dropped = Outcome(None, None, reason="shares_text_with_exam", unused=("id",), glimpse=first.glimpse)
    assert first == dropped
    assert "Cold rivers open at noon." in first.glimpse.excerpt
    assert (second.document, second.reason) == (texts[1], "")


def test_a_conversation_stays_one_and_its_answers_are_its_part():
    question, answer = Message("user", "Für wen?\x00"), Message("assistant", "Für alle.")
    records = [
        Record((question, answer, question)),
        Record((question, answer._replace(content="x" * 61))),
        Record((answer, question)),
    ]
    kept, too_long, disordered = process_batch(CHATS, records)
    cleaned = (question._replace(content="Für wen?"), answer)
    (expected,) = fingerprint([cleaned], DEDUPLICATION)
    assert kept._replace(glimpse=Glimpse()) == Outcome(cleaned, expected, 9 + 1 + 10, shortened=True)
    assert disordered.glimpse.excerpt == "assistant: Für alle."  # the question behind it has no answer
    assert (too_long.document, too_long.reason) == (None, "too_long")
    assert (disordered.document, disordered.reason) == (None, "roles_do_not_alternate")


def test_reasoning_is_cleaned_and_counted_with_its_answer():
    chat = (Message("user", "Für wen?"), Message("assistant", "Für alle.", "Hm\x00m."))
    (kept,) = process_batch(CHATS, [Record(chat)])
    assert kept.document == (chat[0], Message("assistant", "Für alle.", "Hmm."))
    assert kept.num_bytes == 9 + 1 + 4 + 1 + 10
    (too_long,) = process_batch(CHATS, [Record((chat[0], chat[1]._replace(reasoning="x" * 61)))])
    assert too_long.reason == "too_long"


def test_excerpts_of_a_huge_record_are_short_and_clean():
    (text,) = process_batch(TEXTS, [Record("a\x00\ud800" + "é" * 5_000)])
    assert text.glimpse.excerpt == "a\ufffd" + "é" * 997 + " …"
    (chat,) = process_batch(
        CHATS, [Record((Message("user", "é" * 5_000), Message("assistant", "x" * 5_000)))]
    )
    assert chat.glimpse.excerpt == "user: " + "é" * 994 + " …"


def test_few_excerpts_of_a_batch_travel():
    outcomes = process_batch(TEXTS, [Record(f"{number}") for number in range(500)])
    num_excerpts = sum(bool(outcome.glimpse.excerpt) for outcome in outcomes)
    assert NUM_EXAMPLES < num_excerpts < 100


def test_languages():
    pytest.importorskip("py3langid")
    german = "Der Fuchs lebt im Wald und jagt in der Dämmerung; sein Bau liegt unter einer Eiche."
    rules = TEXTS._replace(filters=FilterConfig(min_chars=10, languages=("en",)))
    outcomes = process_batch(rules, [Record(PROSE), Record(german), Record("Kurz.")])
    assert [outcome.reason for outcome in outcomes] == ["", "language", "too_short"]
    assert [outcome.glimpse.language for outcome in outcomes] == ["en", "de", ""]


def test_languages_of_conversations_and_pairs():
    pytest.importorskip("py3langid")
    german = "Das ist eine Frage, die niemand so recht beantworten kann, und das weiß auch jeder."
    english = "This is a question that nobody can answer, and everybody knows that it is so."
    chat = lambda text: (Message("user", text), Message("assistant", text))
    pair = lambda prompt, chosen, rejected: Pair(
        (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected * 3),)
    )
    rules = CHATS._replace(filters=ConversationFilterConfig(languages=("en",)))
    records = [chat(german), chat(english), pair(english, english, german), pair(english, english, english)]
    outcomes = process_batch(rules, list(map(Record, records)))
    assert [outcome.reason for outcome in outcomes] == ["language", "", "language", ""]
    assert [outcome.glimpse.language for outcome in outcomes] == ["de", "en", "de", "en"]


@pytest.mark.parametrize(("name", "limit"), [("BATCH_DOCUMENTS", 3), ("BATCH_CHARS", 30)])
def test_batches_end_at_a_number_of_documents_or_characters(name, limit, monkeypatch):
    monkeypatch.setattr(processing, name, limit)
    text = Record("0123456789")
    chat = Record((Message("user", "01234"), Message("assistant", "56789")))
    records = [text, chat, text, chat, chat]
    assert list(make_batches(records)) == [records[:3], records[3:]]
    assert list(make_batches([])) == []


def test_records_without_a_document_count_no_characters(monkeypatch):
    monkeypatch.setattr(processing, "BATCH_CHARS", 10)
    nothing, text = Record(None, "missing_text"), Record("0123456789")
    assert list(make_batches([nothing, nothing, text, nothing])) == [[nothing, nothing, text], [nothing]]
