import os
import shutil
import signal

import pytest
from corpora import CHATS, SOURCES, TEXTS, write_chats, write_corpus

from lumi.chat.templates import TEMPLATES
from lumi.config import UserError
from lumi.corpus import read_corpus
from lumi.data import tokenization
from lumi.data.token_cache import check_cache_options, open_or_tokenize, token_cache
from lumi.host.interruption import Interrupted

FRACTION = 0.25


def test_a_corpus_folder_is_tokenized_once(tokenizer, other_tokenizer, tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus", TEXTS, SOURCES)
    store = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert (
        store.folder
        == token_cache(read_corpus(corpus), tokenizer)
        == corpus / ".tokens" / tokenizer.fingerprint[:16]
    )
    assert store.split("train").num_documents + store.split("validation").num_documents == 200
    open_or_tokenize(corpus, other_tokenizer, validation_fraction=FRACTION)
    monkeypatch.setattr(tokenization, "encode_all", None)  # nothing is encoded again
    assert open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION).manifest == store.manifest
    assert open_or_tokenize(store.folder, tokenizer).manifest == store.manifest
    monkeypatch.undo()
    capsys.readouterr()
    write_corpus(corpus, TEXTS[:100], SOURCES[:100])
    changed = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert "the corpus has changed since; it is tokenized again" in capsys.readouterr().err
    assert sum(split.num_documents for split in changed.splits.values()) == 100


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


def test_an_outdated_cache_is_made_anew_also_after_an_interruption(tokenizer, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", TEXTS, SOURCES)
    cache = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION).folder
    write_corpus(corpus, TEXTS[:100], SOURCES[:100])

    def interrupted(path):
        (path / "manifest.json").unlink()
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(Interrupted):
        open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    monkeypatch.undo()
    store = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert sum(split.num_documents for split in store.splits.values()) == 100
    assert list(cache.parent.iterdir()) == [cache]


def test_tokens_of_a_corpus_that_is_read_only_lie_elsewhere(
    tokenizer, other_tokenizer, tmp_path, monkeypatch, capsys
):
    corpus = write_corpus(tmp_path / "corpus", TEXTS, SOURCES)
    inside = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: corpus not in (path, path.parent) and real(path, mode)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    again = open_or_tokenize(corpus, tokenizer, validation_fraction=FRACTION)
    assert again.folder == inside.folder  # they are there already
    capsys.readouterr()
    elsewhere = open_or_tokenize(corpus, other_tokenizer, validation_fraction=FRACTION)
    assert elsewhere.folder.parent == tmp_path / "cache" / "lumi" / "tokens"
    said = f"{corpus}: cannot be written to; its tokens are kept in {elsewhere.folder}"
    assert said in capsys.readouterr().err.splitlines()
    write_corpus(tmp_path / "other", TEXTS[:100], SOURCES[:100])
    named = [
        open_or_tokenize(folder, tokenizer, validation_fraction=FRACTION, cache_dir=tmp_path / "named")
        for folder in (corpus, tmp_path / "other")
    ]
    assert {store.folder.parent for store in named} == {tmp_path / "named"}
    assert [sum(split.num_documents for split in store.splits.values()) for store in named] == [200, 100]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="--cache-dir must be a folder that can be written to"):
        open_or_tokenize(tmp_path / "other", other_tokenizer, validation_fraction=FRACTION)


def test_the_user_s_cache_is_an_absolute_folder(tokenizer, tmp_path, monkeypatch):
    corpus = read_corpus(write_corpus(tmp_path / "corpus", TEXTS, SOURCES))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        place = token_cache(corpus, tokenizer)
        assert place.parent == tmp_path / "home" / ".cache" / "lumi" / "tokens"


def test_a_cache_folder_must_have_a_use(finished, tmp_path):
    check_cache_options(None, [finished])
    check_cache_options(tmp_path, [finished, tmp_path])
    check_cache_options(tmp_path, [finished, "s3://bucket/tokens"], 10**9)
    for data_dirs, got in (([finished], "token stores"), ([], "none")):
        with pytest.raises(UserError, match=f"--cache-dir must come with a corpus folder .*, got {got}"):
            check_cache_options(tmp_path, data_dirs)
    with pytest.raises(UserError, match="--cache-size must come with a URL among --data-dirs, got folders"):
        check_cache_options(None, [finished, tmp_path], 10**9)


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
