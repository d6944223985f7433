"""The names of llama.cpp's rules. `test_gguf_vocabulary.py` compares what they do."""

import copy

import pytest
from hugging_face_tokenizers import make

from lumi.config import UserError
from lumi.formats.gguf_words import WORDS, name_of, words_of
from lumi.tokenizer.loading import load_tokenizer


@pytest.mark.parametrize("name", WORDS)
def test_there_and_back(name):
    words = words_of(name, "a.gguf")
    assert name_of(words.steps, words.ignores_merges, all_merge=False) == name
    other = copy.deepcopy(words.steps)
    other[-1]["trim_offsets"] = False  # changes no ids
    assert name_of(other, words.ignores_merges, all_merge=False) == name


def test_other_names():
    assert words_of("llama3", "a.gguf") is WORDS["llama-bpe"]
    assert words_of("deepseek-r1-qwen", "a.gguf") is WORDS["qwen2"]
    with pytest.raises(UserError, match=r"a\.gguf: tokenizer\.ggml\.pre must be gpt-2, .*, got 'falcon'"):
        words_of("falcon", "a.gguf")


def test_words_that_are_tokens_matter_only_where_merges_do_not_make_them():
    steps = WORDS["qwen2"].steps
    assert name_of(steps, True, all_merge=True) == "qwen2"
    with pytest.raises(UserError, match=r"got Split\(.*\), ByteLevel with ignore_merges = true; it cannot"):
        name_of(steps, True, all_merge=False)
    assert name_of(WORDS["llama-bpe"].steps, False, all_merge=True) == "smaug-bpe"


def test_another_expression_is_not_guessed():
    steps = copy.deepcopy(WORDS["qwen2"].steps)
    steps[0]["pattern"]["Regex"] += "|x"
    with pytest.raises(
        UserError, match=r"the tokenizer must cut texts into words as one of llama\.cpp's does"
    ):
        name_of(steps, False, all_merge=True)


@pytest.mark.parametrize(
    ("recipe", "name"), [("smollm2", "smollm"), ("llama-3", "llama-bpe"), ("qwen", "qwen2")]
)
def test_tokenizers_of_the_library(recipe, name, tmp_path):
    data = load_tokenizer(make(tmp_path, recipe)).describe().data
    steps, ignores = data["pre_tokenizer"]["pretokenizers"], data["model"]["ignore_merges"]
    assert name_of(steps, ignores, all_merge=False) == name
