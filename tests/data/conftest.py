"""Corpora, tokenizers and a token store that the tests of this folder share."""

import shutil

import pytest
from corpora import CHATS, SOURCES, TEXTS, write_chats, write_corpus

from lumi.data.tokenization import tokenize
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), TEXTS, SOURCES)


@pytest.fixture(scope="session")
def chat_corpus(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats"), CHATS, SOURCES)


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    return train_tokenizer(TokenizerConfig(vocab_size=320), [corpus], folder)


@pytest.fixture(scope="session")
def other_tokenizer(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "other"
    return train_tokenizer(TokenizerConfig(vocab_size=310), [corpus], folder)


@pytest.fixture(scope="session")
def finished(corpus, tokenizer, tmp_path_factory):
    """A token store of `corpus`, a quarter of its documents held out."""
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize([corpus], tokenizer, folder, validation_fraction=0.25, num_workers=1)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of `finished`, to be damaged."""
    return shutil.copytree(finished, tmp_path / "tokens")
