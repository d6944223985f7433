import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from lumi import cli
from lumi.chat.messages import Message, to_json
from lumi.chat.rendering import TEMPLATES, render
from lumi.config import UserError, read_json, write_json
from lumi.corpus.folder import CorpusWriter
from lumi.data import encoding, token_store
from lumi.data import tokenization as shards
from lumi.data.batches import BatchConfig, Batches, prefetch
from lumi.data.encoding import Documents, Recipe, encode_all, make_tasks, split_of, token_dtype
from lumi.data.tokenization import StoreWriter, TokenStore, open_or_tokenize, token_cache, tokenize
from lumi.host.interruption import Interrupted
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer

TEXTS = [f"Document {i} says:\n    héllo, world number {i * i}.\n" * (1 + i % 5) for i in range(200)]
SOURCES = ["books" if i % 3 else "web" for i in range(200)]
FRACTION = 0.25


def write_corpus(folder, texts, sources):
    with CorpusWriter(folder, 1 << 20) as writer:
        for text, source in zip(texts, sources, strict=True):
            writer.add(text, source, len(text.encode()))
        writer.commit({"documents": len(texts), "sources": []}, "a card")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), TEXTS, SOURCES)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return train_tokenizer(
        TokenizerConfig(vocab_size=320), [corpus], tmp_path_factory.mktemp("made") / "tokenizer"
    )


@pytest.fixture(scope="module")
def other_tokenizer(corpus, tmp_path_factory):
    return train_tokenizer(
        TokenizerConfig(vocab_size=310), [corpus], tmp_path_factory.mktemp("made") / "other"
    )


