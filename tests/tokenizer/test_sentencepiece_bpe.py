import json
import pickle
import shutil

import numpy as np
import pytest
import sentencepiece
from corpora import CODE, PROSE
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from lumi.config import UserError
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.sentencepiece_bpe import FIRST_BYTE_ID, FIRST_LEARNED_ID, SPECIAL_PIECES
from lumi.tokenizer.tokenizer import StreamDecoder, Tokenizer

AWKWARD = [
    "",
    " ",
    "     ",
    "\n",
    "\r\n",
    "\t\tx\n\n\n",
    "  leading and trailing  ",
    "a\0b\x01\x7f",
    "▁",
    "a▁b▁▁ c",
    "▁ ▁",
    "▅",
    "<s>hello</s>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<unk><pad><0x0A>",
    "e\u0301 caf\u00e9 e\u0301\u0323",
    "🎉👩‍👩‍👧‍👦🇩🇪",
    "漢字かな",
    "\ue000\U000f0000\U0010ffff\ufffe\u0378",
    "\ufeff\ufffd\u200b\u00a0\u2028",
    PROSE,
    CODE,
]


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_ids_of_the_recipe(tokenizer, folder):
    assert [tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == [0, 1, 2, 3]
    assert [tokenizer.control_id("<|im_start|>"), tokenizer.control_id("<|im_end|>")] == [4, 5]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    first = "<unk> <s> </s> <pad> <|im_start|> <|im_end|> <0x00>".split()
    assert [model.id_to_piece(i) for i in range(7)] == first
    assert tokenizer.vocab_size == len(model) == 400
    assert all(model.is_control(i) for i in range(1, 6))


@pytest.mark.parametrize("text", AWKWARD)
def test_decode_gives_back_awkward_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=FIRST_BYTE_ID) >= FIRST_BYTE_ID  # no special id


MARKS = st.sampled_from(
    ["▁", "<s>", "</s>", "<|im_start|>", "<0x0A>", "\0", "    ", "\r\n", "e\u0301", "result"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(), MARKS)).map("".join))
def test_decode_gives_back_every_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(FIRST_BYTE_ID <= i < tokenizer.vocab_size for i in ids)
    assert sum(tokenizer.token_bytes[ids]) == len(text.encode())
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == text


def test_u2581_is_three_bytes_and_spaces_around_it_stay(tokenizer):
    ids = tokenizer.encode("▁")
    assert ids == [FIRST_BYTE_ID + byte for byte in (0xE2, 0x96, 0x81)]
    assert tokenizer.encode("x▁ y") == tokenizer.encode("x") + ids + tokenizer.encode(" y")


def test_newlines_and_indentation_are_learned(tokenizer):
    assert "        " in pieces(tokenizer, "\n        x")
    assert pieces(tokenizer, "12") == ["1", "2"]
    assert min(tokenizer.encode("a\nb")) >= FIRST_LEARNED_ID


def test_token_bytes(tokenizer):
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[:6].tolist() == [0] * 6
    assert set(tokenizer.token_bytes[FIRST_BYTE_ID:FIRST_LEARNED_ID].tolist()) == {1}
    (the,) = tokenizer.encode(" the")
    assert tokenizer.token_bytes[the] == 4


def test_encode_batch(tokenizer):
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


def test_tokenizers_travel_to_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert isinstance(copy, Tokenizer)
    assert copy.fingerprint == tokenizer.fingerprint


def without_markers(texts):
    return [text for text in texts if "▁" not in text and not any(piece in text for piece in SPECIAL_PIECES)]


def foreign_texts():
    rng = np.random.default_rng(0)
    ranges = [(32, 127)] * 3 + [(0x80, 0x2500), (0x3000, 0x9000), (0x1F300, 0x1F700), (9, 14)]
    random = [
        "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(40)) for _ in range(200)
    ]
    cuts = [(PROSE + CODE)[i : i + 50] for i in range(0, 300, 7)]
    return without_markers(AWKWARD + random + cuts + [" " * n + "x" + "\n" * n for n in range(20)])


@pytest.mark.parametrize("reader", [LlamaTokenizer, AutoTokenizer])
@pytest.mark.parametrize("source", ["tokenizer.json", "tokenizer.model"])
def test_transformers_reads_the_same_ids(tokenizer, folder, tmp_path, reader, source):
    if source == "tokenizer.model":
        pytest.importorskip(
            "google.protobuf", reason="without protobuf transformers reads tokenizer.json alone"
        )
    shutil.copytree(folder, tmp_path / "copy")
    if source == "tokenizer.model":
        (tmp_path / "copy" / "tokenizer.json").unlink()
    theirs = reader.from_pretrained(tmp_path / "copy")
    texts = foreign_texts()
    assert len(texts) > 250
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == text
        assert theirs.decode([1, *ids, 2], skip_special_tokens=True) == text
    assert len(theirs) == 400
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (
        1,
        2,
        3,
        0,
    )
    assert set(theirs.all_special_ids) == {0, 1, 2, 3, 4, 5}


def test_the_chat_template_as_transformers_renders_it(tokenizer, folder):
    theirs = LlamaTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    question, answer = "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\nyo<|im_end|>\n"
    assert text == f"<s>{question}{answer}<|im_start|>assistant\n"
    assert theirs.apply_chat_template(turns[:1], tokenize=False) == "<s><|im_start|>user\nhi<|im_end|>\n"
    ids = theirs.apply_chat_template(turns[:1])["input_ids"]
    assert ids == [1, 4, *tokenizer.encode("user\nhi"), 5, *tokenizer.encode("\n")]


def test_save_beside_other_files(tokenizer, tmp_path, folder):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a model card")
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint
    assert (tmp_path / "README.md").read_text() == "a model card"
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(UserError, match="holds another tokenizer"):
        tokenizer.save(tmp_path)


def test_an_edited_chat_template_travels(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    load_tokenizer(tmp_path / "copy").save(tmp_path / "final")
    assert (tmp_path / "final" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_edited_config_is_followed_and_kept(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|im_end|>"}))
    edited = load_tokenizer(tmp_path / "copy")
    assert (edited.bos_id, edited.eos_id, edited.pad_id) == (1, 5, 3)
    edited.save(tmp_path / "final")
    assert (tmp_path / "final" / "tokenizer_config.json").read_bytes() == file.read_bytes()


def test_a_model_without_byte_pieces_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROSE, CODE] * 5),
        model_prefix=str(tmp_path / "other"),
        vocab_size=80,
        model_type="bpe",
        minloglevel=2,
    )
    message = "must be a SentencePiece BPE model with byte fallback .* it has 0 of the 256 byte pieces; make"
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "other.model")
