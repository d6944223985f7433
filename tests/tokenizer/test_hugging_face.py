"""Tokenizers of others from `tokenizer.json`; transformers judges the ids."""

import json
import unicodedata

import numpy as np
import pytest
from hugging_face_tokenizers import RECIPES, make
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_tokenizers import train_model, write_config
from synthetic import document
from transformers import AutoTokenizer

from lumi.config import UserError
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.tokenizer import StreamDecoder

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]


def texts():
    rng = np.random.default_rng(0)
    ranges = [(32, 127)] * 3 + [(0x80, 0x2500), (0x300, 0x370), (0x3000, 0x9000), (0x1F300, 0x1F700), (9, 14)]
    random = [
        "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(40)) for _ in range(300)
    ]
    prose = document(7) + "def f(x):\n    if x:\n\t\treturn '🎉 é' * 2\r\n don't I'LL 1234567 12 "
    cuts = [prose[i : i + 50] for i in range(0, len(prose), 5)]
    spaces = [" " * n + "river" + "\n" * n + "  " for n in range(20)]
    return [
        *random,
        *cuts,
        *spaces,
        "",
        " ",
        "\t x",
        "a\0b",
        "x </s><s>",
        "▁",
        "e\u0301 ｶﾞ ﬁ \u00a0\u3000",
        "<think>x",
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {recipe: make(tmp_path_factory.mktemp(recipe), recipe) for recipe in RECIPES}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def folder(folders, recipe):
    return folders[recipe]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_ids_are_those_of_transformers(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(texts()) > 350
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert [*tokenizer.begin_ids, *ids] == theirs.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.encode(text, "control") == tokenizer.encode(text, "text") == ids
    assert tokenizer.encode_batch(texts()) == list(map(tokenizer.encode, texts()))
    assert tokenizer.vocab_size == len(theirs)
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(tokenizer, f"{role}_id") == getattr(theirs, f"{role}_token_id")


def test_what_stands_before_a_text(folders):
    begins = {recipe: load_tokenizer(folder).begin_ids for recipe, folder in folders.items()}
    assert begins == {"smollm2": (), "llama-3": (0,), "qwen": ()}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*MARKERS, " ", "▁", "\r\n", "river"]))).map("".join))
def test_decode_gives_back_every_text_and_no_text_becomes_a_control_token(tokenizer, recipe, text):
    ids = tokenizer.encode(text)
    expected = unicodedata.normalize("NFC", text) if recipe == "qwen" else text
    assert tokenizer.decode(ids) == tokenizer.normalize(text) == expected
    assert sum(tokenizer.token_bytes[ids]) == len(expected.encode())
    assert not set(ids) & set(tokenizer.control_ids.values())
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == expected


def test_what_a_normalizer_changes_is_said(folders):
    losses = {recipe: load_tokenizer(folder).loss for recipe, folder in folders.items()}
    nfc = "its normalizer (NFC) changes characters"
    assert losses == {"smollm2": None, "llama-3": None, "qwen": nfc}


def test_added_tokens_that_are_not_special_are_text(folders):
    tokenizer = load_tokenizer(folders["qwen"])
    (think,) = tokenizer.encode("<think>")
    assert tokenizer.decode([think]) == "<think>"
    assert "<think>" not in tokenizer.control_ids


def test_bytes_without_a_token_are_named(folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text())
    del data["model"]["vocab"]["ā"]  # the byte 01
    broken = tmp_path / "tokenizer.json"
    broken.write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    if tokenizer.loss is None or "NFC" not in tokenizer.loss:
        assert tokenizer.loss == "it has no token for the bytes 01, so characters with these vanish"
    assert tokenizer.normalize("a\x01b") == "ab"


# Files.


def test_saving_keeps_every_file_as_it_was(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint
    other = make(tmp_path / "other", "llama-3" if "qwen" in str(folder) else "qwen")
    with pytest.raises(UserError, match="holds another tokenizer; choose another folder"):
        tokenizer.save(other)


def test_the_fingerprint_survives_a_save_by_transformers(folder, tokenizer, tmp_path):
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.control_ids, again.begin_ids) == (tokenizer.control_ids, tokenizer.begin_ids)
    assert again.chat_template == tokenizer.chat_template


