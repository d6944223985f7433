import dataclasses
import errno
import json
import random

import pytest

from lumi.config import UserError, from_dict, load_config, to_dict
from lumi.corpus import (
    ConversationFilterConfig,
    DeduplicationConfig,
    FilterConfig,
    JsonlSource,
    JsonSource,
    PrepareConfig,
    TextSource,
    prepare,
    processing,
    read_corpus,
)
from lumi.corpus.conversations import AlpacaFormat, MessagesFormat
from lumi.corpus.corpus_writer import CorpusWriter

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "ma", "lis", "ro", "sk")]


def prose(seed, num_words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=num_words)) + ".\n"


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return JsonlSource(name=path.stem, paths=(str(path),))


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def mixed(tmp_path):
    """Two sources with everything that can go wrong in them."""
    texts = [prose(seed) for seed in range(40)]
    first = jsonl(
        tmp_path / "first.jsonl",
        [*texts, texts[3], texts[4].upper(), texts[5] + "extra", "short", "", "x" * 5000, "a b " * 80],
    )
    with open(first.paths[0], "ab") as file:
        file.write(b'{"text": \n{"text": "\xff"}\n{"id": 3}\n{"text": 4}\n')
    (tmp_path / "second.txt").write_text(
        "\n\n".join([texts[7], *(prose(seed) for seed in range(100, 110)), "lorem ipsum " + prose(200)])
    )
    second = TextSource(name="second", paths=(str(tmp_path / "second.txt"),), separator="\n\n")
    return PrepareConfig(sources=(first, second), filters=FilterConfig(max_chars=4000))


def test_counts_add_up_and_malformed_lines_are_named(mixed, tmp_path, capsys):
    manifest = prepare(mixed, tmp_path / "c", num_workers=1)
    first, second = manifest["sources"]
    assert first["dropped"] == {
        "malformed_json": 1,
        "invalid_utf8": 1,
        "missing_text": 1,
        "wrong_type": 1,
        "empty": 1,
        "too_short": 1,
        "too_long": 1,
        "top_ngram": 1,
        "exact_duplicate": 1,
        "near_duplicate": 2,
    }
    assert second["dropped"] == {"blocked_phrase": 1, "near_duplicate": 1}
    assert (first["unused_fields"], second["unused_fields"]) == (["id"], [])
    assert (first["read"], first["kept"], second["read"], second["kept"]) == (51, 40, 12, 10)
    for source in manifest["sources"]:
        assert source["read"] == source["kept"] + sum(source["dropped"].values())
    assert any(
        ":48: " in example and example.startswith("malformed_json: ")
        for example in first["malformed_examples"]
    )
    reader = read_corpus(tmp_path / "c")
    assert reader.manifest == manifest
    documents = list(reader)
    assert len(documents) == len(reader) == manifest["documents"] == 50
    assert manifest["bytes"] == sum(len(text.encode()) for text, _ in documents)
    assert [text for text, source in documents if source == "first"] == [prose(seed) for seed in range(40)]
    printed = capsys.readouterr().out
    assert "dropped: near_duplicate" in printed
    assert "50 documents in 1 shard:" in printed
    assert "\nfirst: fields that are not used: id\n" in printed
    card = (tmp_path / "c" / "DATA_CARD.md").read_text()
    assert "50 documents" in card
    assert "first.jsonl:48" in card
    assert "- first: fields that are not used: id\n" in card
    assert from_dict(PrepareConfig, manifest["config"]) == mixed