@pytest.fixture(scope="module")
def finished(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize([corpus], tokenizer, folder, validation_fraction=FRACTION, num_workers=1)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a token store, to be damaged."""
    shutil.copytree(finished, tmp_path / "tokens")
    return tmp_path / "tokens"


def expected_split(text):
    rank = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if rank / 2**64 < FRACTION else "train"


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# tokenize


def test_every_document_is_there_once_in_order_on_its_side(finished, tokenizer):
    store = TokenStore.open(finished, tokenizer_fingerprint=tokenizer.fingerprint)
    for name in ("train", "validation"):
        split = store.split(name)
        texts = [text for text in TEXTS if expected_split(text) == name]
        assert split.num_documents == len(texts) > 20
        documents = [split.document(i).tolist() for i in range(split.num_documents)]
        assert documents == [[1, *tokenizer.encode(text), 2] for text in texts]
        assert split.num_tokens == sum(map(len, documents)) == int(split.offsets[-1])
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert sum(tokenizer.token_bytes[split.tokens[:]]) == split.num_bytes


def test_the_manifest_counts(finished):
    train = read_json(finished / "manifest.json")["splits"]["train"]
    web = [
        text
        for text, source in zip(TEXTS, SOURCES, strict=True)
        if source == "web" and expected_split(text) == "train"
    ]
    assert train["sources"]["web"]["documents"] == len(web)
    assert train["sources"]["web"]["bytes"] == sum(len(text.encode()) for text in web)
    for key in ("documents", "tokens", "bytes"):
        assert train[key] == train["sources"]["web"][key] + train["sources"]["books"][key]
    tokens = (finished / "train.tokens").read_bytes()
    assert train["files"]["train.tokens"] == {
        "size": 2 * train["tokens"],
        "sha256": hashlib.sha256(tokens).hexdigest(),
    }
    assert train["max_token_id"] == np.frombuffer(tokens, "<u2").max()


def test_the_layout_on_disk(tmp_path, tokenizer):
    corpus = write_corpus(tmp_path / "corpus", ["", "\0"], ["a", "a"])
    tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=0, num_workers=1)
    files = file_bytes(tmp_path / "tokens")
    assert files.keys() == {"manifest.json", "train.offsets", "train.tokens"}
    assert files["train.tokens"] == bytes([1, 0, 2, 0, 1, 0, 6, 0, 2, 0])  # BOS EOS, BOS <0x00> EOS
    assert files["train.offsets"] == b"".join(value.to_bytes(8, "little") for value in (0, 2, 5))


def test_equal_texts_share_a_side_and_the_share_is_as_asked():
    sides = [split_of(f"text {i}".encode(), 0.1)[0] for i in range(4000)]
    assert 330 < sides.count("validation") < 470  # 400 expected, standard deviation 19
    assert sides == [split_of(f"text {i}".encode(), 0.1)[0] for i in range(4000)]
    assert all(split_of(f"text {i}".encode(), 0.0)[0] == "train" for i in range(100))
    more = [split_of(f"text {i}".encode(), 0.2)[0] for i in range(4000)]
    assert all(m == "validation" for s, m in zip(sides, more, strict=True) if s == "validation")


def test_any_number_of_workers_gives_the_same_bytes(corpus, tokenizer, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 500)  # some fifty tasks: real processes
    for workers in (1, 2):
        tokenize(
            [corpus], tokenizer, tmp_path / str(workers), validation_fraction=FRACTION, num_workers=workers
        )
        assert file_bytes(tmp_path / str(workers)) == file_bytes(finished)


def test_several_corpora_follow_each_other(corpus, tokenizer, tmp_path):
    second = write_corpus(tmp_path / "second", ["one more"], ["extra"])
    manifest = tokenize(
        [second, corpus], tokenizer, tmp_path / "tokens", validation_fraction=0, num_workers=1
    )
    train = TokenStore.open(tmp_path / "tokens").split("train")
    assert tokenizer.decode(train.document(0)) == "one more"
    assert train.num_documents == 201
    assert manifest.splits["train"].sources["extra"].bytes == 8
    assert len(manifest.inputs) == 3


def test_tasks_keep_documents_and_order(monkeypatch):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 10)
    batches = [
        Documents(["aaaa", "b" * 30], ["x", "y"]),
        Documents([], []),
        Documents(["cccc", "cccc", "dddd"], ["x", "x", "z"]),
    ]
    tasks = list(make_tasks(batches))
    assert [task.documents for task in tasks] == [["aaaa", "b" * 30], ["cccc", "cccc", "dddd"]]
    assert [source for task in tasks for source in task.sources] == ["x", "y", "x", "x", "z"]
    assert list(make_tasks([])) == []


def test_a_lone_surrogate_is_refused_in_a_worker_too(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 10)
    batches = [Documents(["some text, long enough"] * 20 + ["a\ud800"], ["x"] * 21)]
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
        list(encode_all(batches, Recipe(tokenizer=tokenizer, validation_fraction=0), num_workers=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction must be at least 0 and less than 1, got 1.0"),
        ({"validation_fraction": float("nan")}, "--validation-fraction must be .* got nan"),
        ({"num_workers": 0}, "--num-workers must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(corpus, tokenizer, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        tokenize([corpus], tokenizer, tmp_path / "tokens", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_split_says_what_helps(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", TEXTS[:5], SOURCES[:5])
    with pytest.raises(
        UserError, match=r"validation split at least one of the 5 documents, got 1e-06; run .*"
    ) as caught:
        tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=1e-6)
    assert not (tmp_path / "tokens").exists()
    fraction = float(str(caught.value).split("--validation-fraction ")[-1].split("`")[0])
    manifest = tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=fraction)
    assert manifest.splits["validation"].documents == 1
    with pytest.raises(
        UserError, match=r"must leave documents to train on, got 0.999999 for 5 documents; lower it"
    ):
        tokenize([corpus], tokenizer, tmp_path / "all", validation_fraction=0.999999)
    with pytest.raises(UserError, match="--corpus-dirs must name at least one corpus folder"):
        tokenize([], tokenizer, tmp_path / "none")


def test_an_equal_store_is_kept_another_refused(corpus, tokenizer, other_tokenizer, folder, capsys):
    before = file_bytes(folder)
    tokenize([corpus], tokenizer, folder, validation_fraction=FRACTION)
    assert "already holds these documents in tokens of this tokenizer; kept" in capsys.readouterr().err
    with pytest.raises(
        UserError,
        match=r"other inputs \(validation_fraction 0\.25 there, 0\.5 asked for\); choose another --output-dir",
    ):
        tokenize([corpus], tokenizer, folder, validation_fraction=0.5)
    pattern = f"tokenizer {tokenizer.fingerprint} there, {other_tokenizer.fingerprint} asked for"
    with pytest.raises(UserError, match=pattern):
        tokenize([corpus], other_tokenizer, folder, validation_fraction=FRACTION)
    second = write_corpus(folder.parent / "second", TEXTS[:100], SOURCES[:100])
    with pytest.raises(UserError, match=r"corpus 0 [0-9a-f]{64} there, [0-9a-f]{64} asked for"):
        tokenize([second], tokenizer, folder, validation_fraction=FRACTION)
    assert file_bytes(folder) == before
    (folder / "train.tokens").write_bytes(before["train.tokens"][:-2])
    with pytest.raises(UserError, match=r"train.tokens: must be \d+ bytes, got \d+: the file is truncated"):
        tokenize([corpus], tokenizer, folder, validation_fraction=FRACTION)


def test_foreign_folders_are_left_alone(corpus, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt", corpus):
        with pytest.raises(UserError, match="--output-dir must be new, empty or a token store"):
            tokenize([corpus], tokenizer, place)


def test_a_run_that_fails_leaves_nothing_and_sweeps_its_dead_forerunners(
    corpus, tokenizer, tmp_path, monkeypatch
):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    litter, foreign = tmp_path / f".tmp-tokens-{dead.pid}", tmp_path / f".tmp-others-{dead.pid}"
    alive = tmp_path / f".tmp-tokens-{os.getppid()}"
    for path in (litter, foreign, alive):
        path.mkdir()

    def fail(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "finish", fail)
    with pytest.raises(OSError, match="No space left"):
        tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=FRACTION)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, alive])


def test_two_runs_at_once_end_with_one_store(corpus, tokenizer, finished, tmp_path, monkeypatch):
    finish = StoreWriter.finish

    def finish_second(self, *arguments):
        shutil.copytree(finished, tmp_path / "tokens")  # another process was faster
        return finish(self, *arguments)

    monkeypatch.setattr(StoreWriter, "finish", finish_second)
    manifest = tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=FRACTION)
    assert manifest == TokenStore.open(finished).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


# Conversations

CHATS = [
    [
        Message("user", f"What is {i} times {i}?"),
        Message("assistant", f"It is {i * i}."),
        Message("user", "Sure?"),
        Message("assistant", "é!"),
    ]
    for i in range(120)
]
CHATS[7] = [Message("system", "</s> <|im_end|>"), *CHATS[7], Message("user", "waits")]
CHATS[9] = [Message("user", "silence")]  # `prepare` lets no such thing through


def write_chats(folder, chats, sources=None):
    with CorpusWriter(folder, 1 << 20, conversations=True) as writer:
        for index, chat in enumerate(chats):
            text = json.dumps(to_json(chat))
            writer.add(text, sources[index] if sources else "chats", len(text))
        writer.commit({"documents": len(chats), "sources": []}, "a card")
    return folder


@pytest.fixture(scope="module")
def chat_corpus(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats"), CHATS, SOURCES)


def side(chat):
    text = json.dumps(
        [{"role": m.role, "content": m.content} for m in chat], ensure_ascii=False, separators=(",", ":")
    )
    return expected_split(text)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_conversations_are_there_once_in_order_with_their_masks(chat_corpus, tokenizer, tmp_path, name):
    manifest = tokenize(
        [chat_corpus],
        tokenizer,
        tmp_path / "s",
        validation_fraction=FRACTION,
        template=TEMPLATES[name],
        num_workers=1,
    )
    assert manifest.template == manifest.inputs["template"] == name
    store = TokenStore.open(tmp_path / "s")
    for split_name in ("train", "validation"):
        split, counts = store.split(split_name), manifest.splits[split_name]
        chats = [chat for chat in CHATS if side(chat) == split_name]
        rendered = [render(tokenizer, TEMPLATES[name], chat) for chat in chats if len(chat) > 1]
        assert split.num_documents == len(rendered) == counts.documents > 15
        assert [split.document(i).tolist() for i in range(split.num_documents)] == [
            document.ids for document in rendered
        ]
        assert split.loss_mask(0, split.num_tokens).tolist() == [
            bit for document in rendered for bit in document.mask
        ]
        assert counts.trained_tokens == sum(sum(document.mask) for document in rendered)
        assert (
            counts.bytes
            == split.num_bytes
            == sum(len(m.content.encode()) for chat in chats for m in chat if m.role == "assistant")
        )
        assert counts.bytes == sum(source.bytes for source in counts.sources.values())
        assert counts.truncated == 0
    dropped = {split_name: counts.dropped for split_name, counts in manifest.splits.items()}
    assert dropped == {"train": {}, "validation": {}} | {side(CHATS[9]): {"no_answer": 1}}


def test_long_conversations_are_truncated_or_dropped_and_counted(chat_corpus, tokenizer, tmp_path):
    short, long = (
        (Message("user", "q"), Message("assistant", "a")),
        (Message("user", "q" * 99), Message("assistant", "a")),
    )
    limit = len(render(tokenizer, TEMPLATES["plain"], short).ids)
    corpus = write_chats(tmp_path / "chats", [short, (*short, *long), long, (*short, long[0])])
    arguments = {"template": TEMPLATES["plain"], "max_tokens": limit, "num_workers": 1}
    train = tokenize([corpus], tokenizer, tmp_path / "s", validation_fraction=0, **arguments).splits["train"]
    assert (train.documents, train.tokens, train.bytes) == (3, 3 * limit, 3)
    assert (train.dropped, train.truncated) == ({"no_answer_within_max_tokens": 1}, 1)
    message = "--corpus-dirs must hold at least one document, got none; 4 dropped: no_answer_within_max_tokens; raise --max-tokens"
    with pytest.raises(UserError, match=message):
        tokenize(
            [corpus],
            tokenizer,
            tmp_path / "t",
            validation_fraction=0,
            **(arguments | {"max_tokens": limit - 1}),
        )
    assert not (tmp_path / "t").exists()


def test_any_number_of_workers_gives_the_same_conversations(chat_corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 300)
    for workers in (1, 3):
        tokenize(
            [chat_corpus],
            tokenizer,
            tmp_path / str(workers),
            validation_fraction=FRACTION,
            max_tokens=50,
            num_workers=workers,
        )
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")


def test_corpora_can_be_the_validation_split(chat_corpus, corpus, tokenizer, tmp_path):
    held_out = write_chats(tmp_path / "held_out", CHATS[:5])
    rest = write_chats(tmp_path / "rest", CHATS[10:])
    manifest = tokenize([rest], tokenizer, tmp_path / "s", validation_corpus_dirs=[held_out], num_workers=1)
    assert {name: split.documents for name, split in manifest.splits.items()} == {
        "train": 110,
        "validation": 5,
    }
    assert manifest.template == "chatml"  # the tokenizer's own
    texts = tokenize([corpus], tokenizer, tmp_path / "t", validation_corpus_dirs=[corpus], num_workers=1)
    assert {name: split.documents for name, split in texts.splits.items()} == {
        "train": 200,
        "validation": 200,
    }
    with pytest.raises(
        UserError,
        match=r"--validation-fraction must be 0 or left out beside --validation-corpus-dirs, got 0\.1",
    ):
        tokenize(
            [rest], tokenizer, tmp_path / "u", validation_corpus_dirs=[held_out], validation_fraction=0.1
        )
    with pytest.raises(UserError, match=r"validation corpus 0 [0-9a-f]{64} there, None asked for"):
        tokenize([rest], tokenizer, tmp_path / "s", validation_fraction=0)
    silent = write_chats(tmp_path / "silent", [CHATS[9]])
    with pytest.raises(
        UserError,
        match="--validation-corpus-dirs must hold at least one document, got none; 1 dropped: no_answer",
    ):
        tokenize([rest], tokenizer, tmp_path / "u", validation_corpus_dirs=[silent])
    with pytest.raises(
        UserError, match="--corpus-dirs must hold at least one document, got none; 1 dropped: no_answer"
    ):
        tokenize([silent], tokenizer, tmp_path / "u", validation_corpus_dirs=[rest])


def test_another_template_or_limit_is_another_store(chat_corpus, tokenizer, tmp_path):
    tokenize([chat_corpus], tokenizer, tmp_path / "s", validation_fraction=FRACTION, num_workers=1)
    with pytest.raises(
        UserError,
        match=r"other inputs \(template chatml there, plain asked for; max_tokens None there, 60 asked for\)",
    ):
        tokenize(
            [chat_corpus],
            tokenizer,
            tmp_path / "s",
            validation_fraction=FRACTION,
            template=TEMPLATES["plain"],
            max_tokens=60,
        )


def test_what_does_not_go_together(chat_corpus, corpus, tokenizer, tmp_path):
    foreign = tokenizer.with_chat_template("{{ messages }}")
    for folders, others, chosen, arguments, message in (
        (
            [chat_corpus, corpus],
            [],
            tokenizer,
            {},
            f"must be all of texts or .*, got texts in {corpus} and conversations in {chat_corpus}",
        ),
        (
            [chat_corpus],
            [corpus],
            tokenizer,
            {},
            f"must be all of texts or .*, got texts in {corpus} and conversations in {chat_corpus}",
        ),
        (
            [corpus],
            [],
            tokenizer,
            {"template": TEMPLATES["plain"]},
            f"--template must be left out for texts, and {corpus} holds texts",
        ),
        ([corpus], [], tokenizer, {"max_tokens": 9}, "--max-tokens must be left out for texts"),
        ([chat_corpus], [], tokenizer, {"max_tokens": 0}, "--max-tokens must be at least 1, got 0"),
        (
            [chat_corpus],
            [],
            foreign,
            {},
            "--template must be given where the tokenizer's chat template is none of chatml, alpaca, plain",
        ),
    ):
        with pytest.raises(UserError, match=message):
            tokenize(folders, chosen, tmp_path / "s", validation_corpus_dirs=others, **arguments)
        assert not (tmp_path / "s").exists()


def test_a_corpus_of_conversations_is_tokenized_once_for_each_template(tokenizer, tmp_path):
    corpus = write_chats(tmp_path / "chats", CHATS)
    plain = tokenizer.with_chat_template(TEMPLATES["plain"].jinja)
    stores = [
        open_or_tokenize(corpus, chosen, validation_fraction=FRACTION)
        for chosen in (tokenizer, plain, tokenizer)
    ]
    assert [store.manifest.template for store in stores] == ["chatml", "plain", "chatml"]
    assert [store.folder.name for store in stores[:2]] == [
        f"{tokenizer.fingerprint[:16]}-{name}" for name in ("chatml", "plain")
    ]


def test_what_the_command_says(corpus, tokenizer, tmp_path, capsys):
    def lumi_tokenize(output, *arguments):
        command = [
            "tokenize",
            "--tokenizer-dir",
            tmp_path / "tok",
            "--output-dir",
            tmp_path / output,
            *arguments,
        ]
        assert cli.dispatch([str(argument) for argument in command]) == 0
        return capsys.readouterr().out

    tokenizer.save(tmp_path / "tok")
    chats = write_chats(tmp_path / "chats", [CHATS[9], CHATS[0] + CHATS[1]])
    arguments = ("--validation-corpus-dirs", chats, "--template", "plain", "--max-tokens", 130)
    output = lumi_tokenize("s", "--corpus-dirs", chats, *arguments)
    split = TokenStore.open(tmp_path / "s").manifest.splits["train"]
    line = f"1 conversations, {split.tokens:,} tokens, {split.trained_tokens:,} trained ({split.trained_tokens / split.tokens:.1%})"
    line += "; 1 dropped: no_answer; 1 truncated"
    assert output == f"train: {line}\nvalidation: {line}\n"
    output = lumi_tokenize("t", "--corpus-dirs", corpus, "--validation-fraction", 0.25)
    assert re.match(r"train: 1\d\d documents, [\d,]+ tokens, \d\.\d\d bytes per token\nvalidation: ", output)


# The reader


def test_a_store_from_before_there_were_conversations(folder):
    manifest = read_json(folder / "manifest.json")
    del manifest["template"]
    for split in manifest["splits"].values():
        for key in ("trained_tokens", "dropped", "truncated"):
            del split[key]
    before = TokenStore.open(folder).manifest
    write_json(folder / "manifest.json", manifest)
    assert TokenStore.open(folder).manifest == before


def test_a_missing_split_names_those_there_are(corpus, tokenizer, tmp_path):
    tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=0)
    store = TokenStore.open(tmp_path / "tokens")
    assert store.has_split("train")
    assert not store.has_split("validation")
    with pytest.raises(
        UserError, match=r"must hold the split 'validation', got train; .*--validation-fraction"
    ):
        store.split("validation")


def test_another_tokenizer_is_refused(finished, tokenizer, other_tokenizer):
    with pytest.raises(
        UserError,
        match=f"{other_tokenizer.fingerprint}, got a token store of {tokenizer.fingerprint}; .*lumi tokenize ",
    ):
        TokenStore.open(finished, tokenizer_fingerprint=other_tokenizer.fingerprint)


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets", "validation.tokens", "validation.offsets"])
@pytest.mark.parametrize("verify", ["size", "hash"])
def test_truncated_and_missing_files(folder, name, verify):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(
        UserError,
        match=rf"{name}: must be {len(data)} bytes, got {len(data) - 1}.*copy the store again, or remove it and run",
    ):
        TokenStore.open(folder, verify=verify)
    (folder / name).write_bytes(data + b"\0")
    with pytest.raises(
        UserError,
        match=rf"{name}: must be {len(data)} bytes, got {len(data) + 1}: the file is truncated or was changed",
    ):
        TokenStore.open(folder, verify=verify)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; copy the store again"):
        TokenStore.open(folder, verify=verify)


@pytest.mark.parametrize("name", ["train.tokens", "validation.tokens"])
def test_one_flipped_bit(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[17] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(
        UserError, match=rf"{name}: SHA-256 must be [0-9a-f]{{64}}, got [0-9a-f]{{64}}: the file is corrupt"
    ):
        TokenStore.open(folder)


def rewrite(folder, name, change):
    """Change a file and record it in the manifest as though it had been written so."""
    values = np.fromfile(folder / name, dtype="<u8" if name.endswith("offsets") else "<u2")
    change(values)
    values.tofile(folder / name)
    manifest = read_json(folder / "manifest.json")
    manifest["splits"]["train"]["files"][name]["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    write_json(folder / "manifest.json", manifest)


def test_ids_outside_the_vocabulary_are_refused(folder):
    def change(values):
        values[-1] = 320

    rewrite(folder, "train.tokens", change)
    with pytest.raises(UserError, match=r"train.tokens: ids must be below 320, got 320"):
        TokenStore.open(folder)
    manifest = read_json(folder / "manifest.json")
    manifest["splits"]["train"]["max_token_id"] = 321
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"train.tokens: ids must be below 320, got 321"):
        TokenStore.open(folder, verify="size")


def test_ids_beyond_the_tokenizer_that_reads_them_are_refused(folder, tokenizer):
    """Of the fingerprint is the model alone: one that gives fewer ids than the one that wrote the store could have the same."""
    for verify in ("size", "hash"):
        highest = read_json(folder / "manifest.json")["splits"]["train"]["max_token_id"]
        assert (
            TokenStore.open(folder, vocab_size=highest + 1, verify=verify).split("validation").num_documents
            > 20
        )
        with pytest.raises(UserError, match=rf"train.tokens: ids must be below {highest}, got {highest}"):
            TokenStore.open(folder, vocab_size=highest, verify=verify)
    manifest = read_json(folder / "manifest.json") | {
        "vocab_size": 5000
    }  # one that claims more than the tokenizer has

    def change(values):
        values[3] = 4999

    write_json(folder / "manifest.json", manifest)
    rewrite(folder, "train.tokens", change)
    with pytest.raises(UserError, match=r"train.tokens: ids must be below 320, got 4999"):
        open_or_tokenize(folder, tokenizer)


def test_a_file_that_shrinks_in_the_middle_of_a_run(folder):
    """np.memmap would end the process here by SIGBUS, without a word."""
    splits = [TokenStore.open(folder).split("train")]
    batches = Batches(
        splits, None, BatchConfig(sequence_length=64, batch_tokens=256, micro_batch_size=1), seed=0
    )
    steps = prefetch(batches.__getitem__, range(1, 1000))
    assert next(steps)[1].tokens.shape == (4, 64)
    size = (folder / "train.tokens").stat().st_size
    os.truncate(folder / "train.tokens", size // 2)
    with pytest.raises(
        UserError,
        match=rf"train.tokens: must be {size} bytes, got {size // 2}: the file was truncated while .* copy the st",
    ):
        list(steps)


@pytest.mark.parametrize(("index", "value"), [(0, 1), (-1, 1 << 40), (5, 0)])
def test_offsets_that_do_not_rise_are_refused(folder, index, value):
    def change(values):
        values[index] = value

    rewrite(folder, "train.offsets", change)
    for verify in ("size", "hash"):
        with pytest.raises(UserError, match=r"train.offsets: must rise from 0 to"):
            TokenStore.open(folder, verify=verify)


def change_manifest(folder, **changes):
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | changes)


def test_damaged_manifests(folder, tmp_path, corpus):
    for place, what in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no manifest.json"),
        (corpus, "a manifest.json of something else"),
    ):
        with pytest.raises(
            UserError, match=f"must be a finished token store, got {what}; make one with `lumi tokenize"
        ):
            TokenStore.open(place)
    whole = (folder / "manifest.json").read_text()
    for changes, message in (
        ({"format": 2}, "format must be 1, got 2"),
        ({"dtype": "uint32"}, "dtype must be uint16 for 320 ids, got uint32"),
        ({"vocab_size": 70000}, "dtype must be uint32 for 70000 ids, got uint16"),
        ({"vocab_size": "320"}, "vocab_size must be an integer"),
        (
            {"splits": {"../train": json.loads(whole)["splits"]["train"]}},
            "splits must be train or validation with their files",
        ),
    ):
        change_manifest(folder, **changes)
        with pytest.raises(UserError, match=message):
            TokenStore.open(folder)
        (folder / "manifest.json").write_text(whole)
    manifest = json.loads(whole)
    manifest["splits"]["train"]["tokens"] += 1
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"manifest.json: size of train.tokens must be \d+ for its counts"):
        TokenStore.open(folder)
    (folder / "manifest.json").write_text(whole[:-20])
    with pytest.raises(UserError, match=r"manifest.json: not valid JSON"):
        TokenStore.open(folder)


# The writer


def test_uint32_past_65536_ids(tmp_path):
    assert (token_dtype(65536).str, token_dtype(65537).str) == ("<u2", "<u4")
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=70000)
    writer.append("train", np.array([1, 69999, 2]), np.array([3]), {"a": (1, 3, 4)})
    assert writer.finish({}).dtype == "uint32"
    assert (tmp_path / "train.tokens").read_bytes() == b"\1\0\0\0" + (69999).to_bytes(
        4, "little"
    ) + b"\2\0\0\0"
    assert TokenStore.open(tmp_path).split("train").tokens[:].tolist() == [1, 69999, 2]


def test_loss_masks_are_bits_across_batches(tmp_path):
    rng = np.random.default_rng(0)
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=100)
    masks = []
    for lengths in ([3], [7, 1], [8], [2, 2, 2], [13]):
        total = sum(lengths)
        masks.append(rng.random(total) < 0.5)
        writer.append(
            "train", np.zeros(total, np.int64), np.array(lengths), {"a": (len(lengths), total, 0)}, masks[-1]
        )
    manifest = writer.finish({"kind": "conversations"}, "plain")
    assert manifest.splits["train"].trained_tokens == int(np.concatenate(masks).sum())
    expected = np.concatenate(masks)
    split = TokenStore.open(tmp_path).split("train")
    assert (tmp_path / "train.mask").read_bytes() == np.packbits(expected).tobytes()
    assert split.mask is not None
    assert len(split.mask) == 5  # 38 bits
    for start in range(38):
        for stop in range(start, 39):
            assert split.loss_mask(start, stop).tolist() == expected[start:stop].tolist()
    (tmp_path / "train.mask").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"train.mask: must be 5 bytes, got 4"):
        TokenStore.open(tmp_path)


def test_no_mask_means_every_token_is_trained(finished):
    split = TokenStore.open(finished).split("train")
    assert split.mask is None
    assert split.loss_mask(3, 9).tolist() == [True] * 6


def test_the_writer_refuses_what_does_not_add_up(tmp_path):
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=100)
    tokens, lengths, counts = np.arange(5), np.array([2, 3]), {"a": (2, 5, 9)}
    for wrong in (100, -1):
        with pytest.raises(UserError, match=f"token ids must be between 0 and 99, got .*{wrong}"):
            writer.append("train", np.array([wrong, 1, 2, 3, 4]), lengths, counts)
    for bad_lengths, bad_counts in (
        ([2, 2], counts),
        ([0, 5], counts),
        (lengths, {"a": (1, 5, 9)}),
        (lengths, {"a": (2, 4, 9)}),
    ):
        with pytest.raises(ValueError, match="lengths must be at least 1 and add up"):
            writer.append("train", tokens, np.array(bad_lengths), bad_counts)
    with pytest.raises(ValueError, match="mask must have one value for each of 5 tokens, got 4"):
        writer.append("train", tokens, lengths, counts, np.ones(4, bool))
    writer.append("train", tokens, lengths, counts)
    with pytest.raises(ValueError, match="mask must be given for every document of a split or for none"):
        writer.append("train", tokens, lengths, counts, np.ones(5, bool))
    writer.close()


# The cache of corpus folders


def test_a_corpus_folder_is_tokenized_once(tokenizer, other_tokenizer, tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus", TEXTS, SOURCES)
    store = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert store.folder == token_cache(corpus, tokenizer) == corpus / ".tokens" / tokenizer.fingerprint[:16]
    assert store.split("train").num_documents + store.split("validation").num_documents == 200
    open_or_tokenize(corpus, other_tokenizer, validation_fraction=FRACTION)
    monkeypatch.setattr(shards, "encode_all", None)  # nothing is encoded again
    assert open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION).manifest == store.manifest
    assert open_or_tokenize(store.folder, tokenizer).manifest == store.manifest
    monkeypatch.undo()
    capsys.readouterr()
    write_corpus(corpus, TEXTS[:100], SOURCES[:100])
    changed = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert "the corpus has changed since; it is tokenized again" in capsys.readouterr().err
    assert sum(split.num_documents for split in changed.splits.values()) == 100


def test_an_outdated_cache_is_made_anew_also_after_an_interruption(tokenizer, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", TEXTS, SOURCES)
    cache = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION).folder
    write_corpus(corpus, TEXTS[:100], SOURCES[:100])

    def interrupted(path):
        (path / "manifest.json").unlink()
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(shards.shutil, "rmtree", interrupted)
    with pytest.raises(Interrupted):
        open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    monkeypatch.undo()
    store = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert sum(split.num_documents for split in store.splits.values()) == 100
    assert list(cache.parent.iterdir()) == [cache]


def test_data_dirs_of_neither_kind(tokenizer, other_tokenizer, finished, tmp_path):
    (tmp_path / "file").write_text("x")
    for place, what in (
        (tmp_path, "a folder without the manifest.json of either"),
        (tmp_path / "no", "nothing there"),
        (tmp_path / "file", "a file"),
    ):
        with pytest.raises(
            UserError,
            match=rf"--data-dirs must name token stores .* or corpus folders .*, got {place}: {what}",
        ):
            open_or_tokenize(place, tokenizer)
    with pytest.raises(
        UserError, match=f"{other_tokenizer.fingerprint}, got a token store of {tokenizer.fingerprint}"
    ):
        open_or_tokenize(finished, other_tokenizer)


def test_tokenizers_travel_to_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert isinstance(copy, Tokenizer)
    assert copy.fingerprint == tokenizer.fingerprint


def test_check_in_pieces(finished, monkeypatch):
    monkeypatch.setattr(token_store, "_CHECK_TOKENS", 7)
    assert TokenStore.open(finished).has_split("train")