def test_the_fingerprint_is_of_what_decides_the_ids(folders, tmp_path):
    data = json.loads((folders["smollm2"] / "tokenizer.json").read_text())

    def fingerprint(data, **config):
        make(tmp_path, "smollm2", **config)
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        return load_tokenizer(tmp_path).fingerprint

    first = fingerprint(data)
    data["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    data["model"]["merges"] = [
        " ".join(merge) for merge in data["model"]["merges"]
    ]  # as older files write them
    assert fingerprint(data) == first
    data["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    assert fingerprint(data) != first
    data["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = True
    data["model"]["merges"].pop()
    assert fingerprint(data) != first


@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_special_tokens_that_stand_in_the_config_alone(tmp_path, key):
    make(tmp_path, "llama-3", **{key: ["<|tool|>", "<|more|>"]})
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for name in ("<|tool|>", "<|more|>"):
        assert tokenizer.control_id(name) == theirs.convert_tokens_to_ids(name)
    assert not set(tokenizer.encode("<|tool|>")) & set(tokenizer.control_ids.values())


def test_all_ids_that_end_a_text(tmp_path):
    make(tmp_path, "qwen")
    assert load_tokenizer(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2, 417]}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 0, 417)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 0)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"eos_token_id must be an id or a list of ids, got </s>"):
        load_tokenizer(tmp_path)


# The flags beside a model in the manner of Llama 2.


@pytest.mark.parametrize(
    "flags",
    [
        {"legacy": True},
        {"legacy": False},
        {"add_prefix_space": False},
        {"add_bos_token": False},
        {"add_bos_token": False, "legacy": True, "add_prefix_space": True},
    ],
    ids=str,
)
def test_flags_of_llama_tokenizers_count(tmp_path, flags):
    train_model(tmp_path)
    write_config(tmp_path, **flags)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")  # with tokenizer.json, which transformers reads
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in texts():
        if not text or text.startswith((" ", "▁")) or "▁" in text or "<" in text:
            continue  # transformers loses a first space, and reads markers out of texts
        assert [*tokenizer.begin_ids, *tokenizer.encode(text)] == theirs.encode(text)
        after_control = theirs.encode("</s>" + text, add_special_tokens=False)
        assert [2, *tokenizer.encode(text, "control")] == after_control
    assert tokenizer.encode("river", "text") == tokenizer.encode_utf8(b"river", "text")


# What cannot be imported.


def test_other_kinds_of_models_are_refused(folders, tmp_path):
    data = json.loads((folders["qwen"] / "tokenizer.json").read_text())

    def refused(**changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | changes))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        return str(error.value)

    assert "must be BPE, of bytes (ByteLevel) or with byte_fallback, got WordPiece" in refused(
        model={"type": "WordPiece"}
    )
    no_bytes = {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}
    assert "must be BPE, of bytes (ByteLevel) or with byte_fallback, got BPE without either" in refused(
        **no_bytes
    )
    few = data["model"] | {"vocab": {"a": 0, "<|im_end|>": 1}, "merges": []}
    assert "must have a token for each byte, to spell every text, got 1 of 243" in refused(
        model=few, added_tokens=[]
    )
    assert "must be a file that the `tokenizers` library reads, got " in refused(
        normalizer={"type": "Strange"}
    )
    assert "must be a file that the `tokenizers` library reads, got " in refused(added_tokens=[1])
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(UserError, match=r"an object with a model, got \[1\]; copy the file again"):
        load_tokenizer(tmp_path)


def test_an_eos_token_is_needed(tmp_path):
    make(tmp_path, "qwen", eos_token=None)
    with pytest.raises(UserError, match=r"must have an eos token, got none; name one as eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"extra_special_tokens": 5}, "extra_special_tokens must be a list of names of tokens, got 5"),
        (
            {"additional_special_tokens": "<x>"},
            "additional_special_tokens must be a list .* got '<x>'",
        ),
        ({"additional_special_tokens": ["\ud800"]}, "must be a list of names of tokens"),
        ({"added_tokens_decoder": {"2": [1]}}, "an added token must be a name and an id, got '': 2"),
        ({"eos_token": "\ud800"}, "eos_token must be the name of a token"),
        ({"eos_token": 3}, "eos_token must be the name of a token, got 3"),
    ],
    ids=str,
)
def test_names_that_are_none(tmp_path, config, message):
    make(tmp_path, "qwen", **config)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_control_tokens_that_eat_white_space_are_refused(folders, tmp_path):
    make(tmp_path, "qwen")
    data = json.loads((folders["qwen"] / "tokenizer.json").read_text())
    data["added_tokens"][2]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(
        UserError, match="must stand for itself alone, without lstrip, rstrip and single_word"
    ):
        load_tokenizer(tmp_path)
