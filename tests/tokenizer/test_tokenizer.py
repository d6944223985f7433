import json
import shutil

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from lumi.config import UserError, load_config
from lumi.corpus.folder import CorpusWriter
from lumi.tokenizer import training as tokenizer_training
from lumi.tokenizer.files import transformers_tokenizer
from lumi.tokenizer.tokenizer import FIRST_BYTE_ID, FIRST_LEARNED_ID, SPECIAL_PIECES, StreamDecoder, Tokenizer
from lumi.tokenizer.training import TokenizerConfig, sample_chunks, split_chunks, train_tokenizer

PROSE = "The quick brown fox jumps over the lazy dog, and 1234 other things happen on Monday.\n\nAnother paragraph follows here."
CODE = "def total(values):\n    result = 0\n    for value in values:\n        if value:\n            result += value\n    return result\n"
CONFIG = TokenizerConfig(vocab_size=400)

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


def write_corpus(folder, texts, sources=None):
    sources = sources or ["prose"] * len(texts)
    with CorpusWriter(folder, 1 << 20) as writer:
        for text, source in zip(texts, sources, strict=True):
            writer.add(text, source, len(text.encode()))
        kept = [
            {"name": name, "origin": "made up", "kept": sources.count(name)} for name in sorted(set(sources))
        ]
        writer.commit({"documents": len(texts), "sources": kept}, "a card")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), [PROSE, CODE] * 20)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    train_tokenizer(CONFIG, [corpus], folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_ids_of_the_recipe(tokenizer, folder):
    named = [
        tokenizer.unk_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.im_start_id,
        tokenizer.im_end_id,
    ]
    assert named == [0, 1, 2, 3, 4, 5]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [model.id_to_piece(i) for i in range(7)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<0x00>",
    ]
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


def test_special_ids_decode_to_nothing_and_cut_characters_to_replacements(tokenizer):
    party = tokenizer.encode("🎉")
    assert len(party) == 4
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 4, 5, 2, 3, 0]) == "hi"
    assert tokenizer.decode(np.array(party[:3])) == "\ufffd"
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(i) for i in party] == ["", "", "", "🎉"]
    assert [decoder.feed(i) for i in party[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


@pytest.mark.parametrize("bad", [-1, 400])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(UserError, match=f"token id must be between 0 and 399, got {bad}"):
        tokenizer.decode([7, bad])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
        tokenizer.encode("é \ud800")
    with pytest.raises(UserError, match=r"U\+DFFF at character 0"):
        tokenizer.encode_batch(["fine", "\udfff"])


def test_encode_batch(tokenizer):
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


# Judge: transformers.


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
    assert (
        text
        == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert theirs.apply_chat_template(turns[:1], tokenize=False) == "<s><|im_start|>user\nhi<|im_end|>\n"
    ids = theirs.apply_chat_template(turns[:1])["input_ids"]
    assert ids == [1, 4, *tokenizer.encode("user\nhi"), 5, *tokenizer.encode("\n")]


# Files.


def test_training_is_deterministic_and_an_equal_folder_is_kept(corpus, folder, tokenizer, tmp_path, capsys):
    again = train_tokenizer(CONFIG, [corpus], tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert again.fingerprint == tokenizer.fingerprint
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "again").stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask says
    capsys.readouterr()
    train_tokenizer(CONFIG, [corpus], folder)
    assert f"already holds this tokenizer (fingerprint {tokenizer.fingerprint})" in capsys.readouterr().err


def test_another_tokenizer_or_folder_is_not_overwritten(corpus, folder, tokenizer, tmp_path):
    before = (folder / "tokenizer.model").read_bytes()
    with pytest.raises(
        UserError, match=f"holds another tokenizer .fingerprint {tokenizer.fingerprint}, this one is"
    ):
        train_tokenizer(TokenizerConfig(vocab_size=390), [corpus], folder)
    assert (folder / "tokenizer.model").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="--output-dir must be new, empty or a tokenizer folder"):
        train_tokenizer(CONFIG, [corpus], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_save_beside_other_files(tokenizer, tmp_path, folder):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a model card")
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint
    assert (tmp_path / "README.md").read_text() == "a model card"
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(UserError, match="holds another tokenizer"):
        tokenizer.save(tmp_path)


def test_an_edited_chat_template_travels(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(tmp_path / "copy").save(tmp_path / "final")
    assert (tmp_path / "final" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_edited_config_is_followed_and_kept(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|im_end|>"}))
    edited = Tokenizer.load(tmp_path / "copy")
    assert (edited.bos_id, edited.eos_id, edited.pad_id) == (1, 5, 3)
    edited.save(tmp_path / "final")
    assert (tmp_path / "final" / "tokenizer_config.json").read_bytes() == file.read_bytes()


def test_the_card(folder, tokenizer):
    card = (folder / "README.md").read_text()
    assert "400 pieces" in card
    assert tokenizer.fingerprint in card
    assert "40 from prose (made up)" in card
    assert "| `byte_fallback` | `True` |" in card
    measured = len((PROSE + CODE).encode()) / len(tokenizer.encode(PROSE) + tokenizer.encode(CODE))
    assert f"{measured:.2f} bytes of UTF-8 per token" in card


def test_files_that_are_no_tokenizer(folder, tmp_path):
    command = r"lumi tokenizer --config configs/tokenizer/32k\.json --corpus-dirs"
    with pytest.raises(
        UserError, match=rf"nowhere: must be a tokenizer folder .* no such file or folder.*{command}"
    ):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"the folder holds no tokenizer.model; .*{command}"):
        Tokenizer.load(tmp_path)
    model = (folder / "tokenizer.model").read_bytes()
    for damaged in (b"", b"hello", model[: len(model) // 2]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"tokenizer.model: must be .*{command}"):
            Tokenizer.load(tmp_path)


def test_one_changed_byte_is_noticed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = bytearray((folder / "tokenizer.model").read_bytes())
    place = model.index("▁the".encode())
    model[place + 3] = ord("T")
    (tmp_path / "copy" / "tokenizer.model").write_bytes(model)
    with pytest.raises(UserError, match=r"SHA-256 must be [0-9a-f]{64} .*the file is corrupt"):
        Tokenizer.load(tmp_path / "copy")


def test_a_model_without_byte_pieces_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROSE, CODE] * 5),
        model_prefix=str(tmp_path / "other"),
        vocab_size=80,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(
        UserError,
        match=r"must be a SentencePiece BPE model with byte fallback .* it has 0 of the 256 byte pieces; make a",
    ):
        Tokenizer.load(tmp_path / "other.model")


def test_a_model_that_would_change_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizer_training._RECIPE, "remove_extra_whitespaces", True)
    with pytest.raises(UserError, match="keeps every text as it is, but it normalises"):
        train(tmp_path, [PROSE, CODE] * 5, vocab_size=320)


def test_merges_by_hand():
    special = ["<unk>", "<s>"]
    learned = ["s>", "ab", "bc", "abc", "a", "b", "c", "<", "s", ">"]
    merges = transformers_tokenizer([*special, *learned], special, 2)["model"]["merges"]
    assert merges == [
        ("s", ">"),
        ("a", "b"),
        ("b", "c"),
        ("ab", "c"),
        ("a", "bc"),
    ]  # "<" "s>" would be the control piece


def test_transformers_config(folder, tokenizer):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"], config["add_prefix_space"]) == (
        True,
        False,
        False,
    )
    assert config["lumi_fingerprint"] == tokenizer.fingerprint


# Training.


def train(tmp_path, texts, **settings):
    corpus = write_corpus(tmp_path / "corpus", texts)
    return train_tokenizer(TokenizerConfig(**settings), [corpus], tmp_path / "tokenizer")


def test_too_little_text_for_the_vocabulary(tmp_path):
    with pytest.raises(
        UserError, match=r"vocab_size must be at most (\d+), the pieces that this text supports .* got 30000"
    ) as caught:
        train(tmp_path, [PROSE], vocab_size=30000)
    supported = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert (
        train_tokenizer(
            TokenizerConfig(vocab_size=supported), [tmp_path / "corpus"], tmp_path / "fits"
        ).vocab_size
        == supported
    )
    assert not (tmp_path / "tokenizer").exists()


def test_too_small_a_vocabulary_for_the_characters(tmp_path):
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 60)))
    with pytest.raises(
        UserError,
        match=r"vocab_size must be at least 322, .* got 270; raise vocab_size or lower character_coverage",
    ):
        train(tmp_path, [alphabet], vocab_size=270, character_coverage=1.0)