def test_the_same_bytes_for_one_and_two_workers(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(processing, "BATCH_DOCUMENTS", 3)  # many batches in flight
    one = prepare(mixed, tmp_path / "one", num_workers=1)
    two = prepare(mixed, tmp_path / "two", num_workers=2)
    assert one == two
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.fixture
def chats(tmp_path):
    """Two sources of conversations with everything that can go wrong in them."""
    records = [{"instruction": f"What is {seed}?", "output": prose(seed)} for seed in range(20)]
    records += [
        {"instruction": "What is  3?", "output": prose(3)},
        {"instruction": "What is 4?", "output": prose(4) + "extra"},
    ]
    records += [
        {"instruction": "x"},
        {"instruction": " ", "output": "x"},
        {"instruction": "x", "output": "x" * 5000},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps([*records, "x", {"instruction": "x", "output": "no"}]))
    turns = [
        {"role": "user", "content": "Hé\x00llo\ud83d"},
        {"role": "assistant", "content": prose(100), "reasoning_content": "Hm."},
        {"role": "user", "content": "And?"},
    ]
    system = {"role": "system", "content": "Be kind."}
    chats = [
        [system, *turns],
        turns[:1],
        [turns[1], turns[0], turns[1]],
        [turns[0], system, turns[1]],
        [{"role": "x", "content": ""}],
        3,
    ]
    chats += [
        [turns[0], {"role": "assistant", "content": "I cannot help: " + prose(101)}],
        [*turns, *turns[1:], *turns[1:]],
    ]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"chat": chat, "origin": "a"}) + "\n" for chat in chats)
    )
    return PrepareConfig(
        sources=(
            JsonSource(name="alpaca", paths=(str(tmp_path / "alpaca.json"),), conversation=AlpacaFormat()),
            JsonlSource(
                name="chats",
                paths=(str(tmp_path / "chats.jsonl"),),
                conversation=MessagesFormat(field="chat"),
            ),
        ),
        conversation_filters=ConversationFilterConfig(
            max_chars=4000, max_messages=5, min_answer_chars=3, blocked_phrases=("i cannot help",)
        ),
    )


def test_conversations_are_counted_like_texts(chats, tmp_path, capsys):
    manifest = prepare(chats, tmp_path / "c", num_workers=1)
    first, second = manifest["sources"]
    assert first["dropped"] == {
        "malformed_json": 1,
        "missing_text": 1,
        "empty_turn": 1,
        "short_answer": 1,
        "too_long": 1,
        "near_duplicate": 2,
    }
    assert second["dropped"] == {
        "malformed_messages": 1,
        "unknown_role": 1,
        "no_answer": 1,
        "system_not_first": 1,
        "roles_do_not_alternate": 1,
        "too_many_messages": 1,
        "blocked_phrase": 1,
    }
    assert (first["read"], first["kept"], second["read"], second["kept"]) == (27, 20, 8, 1)
    for source in manifest["sources"]:
        assert source["read"] == source["kept"] + sum(source["dropped"].values())
    reader = read_corpus(tmp_path / "c")
    assert (reader.manifest, reader.manifest["columns"]) == (manifest, ["messages", "source"])
    first_batch, last_batch = reader.iter_conversations()  # reasoning begins a shard
    assert first_batch.sources + last_batch.sources == ["alpaca"] * 20 + ["chats"]
    assert [messages[1].content for messages in first_batch.conversations] == [
        prose(seed) for seed in range(20)
    ]
    assert [tuple(message) for message in last_batch.conversations[0]] == [
        ("system", "Be kind.", ""),
        ("user", "Héllo\ufffd", ""),
        ("assistant", prose(100), "Hm."),
    ]
    assert (first["unused_fields"], second["unused_fields"]) == ([], ["origin"])
    assert manifest["bytes"] == sum(len(text.encode()) for text in reader.iter_texts())
    printed = capsys.readouterr().out
    assert "conversations read" in printed
    assert "21 conversations in 2 shards:" in printed
    card = (tmp_path / "c" / "DATA_CARD.md").read_text()
    assert "21 conversations, " in card
    assert "chats.jsonl:5: message 1: role must be one of" in card
    assert "- conversation_filters: `max_chars` 4000" in card
    assert "- filters" not in card
    assert manifest["config"]["filters"] is None
    assert from_dict(PrepareConfig, manifest["config"]) == chats


