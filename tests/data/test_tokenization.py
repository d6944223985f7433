import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from corpora import CHATS, SOURCES, TEXTS, write_chats, write_corpus, write_pairs
from hugging_face_tokenizers import make
from synthetic import pair

from lumi import cli
from lumi.chat.messages import Message
from lumi.chat.pairs import Pair, render_pair
from lumi.chat.rendering import render
from lumi.chat.templates import TEMPLATES
from lumi.config import UserError, read_json
from lumi.data import encoding
from lumi.data.store_writer import StoreWriter
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import tokenize
from lumi.tokenizer.loading import load_tokenizer

FRACTION = 0.25


def expected_split(text):
    rank = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if rank / 2**64 < FRACTION else "train"


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    assert files.keys() == {
        "manifest.json",
        "provenance.json",
        "train.blocks",
        "train.offsets",
        "train.tokens",
    }
    assert files["train.tokens"] == bytes([1, 0, 2, 0, 1, 0, 6, 0, 2, 0])  # BOS EOS, BOS <0x00> EOS
    assert files["train.offsets"] == b"".join(value.to_bytes(8, "little") for value in (0, 2, 5))


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
    differences = r"\(validation_fraction 0\.25 there, 0\.5 asked for\)"
    with pytest.raises(UserError, match=rf"other inputs {differences}; choose another --output-dir"):
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
    message = (
        "--corpus-dirs must hold at least one document, got none; 4 dropped: no_answer_within_max_tokens"
    )
    with pytest.raises(UserError, match=f"{message}; raise --max-tokens"):
        tokenize(
            [corpus],
            tokenizer,
            tmp_path / "t",
            validation_fraction=0,
            **(arguments | {"max_tokens": limit - 1}),
        )
    assert not (tmp_path / "t").exists()


def test_conversations_whose_reasoning_has_no_place_are_dropped_and_counted(tokenizer, tmp_path):
    plain = (Message("user", "q"), Message("assistant", "a"))
    thought = (Message("user", "q"), Message("assistant", "a", "thought"))
    alone, with_others = tmp_path / "alone", tmp_path / "with_others"
    arguments = {"template": TEMPLATES["plain"], "validation_fraction": 0, "num_workers": 1}
    train = tokenize(
        [write_chats(with_others, [thought, plain])], tokenizer, tmp_path / "s", **arguments
    ).splits["train"]
    assert (train.documents, train.dropped) == (
        1,
        {"refused_by_template: must have a place for reasoning_content": 1},
    )
    message = (
        "1 dropped: refused_by_template: must have a place for reasoning_content; choose another --template"
    )
    with pytest.raises(UserError, match=message):
        tokenize([write_chats(alone, [thought])], tokenizer, tmp_path / "t", **arguments)


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
    bare = tokenizer.with_chat_template(None)
    for folders, others, chosen, arguments, message in (
        (
            [chat_corpus, corpus],
            [],
            tokenizer,
            {},
            f"must be all of texts, .*, got conversations in {chat_corpus} and texts in {corpus}",
        ),
        (
            [chat_corpus],
            [corpus],
            tokenizer,
            {},
            f"must be all of texts, .*, got conversations in {chat_corpus} and texts in {corpus}",
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
            bare,
            {},
            "--template must be given where the tokenizer has no chat template; run .* one of chatml, alp",
        ),
    ):
        with pytest.raises(UserError, match=message):
            tokenize(folders, chosen, tmp_path / "s", validation_corpus_dirs=others, **arguments)
        assert not (tmp_path / "s").exists()


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
    share = f"{split.trained_tokens:,} trained ({split.trained_tokens / split.tokens:.1%})"
    line = f"1 conversations, {split.tokens:,} tokens, {share}; 1 dropped: no_answer; 1 truncated"
    assert output == f"train: {line}\nvalidation: {line}\n"
    output = lumi_tokenize("t", "--corpus-dirs", corpus, "--validation-fraction", 0.25)
    assert re.match(r"train: 1\d\d documents, [\d,]+ tokens, \d\.\d\d bytes per token\nvalidation: ", output)


