import json

import numpy as np
import pytest
from corpora import CODE, PROSE, write_corpus

from lumi.config import UserError, load_config
from lumi.tokenizer import training
from lumi.tokenizer.sentencepiece_bpe import FIRST_BYTE_ID
from lumi.tokenizer.training import TokenizerConfig, sample_chunks, split_chunks, train_tokenizer

CONFIG = TokenizerConfig(vocab_size=400)


def train(tmp_path, texts, **settings):
    corpus = write_corpus(tmp_path / "corpus", texts)
    return train_tokenizer(TokenizerConfig(**settings), [corpus], tmp_path / "tokenizer")


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


def test_a_model_that_would_change_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(training._RECIPE, "remove_extra_whitespaces", True)
    with pytest.raises(UserError, match="keeps every text as it is, but it normalises"):
        train(tmp_path, [PROSE, CODE] * 5, vocab_size=320)


def test_too_little_text_for_the_vocabulary(tmp_path):
    with pytest.raises(
        UserError, match=r"vocab_size must be at most (\d+), the pieces that this text supports .* got 30000"
    ) as caught:
        train(tmp_path, [PROSE], vocab_size=30000)
    supported = int(str(caught.value).split("at most ")[1].split(",")[0])
    config = TokenizerConfig(vocab_size=supported)
    assert train_tokenizer(config, [tmp_path / "corpus"], tmp_path / "fits").vocab_size == supported
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
