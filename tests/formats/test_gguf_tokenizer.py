"""Tokenizers that come out of GGUF files: they encode as those that went in, also for transformers."""

import pytest
import transformers
from gguf_files import FOREIGN, foreign, texts, write

from lumi.config import UserError
from lumi.formats.gguf_file import GgufFile, open_gguf
from lumi.formats.gguf_tokenizer import read_tokenizer
from lumi.formats.hf_config import end_ids

KEY = "tokenizer.ggml."


@pytest.fixture(scope="module", params=["lumi", *FOREIGN])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tokenizer, tmp_path_factory):
    """A tokenizer, and what became of it in a file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    found = tokenizer if kind == "lumi" else foreign(folder / "tokenizer", kind)
    return found, read_tokenizer(open_gguf(write(folder, found)))


def test_ids(pair):
    tokenizer, other = pair
    for text in texts(300):
        assert other.encode(tokenizer.normalize(text)) == tokenizer.encode(text)
    ids = tokenizer.encode("The river\n é")
    assert other.decode(ids) == tokenizer.decode(ids)


def test_all_else(pair, kind):
    tokenizer, other = pair
    assert other.extends(tokenizer)
    assert other.vocab_size == tokenizer.vocab_size
    assert other.control_ids == tokenizer.control_ids
    assert (other.bos_id, other.eos_id, other.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert other.unk_id == tokenizer.unk_id
    assert other.begin_ids == tokenizer.begin_ids
    assert other.eos_ids == tuple(end_ids(tokenizer))
    assert (other.chat_template or None) == (tokenizer.chat_template or None)
    if kind in ("smollm2", "llama-3", "gpt-2"):
        assert other.fingerprint == tokenizer.fingerprint


def test_transformers_reads_it(pair, tmp_path, kind):
    _, other = pair
    other.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    candidates = (
        [text for text in texts(300) if not text.startswith(" ")] if "llama 2" in kind else texts(300)
    )
    for text in candidates:
        if "<" not in text and "[PAD" not in text:  # transformers reads control tokens out of a text
            assert theirs.encode(text) == [*other.begin_ids, *other.encode(text)]


@pytest.fixture
def change(tokenizer, tmp_path_factory):
    """Read a tokenizer with changed metadata; None removes a key."""
    file = open_gguf(write(tmp_path_factory.mktemp("file"), tokenizer))

    def change(**changes):
        metadata = dict(file.metadata) | {f"{KEY}{key}": value for key, value in changes.items()}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        return read_tokenizer(GgufFile(file.path, metadata, file.tensors))

    return change


FAULTS = {
    "no tokens": ({"tokens": None}, "tokens must be an array of the type str, got None"),
    "no types": ({"token_type": None}, "token_type must be an array of the type int, got None"),
    "few types": (
        {"token_type": [1, 2]},
        "must name each token once and give its type, got 387 tokens of 387",
    ),
    "a name twice": ({"tokens": ["a"] * 387}, "got 387 tokens of 1 names and 387 types"),
    "no model": ({"model": None}, "model is missing in the metadata"),
    "another model": ({"model": "bert"}, "model must be llama or gpt2, got 'bert'"),
    "no scores": ({"scores": None}, "scores must be an array of the type float"),
    "few scores": ({"scores": [0.0]}, "the vocabulary must be of SentencePiece, with scores"),
    "a unigram model": (
        {"scores": [-0.5] * 387},
        "scores must be those of BPE, got those of a unigram model",
    ),
    "no unknown": ({"unknown_token_id": None}, "the vocabulary must be of SentencePiece"),
    "a large id": ({"eos_token_id": 384}, "eos_token_id must be an id below 384, got 384"),
    "no end": (
        {"eos_token_id": None, "eot_token_id": None},
        "must have an eos token, got none",
    ),
    "no beginning": ({"bos_token_id": None}, "bos_token_id is missing, though .*add_bos_token is set"),
    "an end after each text": ({"add_eos_token": True}, "add_eos_token must not be set, got true"),
    "no words": ({"model": "gpt2", "pre": None}, "pre is missing in the metadata"),
    "other words": ({"model": "gpt2", "pre": "default"}, "pre must be gpt-2, .*, got 'default'"),
    "no merges": ({"model": "gpt2", "pre": "gpt-2"}, "merges must be an array of the type str, got None"),
    "a merge of nothing": (
        {"model": "gpt2", "pre": "gpt-2", "merges": ["zz yy"]},
        "must be a file that the `tokenizers` library reads",
    ),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_metadata_that_do_not_fit(change, changes, message):
    with pytest.raises(UserError, match=message):
        change(**changes)


def test_without_what_has_a_default(change, tokenizer):
    """llama.cpp begins a text of SentencePiece by BOS and a space, if nothing is said."""
    found = change(add_bos_token=None, add_space_prefix=None)
    assert found.begin_ids == (tokenizer.bos_id,)
    assert found.encode("river") == tokenizer.encode(" river")
