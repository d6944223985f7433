"""Tokenizers as llama.cpp reads them from a GGUF file: llama.cpp judges the ids."""

import json
import re

import pytest
from gguf_files import FOREIGN, byte_level, foreign, texts, write
from hugging_face_tokenizers import make
from llama_cpp_judge import LlamaCpp

from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids
from lumi.config import UserError
from lumi.formats.gguf_vocabulary import to_vocabulary
from lumi.formats.hf_config import end_ids
from lumi.tokenizer.loading import load_tokenizer


def differing(tokenizer, judge, candidates):
    """Texts of other ids. llama.cpp leaves a normalizer out, so it gets normal texts."""
    return [text for text in candidates if judge.encode(tokenizer.normalize(text)) != tokenizer.encode(text)]


@pytest.fixture(scope="module", params=["lumi", *FOREIGN])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tokenizer, tmp_path_factory):
    """A tokenizer, and llama.cpp with the same one."""
    folder = tmp_path_factory.mktemp("vocabulary")
    found = tokenizer if kind == "lumi" else foreign(folder / "tokenizer", kind)
    return found, LlamaCpp(write(folder, found))


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.soak)])
def test_ids(pair, kind, count):
    found = differing(*pair, texts(count))
    if kind == "tekken":  # llama.cpp has a simpler rule
        assert any("ÉCOLE" in text for text in found)
        found = [text for text in found if text.isascii()]
    assert found == []


def test_what_stands_before_a_text(pair):
    tokenizer, judge = pair
    for text in ("The river", " x", ""):
        assert judge.encode(text, begins=True) == [*tokenizer.begin_ids, *tokenizer.encode(text)]


def test_every_end_stops(pair):
    tokenizer, judge = pair
    prompt = tokenizer.encode("The river")
    assert all(judge.stops_at(prompt, token_id) for token_id in end_ids(tokenizer))
    assert not judge.stops_at(prompt, prompt[0])


@pytest.mark.parametrize("kind", ["lumi", "smollm2", "qwen"], scope="module")
def test_the_chat_template(pair):
    tokenizer, judge = pair
    conversation = [
        ("system", "Be brief."),
        ("user", "Where is the river?"),
        ("assistant", "There."),
        ("user", "\n"),
    ]
    expected = prompt_ids(tokenizer, [Message(role, text) for role, text in conversation])
    asked = [{"role": role, "content": text} for role, text in conversation]
    assert judge.prompt_ids(asked) == expected


def test_a_space_to_llama_cpp(tokenizer, tmp_path):
    """U+2581 comes back as itself from Lumi's ids."""
    judge = LlamaCpp(write(tmp_path, tokenizer))
    assert judge.encode("a▁b") == tokenizer.encode("a b") != tokenizer.encode("a▁b")


def test_ids_that_the_tokenizer_has_not(tmp_path):
    """They get names that no token has, and the type 5."""
    folder = byte_level(tmp_path, "gpt-2")
    data = json.loads((folder / "tokenizer.json").read_text())
    size = len(data["model"]["vocab"])
    data["model"]["vocab"][f"[PAD{size + 1}]"] = size
    (folder / "tokenizer.json").write_text(json.dumps(data))
    metadata = to_vocabulary(load_tokenizer(folder), size + 3).metadata
    assert metadata["tokenizer.ggml.tokens"][-3:] == [
        f"[PAD{size + 1}]",
        f"[[PAD{size + 1}]]",
        f"[PAD{size + 2}]",
    ]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [1, 5, 5]


def test_more_ends_than_a_file_names(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, "llama-3")).with_chat_template(None)
    names = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|begin|>"]
    vocabulary = to_vocabulary(tokenizer.with_ends(tokenizer.control_ids[name] for name in names), 430)
    ids = [vocabulary.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == [tokenizer.control_ids[name] for name in names[:3]]
    assert vocabulary.notes == ["a GGUF file names 3 ids that end a text, so not <|begin|>"]


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("qwen", r"llama.cpp leaves the tokenizer's normalizer \(NFC\) out"),
        ("tekken", "llama.cpp cuts words with capitals outside of ASCII"),
        ("llama-3", "llama.cpp puts the BOS before conversations too"),
        ("llama 2", "llama.cpp puts a space after control tokens too"),
    ],
)
def test_what_llama_cpp_does_in_another_way(kind, note, tmp_path):
    tokenizer = foreign(tmp_path, kind)
    (found,) = to_vocabulary(tokenizer, tokenizer.vocab_size).notes
    assert re.match(note, found)


def byte_level_step(**changes):
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"pre_tokenizer": step | changes}


REFUSALS = {
    "a normalizer": (
        {"normalizer": {"type": "Lowercase"}},
        {},
        "must change nothing in a text but write NFC, for llama.cpp, got Lowercase",
    ),
    "other words": (
        byte_level_step(use_regex=False),
        {},
        r"must cut texts into words as one of llama\.cpp's does \(gpt-2, .*\), got ByteLevel; it cannot be",
    ),
    "a space first": (
        byte_level_step(add_prefix_space=True),
        {},
        "must put no space before a text, got always",
    ),
    "a suffix": ({}, {"end_of_word_suffix": "</w>"}, "must have no prefix or suffix for parts of words"),
}


@pytest.mark.parametrize(("changes", "of_model", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_llama_cpp_does_not_do(changes, of_model, message, tmp_path):
    folder = byte_level(tmp_path, "gpt-2")
    data = json.loads((folder / "tokenizer.json").read_text()) | changes
    data["model"] |= of_model
    if of_model:  # the library takes it only with merges that fit
        data["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError, match=f"the tokenizer {message}"):
        to_vocabulary(tokenizer, tokenizer.vocab_size)


def test_two_tokens_before_a_text(tmp_path):
    folder = make(tmp_path, "llama-3")
    text = (folder / "tokenizer.json").read_text()
    begin = json.loads(text)["post_processor"]["single"][0]
    data = json.loads(text)
    data["post_processor"]["single"].insert(0, begin)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"must put its BOS or nothing before a text, got the ids \[0, 0\]"):
        to_vocabulary(load_tokenizer(folder), 430)


@pytest.mark.parametrize("fault", ["another order", "a merge is missing", "a byte is missing"])
def test_merges_that_are_none_of_sentencepiece(fault, tmp_path):
    foreign(tmp_path, "llama 2, json")
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    merges = data["model"]["merges"]
    if fault == "another order":
        made = [left + right for left, right in merges]
        merges.append(merges.pop(next(i for i in range(len(made)) if made[i] in made[:i])))
    elif fault == "a merge is missing":
        del merges[-1]
    else:
        del data["model"]["vocab"]["<0xF5>"]
    file.write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    message = "must have all 256 byte tokens" if "byte" in fault else "must join pieces as SentencePiece does"
    with pytest.raises(UserError, match=message):
        to_vocabulary(tokenizer, tokenizer.vocab_size)