def test_character_coverage_decides_which_characters_get_pieces(tmp_path):
    text = (PROSE + CODE) * 40 + "é"
    rare = train(tmp_path / "all", [text], vocab_size=320, character_coverage=1.0)
    assert len(rare.encode("é")) == 1
    common = train(tmp_path / "most", [text], vocab_size=320, character_coverage=0.999)
    assert common.encode("é") == [FIRST_BYTE_ID + 0xC3, FIRST_BYTE_ID + 0xA9]


def test_reserved_characters_do_not_hide_the_text_around_them(tmp_path):
    tokenizer = train(tmp_path, ["zebra ▅ zebra\0zebra▁zebra " * 50], vocab_size=270)
    assert len(tokenizer.encode("zebra")) < 5
    assert tokenizer.encode("▅") == [FIRST_BYTE_ID + byte for byte in "▅".encode()]


def test_chunks_hold_the_whole_text():
    words = "".join(f"{i} " for i in range(5000))
    lines = "\n\n".join(f"line {i} of the text" for i in range(2000))
    unbroken = "x" * 10_000
    for text in (words, lines, unbroken, "", "short"):
        chunks = list(split_chunks(text))
        assert "".join(chunks) == text
        assert all(0 < len(chunk) <= 4096 for chunk in chunks)
    assert all(chunk.startswith("\n") for chunk in list(split_chunks(lines))[1:])
    assert all(chunk.startswith(" ") for chunk in list(split_chunks(words))[1:])
    assert list(split_chunks("a\0▁b▅")) == ["a", "b"]