def ask_about(passage, pairs, system=False):
    """A source of questions about one passage, which is the context of each or its system message."""
    if system:
        return [{"system": passage, "instruction": question, "output": answer} for question, answer in pairs]
    return [{"instruction": question, "input": passage, "output": answer} for question, answer in pairs]


def json_source(path, records):
    path.write_text(json.dumps(records))
    return JsonSource(name=path.stem, paths=(str(path),), conversation=AlpacaFormat())


@pytest.mark.parametrize("system", [False, True])
def test_questions_about_one_passage_are_no_near_duplicates(tmp_path, system):
    pairs = [
        ("Who wrote it?", prose(1, 30)),
        ("When?", prose(2, 30)),
        ("Is it long?", "Yes."),
        ("Is it good?", "Yes."),
    ]
    again = [("Who wrote it, then?", prose(1, 30) + "Indeed."), ("is it LONG?", "Yes.")]
    source = json_source(tmp_path / "a.json", ask_about(prose(0, 300), pairs + again, system))
    (counts,) = prepare(PrepareConfig(sources=(source,)), tmp_path / "c", num_workers=1)["sources"]
    assert (counts["kept"], counts["dropped"]) == (5, {"near_duplicate": 1})


def test_conversations_that_were_shortened_are_counted(tmp_path, capsys):
    turns = [
        {"role": role, "content": prose(seed)} for seed, role in enumerate(("user", "assistant", "user"))
    ]
    blank = {"role": "system", "content": " "}
    records = [
        turns,
        [blank, turns[2], turns[1]],
        [turns[0]],
        [blank, *turns[:2]],
    ]  # the last two: no answer, a duplicate
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in records)
    )
    second = JsonlSource(name="b", paths=(str(tmp_path / "b.jsonl"),), conversation=MessagesFormat())
    first = json_source(tmp_path / "a.json", ask_about("", [("What?", prose(9))]))
    manifest = prepare(PrepareConfig(sources=(first, second)), tmp_path / "c", num_workers=1)
    assert [(source["kept"], source["shortened"]) for source in manifest["sources"]] == [(1, 0), (2, 2)]
    (row,) = (
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("kept, but shortened")
    )
    assert row[-3:] == ["0", "2", "2"]
    card = (tmp_path / "c" / "DATA_CARD.md").read_text()
    assert "- b: 2 of 2 conversations are kept without what the user said last" in card
    assert "- a: " not in card
    again = prepare(
        PrepareConfig(sources=(first, second)),
        tmp_path / "c",
        num_workers=1,
        use_cache=True,
        analyze_only=True,
    )
    assert again["sources"] == manifest["sources"]


def test_conversations_with_workers_and_from_the_cache_are_the_same(chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processing, "BATCH_DOCUMENTS", 3)
    one = prepare(chats, tmp_path / "one", num_workers=1)
    assert prepare(chats, tmp_path / "two", num_workers=2) == one
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    for path in (tmp_path / "two").glob("shard-*"):
        path.unlink()
    monkeypatch.setattr(processing, "process_batch", None)  # the cache has everything
    assert prepare(chats, tmp_path / "two", num_workers=1, use_cache=True) == one
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    plan = prepare(chats, tmp_path / "one", num_workers=1, use_cache=True, analyze_only=True)
    assert plan["sources"] == one["sources"]
    assert "nothing was written; 21 conversations would be" in capsys.readouterr().out


