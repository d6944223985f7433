"""A tokenizer of prose and code that the tests of this folder share."""

import pytest
from corpora import CODE, PROSE, write_corpus

from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), [PROSE, CODE] * 20)


@pytest.fixture(scope="session")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    train_tokenizer(TokenizerConfig(vocab_size=400), [corpus], folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(folder)
