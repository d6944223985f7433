"""Tokenizers of others, in the manner of Llama 2: a space before every text, no padding, no chat markers."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_tokenizers import CONFIG, train_model, write_config, write_json_twin
from synthetic import document
from transformers import AutoTokenizer, LlamaTokenizer

from lumi.config import UserError
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.tokenizer import StreamDecoder

MARKERS = {"<|im_start|>": 420, "<|im_end|>": 421}
TEMPLATE = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def texts():
    rng = np.random.default_rng(0)
    ranges = [(32, 127)] * 3 + [(0x80, 0x2500), (0x3000, 0x9000), (0x1F300, 0x1F700), (9, 14)]
    random = [
        "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(40)) for _ in range(150)
    ]
    prose = document(7) + "def f(x):\n    if x:\n\t\treturn '🎉 é' * 2\r\n"
    cuts = [prose[i : i + 50] for i in range(0, len(prose), 5)]
    spaces = [" " * n + "river" + "\n" * n + "  " for n in range(20)]
    awkward = ["", " ", "\n", "\t x", "a\0b", "x  </s><s> [INST]", "<0x0A>", "e\u0301 ｶﾞ ﬁ \u00a0\u3000"]
    return [text for text in [*random, *cuts, *spaces, *awkward] if "▁" not in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = train_model(tmp_path_factory.mktemp("foreign"))
    write_json_twin(folder)
    write_config(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# Judges: SentencePiece, the `tokenizers` library, transformers.


def test_ids_are_those_of_sentencepiece_and_of_the_published_json(tokenizer, folder):
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    published = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(texts()) > 220
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == model.encode(text)
        # The library reads "</s>" as a marker, and puts a space before an empty text.
        if text and "</s>" not in text:
            assert ids == published.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == published.decode(ids) == text
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.control_ids.values())


@pytest.mark.parametrize("config", [None, {}, {"legacy": True}, {"add_prefix_space": False}], ids=str)
def test_the_json_that_is_written_for_a_model_alone_reads_as_the_model(config, tmp_path):
    """Runs of spaces at the beginning of a text too; and a text behind a control token as Lumi reads it."""
    train_model(tmp_path / "given")
    if config is not None:
        write_config(tmp_path / "given", **config)
    tokenizer = load_tokenizer(tmp_path / "given")
    tokenizer.save(tmp_path / "saved")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "given" / "tokenizer.model"))
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    runs = [" " * n + "a" + " " * (20 - n) + "b" for n in range(20)] + [" " * n for n in range(1, 20)]
    prefixed = config != {"add_prefix_space": False}
    for text in [*texts(), *runs]:
        if text and "</s>" not in text:
            ids = written.encode(text, add_special_tokens=False).ids
            assert ids == tokenizer.encode(text)
            assert written.decode(ids) == text
            assert (ids == model.encode(text)) == prefixed
            after = written.encode("</s>" + text, add_special_tokens=False).ids
            assert after == [2, *tokenizer.encode(text, "control")]
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.control_ids) == (tokenizer.fingerprint, tokenizer.control_ids)
    assert (again.bos_id, again.eos_id, again.unk_id) == (1, 2, 0)


def test_a_json_that_lumi_wrote_before_is_the_same_tokenizer(tmp_path):
    """One Metaspace, which puts no space before a text that begins with one."""
    fingerprint = load_tokenizer(train_model(tmp_path)).fingerprint
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][0] | {"prepend_scheme": "first"}
    file.write_text(json.dumps(data))
    assert load_tokenizer(tmp_path / "saved").fingerprint == fingerprint


@pytest.mark.parametrize("reader", [LlamaTokenizer, AutoTokenizer])
@pytest.mark.parametrize("source", ["tokenizer.json", "tokenizer.model"])
def test_transformers_reads_the_same_ids(tokenizer, copied, reader, source):
    if source == "tokenizer.model":
        pytest.importorskip(
            "google.protobuf", reason="without protobuf transformers reads tokenizer.json alone"
        )
        (copied / "tokenizer.json").unlink()
    theirs = reader.from_pretrained(copied)
    # transformers 5 loses a first space.
    plain = [text for text in texts() if not text.startswith(" ") and "</s>" not in text]
    assert len(plain) > 200
    for text in plain:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.unk_id,
    )


def test_a_text_that_continues_has_no_space_before_it(tokenizer, folder):
    theirs = LlamaTokenizer.from_pretrained(folder)
    for text in texts():
        if text and "</s>" not in text:
            ids = tokenizer.encode(text, "text")
            assert [tokenizer.eos_id, *ids] == theirs.encode("</s>" + text, add_special_tokens=False)
            assert tokenizer.decode(ids, continues=True) == text


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.text(), st.sampled_from(["▁", " ", "</s>", "<0x0A>", "\0", "\r\n", "river"]))).map(
        "".join
    )
)
def test_decode_gives_back_every_text(tokenizer, text):
    for continues in (False, True):
        ids = tokenizer.encode(text, "text" if continues else "nothing")
        assert tokenizer.decode(ids, continues) == text
        prefix = "" if continues or not text else " "
        assert sum(tokenizer.token_bytes[ids]) == len(f"{prefix}{text}".encode())
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == text
    assert (
        tokenizer.encode_batch([text]) == [tokenizer.encode_utf8(text.encode())] == [tokenizer.encode(text)]
    )


def test_a_document_is_decoded_behind_its_bos_too(tokenizer):
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(" a b"), tokenizer.eos_id]) == " a b"


# Special ids.


def test_special_ids_of_llama_2(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.pad_id is tokenizer.control_id("<|im_start|>") is tokenizer.chat_template is None
    assert tokenizer.control_ids == {"<s>": 1, "</s>": 2}
    assert tokenizer.control_id("<s>") == 1
    assert tokenizer.control_id("river") is None
    assert tokenizer.vocab_size == 420


def test_special_ids_elsewhere_and_from_the_config(tmp_path):
    train_model(
        tmp_path, unk_id=3, bos_id=2, eos_id=0, pad_id=1, control_symbols=["<|im_start|>", "<|im_end|>"]
    )
    bare = load_tokenizer(tmp_path)
    assert (bare.unk_id, bare.bos_id, bare.eos_id, bare.pad_id) == (3, 2, 0, 1)
    assert (bare.control_id("<|im_start|>"), bare.control_id("<|im_end|>")) == (4, 5)
    assert bare.decode(bare.encode("a river▁ ")) == "a river▁ "
    write_config(tmp_path, eos_token="<|im_end|>", pad_token="<unk>")
    assert (load_tokenizer(tmp_path).eos_id, load_tokenizer(tmp_path).pad_id) == (5, 3)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "</s>"}}))
    assert load_tokenizer(tmp_path).pad_id == 0


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_markers_added_behind_the_model_are_control_pieces(copied, place):
    if place == "tokenizer_config.json":
        ids = {"<s>": 1, "</s>": 2} | MARKERS
        decoder = {str(i): {"content": name, "special": True} for name, i in ids.items()}
        write_config(copied, pad_token="<|im_end|>", added_tokens_decoder=decoder)
    else:
        write_config(copied, pad_token="<|im_end|>")
        (copied / place).write_text(json.dumps(MARKERS))
    tokenizer = load_tokenizer(copied)
    assert (tokenizer.control_id("<|im_start|>"), tokenizer.control_id("<|im_end|>"), tokenizer.pad_id) == (
        420,
        421,
        421,
    )
    assert tokenizer.vocab_size == 422
    assert tokenizer.token_bytes.shape == (422,)
    ids = [420, *tokenizer.encode("user\nhi", "control"), 421]
    assert tokenizer.decode(ids) == "user\nhi"
    assert not set(MARKERS.values()) & set(tokenizer.encode("<|im_start|>user\nhi<|im_end|>"))
    if place == "tokenizer_config.json":
        assert ids == LlamaTokenizer.from_pretrained(copied).encode(
            "<|im_start|>user\nhi<|im_end|>", add_special_tokens=False
        )


# Files.


def test_saving_keeps_every_file_as_it_was(copied, tmp_path):
    write_config(copied, chat_template=TEMPLATE)
    (copied / "special_tokens_map.json").write_text('{"bos_token":  "<s>"}')
    (copied / "added_tokens.json").write_text(json.dumps(MARKERS))
    (copied / "README.md").write_text("not the tokenizer's")
    load_tokenizer(copied).save(tmp_path / "saved")
    kept = {path.name: path.read_bytes() for path in copied.iterdir() if path.name != "README.md"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == kept | {
        "chat_template.jinja": TEMPLATE.encode()
    }
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == load_tokenizer(copied).fingerprint
    assert again.control_ids == {"<s>": 1, "</s>": 2} | MARKERS


def test_the_chat_template_and_another_one(copied, tmp_path):
    write_config(
        copied, chat_template=[{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    )
    assert load_tokenizer(copied).chat_template == TEMPLATE
    write_config(copied, chat_template=TEMPLATE)
    tokenizer = load_tokenizer(copied)
    other = tokenizer.with_chat_template("{{ messages[0].content }}")
    assert (tokenizer.chat_template, other.chat_template) == (TEMPLATE, "{{ messages[0].content }}")
    other.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == other.chat_template
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()) == CONFIG
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    (copied / "chat_template.jinja").write_text("first")
    assert load_tokenizer(copied).chat_template == "first"


# What cannot be imported.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"byte_fallback": False, "vocab_size": 150}, "it has 0 of the 256 byte pieces"),
        ({"model_type": "unigram", "vocab_size": 330}, "it is a unigram model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises"),
        ({"remove_extra_whitespaces": True}, "it normalises"),
        (
            {"user_defined_symbols": ["<|user|>"]},
            "it has user-defined pieces, which would be read out of a user's text",
        ),
        ({"eos_id": -1}, "must have an eos token, got none; name one as eos_token in tokenizer_config.json"),
    ],
    ids=str,
)
def test_models_that_are_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        load_tokenizer(train_model(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"eos_token": "<|end|>"},
            r"eos_token in tokenizer_config\.json must be a token of the vocabulary, got '<\|end\|>'",
        ),
        (
            {"added_tokens_decoder": {"500": {"content": "<x>"}}},
            r"the added token '<x>' must have the id 420 by the vocabulary, and no gap before it, got 500",
        ),
        ({"added_tokens_decoder": {"7": {"content": "<x>"}}}, r"must have the id 420 .*, got 7"),
        ({"added_tokens_decoder": {"420": {"content": "<s>"}}}, r"'<s>' must have the id 1 .*, got 420"),
        (
            {"added_tokens_decoder": {"x": {"content": "<x>"}}},
            r"an added token must be a name and an id, got '<x>': 'x'",
        ),
        ({"added_tokens_decoder": [1]}, r"tokenizer_config\.json: must hold a JSON object, got \[1\]"),
    ],
    ids=str,
)
def test_configs_that_are_refused(copied, changes, reason):
    write_config(copied, **changes)
    with pytest.raises(UserError, match=reason):
        load_tokenizer(copied)