def test_budgets_of_conversations_count_what_is_said(tmp_path):
    records = [{"instruction": f"What is {seed}?", "output": prose(seed)} for seed in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = {
        "kind": "json",
        "name": "a",
        "paths": [str(tmp_path / "a.json")],
        "conversation": {"kind": "alpaca"},
    }
    said = [len((record["instruction"] + "\n" + record["output"]).encode()) for record in records]
    config = from_dict(
        PrepareConfig, {"sources": [source | {"max_tokens": sum(said[:7])}], "bytes_per_token": 1.0}
    )
    assert prepare(config, tmp_path / "c", num_workers=1)["documents"] == 7


def test_analyze_only_says_the_same_and_writes_nothing(mixed, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    plan = prepare(mixed, tmp_path / "c", analyze_only=True, num_workers=1)
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr().out
    assert "dropped: too_short" in printed
    assert "nothing was written; 50 documents would be" in printed
    manifest = prepare(mixed, tmp_path / "c", num_workers=1)
    assert plan["sources"] == manifest["sources"]
    assert "shards" not in plan
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    assert (
        prepare(mixed, tmp_path / "c", analyze_only=True, use_cache=True, num_workers=1)["sources"]
        == manifest["sources"]
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before


def test_budgets_end_a_source(tmp_path):
    texts = [prose(seed // 2) for seed in range(40)]  # every second one is a duplicate
    source = jsonl(tmp_path / "a.jsonl", texts)
    size = len(prose(0).encode())

    def run(name, **budget):
        config = {
            "sources": [to_dict(source) | budget],
            "bytes_per_token": budget.pop("bytes_per_token", 4.0),
        }
        config["sources"][0].pop("bytes_per_token", None)
        return prepare(from_dict(PrepareConfig, config), tmp_path / name, num_workers=1)["sources"][0]

    counts = run("documents", max_documents=5)
    assert (counts["read"], counts["kept"], counts["dropped"], counts["budget_reached"]) == (
        9,
        5,
        {"exact_duplicate": 4},
        True,
    )
    counts = run("tokens", max_tokens=size)  # four bytes per token: four documents, more or less
    assert counts["budget_reached"]
    assert size <= counts["estimated_tokens"] < size + size // 2
    assert run("fewer", max_tokens=size, bytes_per_token=1.0)["kept"] < counts["kept"]
    counts = run("all", max_tokens=10**9)
    assert (counts["read"], counts["budget_reached"]) == (40, False)


def test_what_lies_beyond_a_budget_is_no_duplicate_for_later_sources(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [prose(0), prose(1), prose(2)])
    second = jsonl(tmp_path / "b.jsonl", [prose(1), prose(2)])
    config = from_dict(PrepareConfig, {"sources": [to_dict(first) | {"max_documents": 2}, to_dict(second)]})
    manifest = prepare(config, tmp_path / "c", num_workers=1)
    assert [source["kept"] for source in manifest["sources"]] == [2, 1]


def test_a_budget_that_is_not_reached_and_a_source_that_gives_nothing_are_warnings(tmp_path, capsys):
    first = jsonl(tmp_path / "a.jsonl", [prose(0)])
    second = jsonl(tmp_path / "b.jsonl", [prose(0), "x"])
    config = from_dict(PrepareConfig, {"sources": [to_dict(first) | {"max_documents": 2}, to_dict(second)]})
    warnings = prepare(config, tmp_path / "c", num_workers=1)["warnings"]
    assert warnings[0].startswith("source 'a' ended before its budget: ")
    assert warnings[1] == "source 'b': no document is kept of 2 read (1 too_short, 1 exact_duplicate)"
    assert f"lumi: warning: {warnings[1]}" in capsys.readouterr().err


def test_no_document_at_all_is_an_error_and_leaves_no_corpus(tmp_path):
    config = PrepareConfig(sources=(jsonl(tmp_path / "a.jsonl", ["x", "y"]),))
    with pytest.raises(
        UserError,
        match=r"sources must give at least one document that is kept, got none: .*2 too_short"
        r".*--analyze-only",
    ):
        prepare(config, tmp_path / "c", num_workers=1)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_source_that_gives_nothing_shows_its_first_malformed_record(tmp_path, capsys):
    records = [{"instruction": "q", "context": "", "output": "a"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.jsonl").write_text(json.dumps(records, indent=1))
    source = {"kind": "jsonl", "conversation": {"kind": "dolly"}}
    sources = [source | {"name": name, "paths": [str(tmp_path / f"{name}.jsonl")]} for name in "ab"]
    with pytest.raises(UserError) as caught:
        prepare(from_dict(PrepareConfig, {"sources": sources}), tmp_path / "c", num_workers=1)
    warnings = [
        "source 'a': no document is kept of 3 read (3 missing_text); the first of them: missing_text: "
        f"{tmp_path}/a.jsonl:1: no field 'response'; it has 'instruction', 'context', 'output'",
        f"the first of them: malformed_json: {tmp_path}/b.jsonl:1: not valid JSON: Expecting value: ",
        'for a file that is one JSON array use kind "json"',
    ]
    printed = capsys.readouterr().err
    assert all(warning in printed and warning in str(caught.value) for warning in warnings)
    assert "\n" not in str(caught.value)


def test_shard_bytes_bounds_the_shards(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(50)])
    config = PrepareConfig(sources=(source,), shard_bytes=2000)
    manifest = prepare(config, tmp_path / "c", num_workers=1)
    assert len(manifest["shards"]) > 5
    assert sum(shard["documents"] for shard in manifest["shards"]) == 50
    assert [text for text, _ in read_corpus(tmp_path / "c")] == [prose(seed) for seed in range(50)]


def test_cleaning_and_deduplication_of_the_config_are_used(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [prose(0) + "â‚¬", prose(1), prose(1)])
    config = PrepareConfig(sources=(source,), deduplication=DeduplicationConfig(exact=False, near=False))
    assert prepare(config, tmp_path / "c", num_workers=1)["documents"] == 3
    assert next(iter(read_corpus(tmp_path / "c")))[0].endswith("€")
    config = load_config_of(tmp_path, config, ["cleaning.repair_text=false", "deduplication.exact=true"])
    assert prepare(config, tmp_path / "d", num_workers=1)["documents"] == 2
    assert next(iter(read_corpus(tmp_path / "d")))[0].endswith("â‚¬")


def load_config_of(tmp_path, config, overrides):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    return load_config(PrepareConfig, tmp_path / "config.json", overrides)


@pytest.fixture
def contaminated(tmp_path):
    """Two sources with questions of two exams in some documents."""
    first, second = prose(1000, 20).rstrip(".\n"), prose(2000, 9).rstrip(".\n")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": first, "choices": {"text": ["no", "yes"]}}))
    (tmp_path / "quiz.txt").write_text(second)
    words = first.split()
    a = [prose(seed) for seed in range(8)]
    a[2] += "They asked: " + " ".join(words[3:16]).upper() + "? And left."
    a[5] = f"{second}! {a[5]}"
    b = [prose(seed) for seed in range(20, 26)]
    b[0] += "\n".join(words) + f"\n({second})"
    b[4] += " ".join(words[3:15])  # twelve words are not enough
    against = [
        {"name": "exam", "source": {"kind": "jsonl", "paths": [str(tmp_path / "exam.jsonl")]}},
        {"name": "quiz", "source": {"kind": "text", "paths": [str(tmp_path / "quiz.txt")]}},
    ]
    sources = [to_dict(jsonl(tmp_path / f"{name}.jsonl", texts)) for name, texts in (("a", a), ("b", b))]
    return from_dict(PrepareConfig, {"sources": sources, "decontamination": {"against": against}})


def test_documents_with_evaluation_text_are_dropped_and_counted(contaminated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processing, "BATCH_DOCUMENTS", 3)
    manifest = prepare(contaminated, tmp_path / "one", num_workers=1)
    assert [source["dropped"] for source in manifest["sources"]] == [
        {"shares_text_with_exam": 1, "shares_text_with_quiz": 1},
        {"shares_text_with_exam": 1},  # it holds a question of the quiz, too
    ]
    assert [text for text, _ in read_corpus(tmp_path / "one")][:3] == [prose(0), prose(1), prose(3)]
    assert [each["name"] for each in manifest["evaluation_sets"]] == ["exam", "quiz"]
    assert "dropped: shares_text_with_quiz" in capsys.readouterr().out
    assert "| 1 | 2 |\n" in (tmp_path / "one" / "DATA_CARD.md").read_text()
    assert prepare(contaminated, tmp_path / "two", num_workers=2) == manifest
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    without = prepare(dataclasses.replace(contaminated, decontamination=None), tmp_path / "c", num_workers=1)
    assert (without["documents"], manifest["documents"]) == (14, 11)
    assert without["evaluation_sets"] == []


def test_another_evaluation_set_makes_another_corpus(contaminated, tmp_path, capsys):
    first = prepare(contaminated, tmp_path / "c", num_workers=1, use_cache=True)
    assert prepare(contaminated, tmp_path / "c", num_workers=1, use_cache=True) == first
    assert "is up to date" in capsys.readouterr().out
    (tmp_path / "quiz.txt").write_text(" ".join(prose(3).split()[:10]))
    again = prepare(contaminated, tmp_path / "c", num_workers=1, use_cache=True)
    assert again["evaluation_sets"][0] == first["evaluation_sets"][0]
    assert again["evaluation_sets"][1] != first["evaluation_sets"][1]
    texts = [text for text, _ in read_corpus(tmp_path / "c")]
    assert prose(3) not in texts
    assert any(text.endswith(prose(5)) for text in texts)


def test_nothing_of_the_user_is_overwritten(mixed, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=r"--output-dir must be new, empty or a corpus folder, got .*mine with manifest.json in it",
    ):
        prepare(mixed, folder, num_workers=1)
    assert (folder / "manifest.json").read_text() == "{}"
    with pytest.raises(
        UserError, match=r"--output-dir must be a folder that can be written to, got .* is a file"
    ):
        prepare(mixed, mixed.sources[0].paths[0], num_workers=1)


def test_a_corpus_of_another_config_is_replaced_only_when_asked(mixed, tmp_path):
    first = prepare(mixed, tmp_path / "c", num_workers=1)
    assert prepare(mixed, tmp_path / "c", num_workers=1) == first
    other = load_config_of(tmp_path, mixed, ["filters.min_chars=300", "shard_bytes=5000"])
    before = tree(tmp_path / "c")
    with pytest.raises(
        UserError,
        match=r"another config, got .* \(made with other filters, shard_bytes\).*--use-cache",
    ):
        prepare(other, tmp_path / "c", num_workers=1)
    assert tree(tmp_path / "c") == before
    manifest = prepare(other, tmp_path / "c", use_cache=True, num_workers=1)
    fresh = prepare(other, tmp_path / "d", num_workers=1)
    assert manifest == fresh
    assert tree(tmp_path / "c") == tree(tmp_path / "d")


def test_a_full_disk_is_a_user_error_and_keeps_the_earlier_corpus(mixed, tmp_path, monkeypatch):
    prepare(mixed, tmp_path / "c", num_workers=1)
    before = tree(tmp_path / "c")

    def add(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "shard.parquet")

    monkeypatch.setattr(CorpusWriter, "add", add)
    with pytest.raises(
        UserError, match=r"shard.parquet cannot be written: No space left on device.*--use-cache"
    ):
        prepare(mixed, tmp_path / "c", num_workers=1)
    assert tree(tmp_path / "c") == before


def test_a_glob_without_files_is_refused_before_anything_is_written(tmp_path):
    config = PrepareConfig(sources=(JsonlSource(name="a", paths=(str(tmp_path / "*.none"),)),))
    with pytest.raises(UserError, match="paths must match at least one file"):
        prepare(config, tmp_path / "c", num_workers=1)
    assert not (tmp_path / "c").exists()


def test_num_workers_must_be_positive(mixed, tmp_path):
    with pytest.raises(UserError, match="--num-workers must be at least 1, got 0"):
        prepare(mixed, tmp_path / "c", num_workers=0)