def test_a_tokenizer_that_changes_texts_is_named(corpus, tmp_path, capsys):
    normalizing = load_tokenizer(make(tmp_path / "qwen", "qwen"))
    tokenize([corpus], normalizing, tmp_path / "store")
    line = "the tokenizer does not keep every text as it is: its normalizer (NFC) changes characters\n"
    assert capsys.readouterr().err.count(line) == 1
    store = TokenStore.open(tmp_path / "store").split("train")
    ids = store.tokens[: int(store.offsets[1])].tolist()
    assert ids[-1] == normalizing.eos_id
    assert not set(ids[:-1]) & set(normalizing.control_ids.values())  # nothing stands before a text


def test_a_store_of_pairs(tokenizer, tmp_path):
    """Two documents for each pair, whole, in order; pairs of one question are on one side."""
    (tmp_path / "corpus").mkdir()
    pairs = [pair(seed) for seed in range(40)]
    pairs += [Pair(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]
    write_pairs(tmp_path / "corpus", pairs)
    whole = [render_pair(tokenizer, TEMPLATES["chatml"], each) for each in pairs]
    lengths = [max(len(side.ids) for side in sides) for sides in whole]
    limit = sorted(lengths)[60]
    manifest = tokenize(
        [tmp_path / "corpus"],
        tokenizer,
        tmp_path / "s",
        validation_fraction=0.25,
        template=TEMPLATES["chatml"],
        max_tokens=limit,
    )
    assert manifest.pairs
    kept = [sides for sides, length in zip(whole, lengths, strict=True) if length <= limit]
    assert 55 < len(kept) < 80
    found = {}
    for name, split in TokenStore.open(tmp_path / "s").splits.items():
        assert split.pairs
        bounds = split.offsets.astype(int).tolist()
        found[name] = [
            (split.tokens[begin:end].tolist(), split.loss_mask(begin, end).tolist())
            for begin, end in itertools.pairwise(bounds)
        ]
        assert manifest.splits[name].describe(pairs=True).startswith(f"{split.num_documents // 2} pairs, ")
        mine = [side[:2] for sides in kept for side in sides if side[:2] in found[name]]
        assert found[name] == mine
    assert not any(document in found["train"] for document in found["validation"])
    assert len(found["train"]) + len(found["validation"]) == 2 * len(kept)
    dropped = [split.dropped["pair_beyond_max_tokens"] for split in manifest.splits.values()]
    assert sum(dropped) == 80 - len(kept)


def test_pairs_whose_reasoning_has_no_place_are_dropped_whole_and_counted(tokenizer, tmp_path):
    (tmp_path / "corpus").mkdir()
    plain = pair(0)
    thoughts = [side._replace(reasoning="thought") for side in (plain.chosen[0], plain.rejected[0])]
    pairs = [plain._replace(chosen=tuple(thoughts[:1])), plain._replace(rejected=tuple(thoughts[1:])), plain]
    write_pairs(tmp_path / "corpus", pairs)
    arguments = {"template": TEMPLATES["plain"], "validation_fraction": 0, "num_workers": 1}
    train = tokenize([tmp_path / "corpus"], tokenizer, tmp_path / "s", **arguments).splits["train"]
    assert (train.documents, train.dropped) == (
        2,
        {"refused_by_template: must have a place for reasoning_content": 2},
    )


def test_pairs_and_conversations_are_two_stores(chat_corpus, tokenizer, tmp_path):
    (tmp_path / "corpus").mkdir()
    write_pairs(tmp_path / "corpus", [pair(0)])
    with pytest.raises(UserError, match=r"all of pairs, got conversations in .* and pairs in .*two stores"):
        tokenize([chat_corpus, tmp_path / "corpus"], tokenizer, tmp_path / "s")
