import random

import numpy as np
import pytest

from lumi.chat.messages import Message
from lumi.chat.pairs import Pair
from lumi.config import UserError, from_dict
from lumi.corpus import DeduplicationConfig
from lumi.corpus import deduplication as module
from lumi.corpus.deduplication import Deduplicator, choose_bands, fingerprint, shingle


def decide(texts, **options):
    config = DeduplicationConfig(**options)
    return list(Deduplicator(config).decide(fingerprint(texts, config)))


def pair(shared, different):
    """Two texts; with single-word shingles their Jaccard similarity is shared / (shared + 2 different)."""
    common = [f"word{i}" for i in range(shared)]
    return [" ".join(common + [f"{side}{i}" for i in range(different)]) for side in ("left", "right")]


ALIKE = ["Hello  World\n", "hello world", "é", "e\u0301", "other", "hello world"]


def test_exact_means_the_same_bytes():
    assert decide(ALIKE, near=False) == ["", "", "", "", "", "exact_duplicate"]


def test_normalized_ignores_case_white_space_and_unicode_form():
    again = "normalized_duplicate"
    assert decide(ALIKE, near=False, normalized=True) == ["", again, "", again, "", "exact_duplicate"]
    assert decide(ALIKE, near=False, exact=False, normalized=True) == ["", again, "", again, "", again]


def test_near_compares_words_without_case():
    text = " ".join(f"Word{i}" for i in range(50))
    assert decide([text, text.lower().replace(" ", "\n  ")]) == ["", "near_duplicate"]


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (
            "图书馆在山坡上，窗子朝着南边的田野。每到秋天，学生们就坐在窗边读书，读累了便看一看外面的稻子。",
            "秋天",
            "春天",
        ),
        (
            "庭の梅が咲いたので、祖母は毎朝窓を開けて眺めている。遠くから子供たちの声が聞こえ、春が近いことを知る。",
            "祖母",
            "母親",
        ),
        ("เช้าวันนี้อากาศดีมากชาวประมงกลับมาจากทะเลพร้อมปลามากมายเด็กวิ่งเล่นบนหาดทราย", "ดี", "แย่"),
    ],
)
def test_near_finds_texts_without_spaces_that_differ_by_a_word(text, old, new):
    pages = [text * 2, text + text.replace(old, new), text[::-1] * 2]
    assert pages[0] != pages[1]
    assert decide(pages) == ["", "near_duplicate", ""]


def test_exact_and_near_can_be_switched_off():
    texts = ["a b c d e f g h", "a b c d e f g h"]
    assert decide(texts, exact=False, near=False) == ["", ""]
    assert decide(texts, exact=False) == ["", "near_duplicate"]
    assert decide(pair(95, 2), near=False) == ["", ""]


def decide_parts(pairs, **options):
    config = DeduplicationConfig(**options)
    chats = [(Message("user", question), Message("assistant", answer)) for question, answer in pairs]
    return list(Deduplicator(config, has_parts=True).decide(fingerprint(chats, config)))


def test_near_duplicates_are_alike_as_a_whole_and_in_their_part():
    passage = " ".join(f"p{i}" for i in range(300))
    answers = [" ".join(f"{side}{i}" for i in range(40)) for side in ("left", "right")]
    assert decide_parts([(passage, answers[0]), (passage, answers[1]), (passage, answers[0] + " more")]) == [
        "",
        "",
        "near_duplicate",
    ]
    assert decide_parts([(passage, answers[0]), ("another question", answers[0])]) == ["", ""]


def test_a_short_part_makes_no_near_duplicate():
    passage = " ".join(f"p{i}" for i in range(300))
    nineteen = " ".join(f"a{i}" for i in range(19))
    for answer, expected in (("Yes.", ""), (nineteen, ""), (nineteen + " a19", "near_duplicate")):
        assert decide_parts([(f"{passage} is it so?", answer), (f"{passage} is it not?", answer)]) == [
            "",
            expected,
        ]
        assert decide_parts([(passage, answer), (passage, answer)], exact=False) == ["", "near_duplicate"]