def test_sample_is_bounded_spread_and_decided_by_the_seed():
    chunks = [f"chunk {i:04d}" for i in range(1000)]  # 10 bytes each
    sample = sample_chunks(chunks, 2000, seed=0)
    assert len(sample) == 200
    assert sample == sorted(sample) == sample_chunks(chunks, 2000, seed=0)
    quarters = np.bincount([int(chunk[6:]) // 250 for chunk in sample])
    assert quarters.min() >= 30  # 50 expected, standard deviation 5.5
    assert sample_chunks(chunks, 2000, seed=1) != sample
    assert sample_chunks(chunks, 10_000, seed=1) == chunks


def test_sample_does_not_depend_on_the_order():
    chunks = [
        f"{i}" * (300 if i % 10 == 0 else 1) for i in range(300)
    ]  # where a long one did not fit, no short one slips in
    sample = sample_chunks(chunks, 5000, seed=0)
    assert 4000 < sum(map(len, sample)) <= 5000
    for seed in range(5):
        shuffled = [chunks[i] for i in np.random.default_rng(seed).permutation(300)]
        assert set(sample_chunks(shuffled, 5000, seed=0)) == set(sample)


def test_the_sample_reaches_the_trainer(tmp_path):
    with pytest.raises(UserError, match="no piece of the corpus fits in max_training_bytes = 10"):
        train(tmp_path, [PROSE], vocab_size=300, max_training_bytes=10)
    corpus = write_corpus(
        tmp_path / "many", [f"{word} word {i}" for i, word in enumerate(PROSE.split() * 50)]
    )
    made = [
        train_tokenizer(
            TokenizerConfig(vocab_size=320, max_training_bytes=size, seed=seed),
            [corpus],
            tmp_path / f"{size}-{seed}",
        )
        for size, seed in ((10**6, 0), (3000, 0), (3000, 1))
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 262}, "vocab_size must be more than the 262 special and byte pieces, got 262"),
        (
            {"vocab_size": 400, "character_coverage": 0.5},
            "character_coverage must be between 0.98 and 1, got 0.5",
        ),
        ({"vocab_size": 400, "max_training_bytes": 0}, "max_training_bytes must be at least 1, got 0"),
        ({"vocab_size": 400, "seed": -1}, "seed must be between 0 and"),
    ],
)
def test_impossible_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**settings)


def test_shipped_configs(pytestconfig):
    configs = pytestconfig.rootpath / "configs"
    assert load_config(TokenizerConfig, configs / "tokenizer" / "32k.json").vocab_size == 32768
    assert load_config(TokenizerConfig, configs / "demo" / "tokenizer.json").vocab_size == 4096
    for path in ("tokenizer/32k.json", "demo/tokenizer.json"):
        assert json.loads((configs / path).read_text()).keys() == {
            "vocab_size",
            "character_coverage",
            "max_training_bytes",
            "seed",
        }
