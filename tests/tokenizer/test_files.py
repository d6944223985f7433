import json

from corpora import CODE, PROSE

from lumi.tokenizer.files import transformers_tokenizer


def test_the_card(folder, tokenizer):
    card = (folder / "README.md").read_text()
    assert "400 pieces" in card
    assert tokenizer.fingerprint in card
    assert "40 from prose (made up)" in card
    assert "| `byte_fallback` | `True` |" in card
    measured = len((PROSE + CODE).encode()) / len(tokenizer.encode(PROSE) + tokenizer.encode(CODE))
    assert f"{measured:.2f} bytes of UTF-8 per token" in card


def test_merges_by_hand():
    special = ["<unk>", "<s>"]
    learned = ["s>", "ab", "bc", "abc", "a", "b", "c", "<", "s", ">"]
    merges = transformers_tokenizer([*special, *learned], range(2), range(2, 12), unk_id=0, bos_id=1)[
        "model"
    ]["merges"]
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