def test_conversations_about_case_or_indentation_are_no_duplicates():
    pairs = [
        ("Rewrite with correct capitals: i met anna", "I met Anna"),
        ("Rewrite with correct capitals: I MET ANNA", "I met Anna"),
        ("Indent this:\nx = 1", "    x = 1"),
        ("Indent this:\n x = 1", "     x = 1"),
    ]
    assert decide_parts([*pairs, pairs[0]]) == ["", "", "", "", "exact_duplicate"]
    again = "normalized_duplicate"
    assert decide_parts(pairs, normalized=True) == ["", again, "", again]


def test_reasoning_tells_conversations_apart():
    config = DeduplicationConfig(near=False)
    chats = [(Message("user", "q"), Message("assistant", "a", thought)) for thought in ("", "b", "c", "b")]
    found = Deduplicator(config, has_parts=True).decide(fingerprint(chats, config))
    assert list(found) == ["", "", "", "exact_duplicate"]


def test_pairs_are_told_apart_by_both_answers_and_their_reasoning():
    (ask,), good, bad = [[Message("user", "Why?")], Message("assistant", "A b."), Message("assistant", "c")]
    first = Pair((ask,), (good,), (bad,))
    pairs = [
        first,
        Pair((ask,), (bad,), (good,)),
        first._replace(chosen=(good._replace(reasoning="d"),)),
        first._replace(rejected=(bad._replace(reasoning="d"),)),
        first._replace(chosen=(good._replace(content="a  B."),)),
        first,
    ]
    for normalized, case in ((False, ""), (True, "normalized_duplicate")):
        config = DeduplicationConfig(near=False, normalized=normalized)
        found = Deduplicator(config, has_parts=True).decide(fingerprint(pairs, config))
        assert list(found) == ["", "", "", "", case, "exact_duplicate"]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_threshold_is_honoured_in_the_part_too(threshold):
    for jaccard, expected in [(threshold + 0.04, "near_duplicate"), (threshold - 0.04, "")]:
        shared = round(1000 * jaccard)
        parts = pair(shared, (1000 - shared) // 2)
        passage = " ".join(f"p{i}" for i in range(100_000))  # the whole is the same but for a hundredth
        options = {"threshold": threshold, "num_permutations": 1024, "shingle_words": 1}
        assert decide_parts([(passage, part) for part in parts], **options) == ["", expected]
        questions = [
            " ".join(f"q{word}" for word in part.split()) for part in parts
        ]  # different in other words than the answers
        assert decide_parts(zip(questions, parts, strict=True), **options) == ["", expected]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_threshold_is_honoured_just_above_and_just_below(threshold):
    for jaccard, expected in [(threshold + 0.04, "near_duplicate"), (threshold - 0.04, "")]:
        shared = round(1000 * jaccard)
        texts = pair(shared, (1000 - shared) // 2)
        assert decide(texts, threshold=threshold, num_permutations=1024, shingle_words=1) == ["", expected]


def test_threshold_one_takes_only_equal_sets_of_shingles():
    assert decide([*pair(999, 1), pair(999, 1)[0] + "!"], threshold=1.0, shingle_words=1) == ["", "", ""]
    assert decide(["a b a b a b", "a b a b a b a b"], threshold=1.0, shingle_words=2) == [
        "",
        "near_duplicate",
    ]


def test_shingle_words_counts():
    words = [f"w{i}" for i in range(200)]
    shuffled = words[::-1]
    assert decide([" ".join(words), " ".join(shuffled)], shingle_words=1) == ["", "near_duplicate"]
    assert decide([" ".join(words), " ".join(shuffled)], shingle_words=3) == ["", ""]
    assert shingle(["a", "b", "c", "d"], 3) == ["a b c", "b c d"]
    assert shingle(["a"], 3) == ["a"]


def test_num_permutations_and_seed_reach_the_signature():
    (one,) = fingerprint(["a b c"], DeduplicationConfig())
    (other,) = fingerprint(["a b c"], DeduplicationConfig(seed=2))
    (longer,) = fingerprint(["a b c"], DeduplicationConfig(num_permutations=256))
    assert len(one.signature) == 4 * 128
    assert one.signature != other.signature
    assert one.digest == other.digest
    assert one.normalized == b""
    assert len(longer.signature) == 4 * 256


def test_a_chain_of_near_duplicates_is_compared_with_what_is_kept():
    words = [f"w{i}" for i in range(100)]
    texts = [" ".join(words[shift : shift + 60]) for shift in range(0, 40, 5)]
    config = {"shingle_words": 1, "threshold": 0.7, "num_permutations": 1024}
    # shift 5: 55 / 65 = 0.85, 10: 50 / 70 = 0.71, 15: 45 / 75 = 0.6: every third stays
    assert decide(texts, **config) == [
        "",
        *["near_duplicate"] * 2,
        "",
        *["near_duplicate"] * 2,
        "",
        "near_duplicate",
    ]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands = choose_bands(threshold, 128)
    assert 128 % bands == 0
    assert bands == 128 or 1 - (1 - threshold ** (128 / bands)) ** bands >= 0.99


def test_packing_old_bands_changes_nothing(monkeypatch):
    generator = random.Random(0)
    texts = [" ".join(generator.choices([f"w{i}" for i in range(400)], k=40)) for _ in range(150)]
    texts += [texts[generator.randrange(150)] + f" extra{i}" for i in range(100)]
    config = DeduplicationConfig(shingle_words=1, threshold=0.6)
    prints = fingerprint(texts, config)
    expected = list(Deduplicator(config).decide(prints))
    monkeypatch.setattr(module, "RECENT_BANDS", 200)
    deduplicator = Deduplicator(config)
    got = [
        reason
        for start in range(0, len(prints), 10)
        for reason in deduplicator.decide(prints[start : start + 10])
    ]
    assert len(deduplicator._bands._packed) > 1
    assert got == expected
    assert got == [""] * 150 + ["near_duplicate"] * 100
    assert all(np.all(np.diff(keys.astype(object)) >= 0) for keys, _ in deduplicator._bands._packed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be within \(0, 1\], got 0.0"),
        ({"threshold": 1.1}, r"threshold must be within \(0, 1\], got 1.1"),
        ({"num_permutations": 8}, "num_permutations must be between 16 and 4096, got 8"),
        ({"shingle_words": 0}, "shingle_words must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(DeduplicationConfig, values)


def test_bands_that_are_shared_decide_as_all_bands_do(monkeypatch):
    """Hashes that occur once, and digests that occur once, can be left out."""
    monkeypatch.setattr(module, "RECENT_BANDS", 100)
    generator = random.Random(1)
    texts = [" ".join(generator.choices([f"w{i}" for i in range(3000)], k=40)) for _ in range(60)]
    texts += [texts[generator.randrange(60)] + generator.choice(("", f" extra{i}")) for i in range(60)]
    config = DeduplicationConfig(shingle_words=1, threshold=0.6)
    prints = fingerprint(texts, config)
    expected = list(Deduplicator(config).decide(prints))
    index = module.BandIndex(choose_bands(0.6, 128), 128)
    hashes = index.hash_rows(np.array([np.frombuffer(each.signature, "<u4") for each in prints]))
    values, counts = np.unique(hashes, return_counts=True)
    shared = [row[np.isin(row, values[counts > 1])] for row in hashes]
    assert any(len(row) == 0 for row in shared)
    digests = [each.digest for each in prints]
    bare = [
        each._replace(
            digest=each.digest if digests.count(each.digest) > 1 else b"",
            signature=each.signature if len(row) else b"",
        )
        for each, row in zip(prints, shared, strict=True)
    ]
    deduplicator = Deduplicator(config)
    got = [
        reason
        for start in range(0, 120, 10)
        for reason in deduplicator.decide(bare[start : start + 10], shared[start : start + 10])
    ]
    assert got == expected
    assert {"", "exact_duplicate", "near_duplicate"} == set(expected)
