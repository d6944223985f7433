"""Runs that end in a moment, with their data beside them."""

import json
from pathlib import Path

import pytest
from corpora import write_pairs
from crafted_models import save_base
from synthetic import pair, write_jsonl

from lumi.config import from_dict
from lumi.corpus import PrepareConfig, prepare
from lumi.data.tokenization import tokenize
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
from lumi.evaluation.smoke import SmokeConfig
from lumi.formats.pretrained import load_pretrained


@pytest.fixture
def pretrained_run(start, tokenizer, tmp_path):
    """A pre-training, with its corpus and its tokens beside it."""
    (tmp_path / "secret").mkdir()
    write_jsonl(tmp_path / "secret" / "raw.jsonl", 200)
    source = {"kind": "jsonl", "name": "rivers", "paths": [str(tmp_path / "secret" / "raw.jsonl")]}
    deduplication = {"near": False}
    config = from_dict(PrepareConfig, {"sources": [source], "deduplication": deduplication})
    prepare(config, tmp_path / "corpus", num_workers=1)
    tokenize([tmp_path / "corpus"], tokenizer, tmp_path / "tokens", validation_fraction=0.1, num_workers=1)
    return start(data_dirs=[tmp_path / "tokens"], draws=True)


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    return save_base(tokenizer, tmp_path / "base")


@pytest.fixture
def chats(tokenizer, tmp_path):
    """Tokens of conversations, and their corpus."""
    records = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in (f"word {number}" for number in range(60))
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "chats.jsonl").write_text(lines)
    source = {"kind": "jsonl", "name": "chats", "paths": [str(tmp_path / "chats.jsonl")]}
    source["conversation"] = {"kind": "messages"}
    prepare(from_dict(PrepareConfig, {"sources": [source]}), tmp_path / "chat-corpus", num_workers=1)
    folder = tmp_path / "chat-tokens"
    tokenize([tmp_path / "chat-corpus"], tokenizer, folder, validation_fraction=0.2, num_workers=1)
    return folder


@pytest.fixture
def pairs(tokenizer, tmp_path):
    """Tokens of pairs, and their corpus."""
    (tmp_path / "pair-corpus").mkdir()
    write_pairs(tmp_path / "pair-corpus", [pair(seed) for seed in range(60)])
    folder = tmp_path / "pair-tokens"
    tokenize([tmp_path / "pair-corpus"], tokenizer, folder, validation_fraction=0.2, num_workers=1)
    return folder


@pytest.fixture
def evaluated(tmp_path):
    """Evaluate a model into a folder; returns the folder."""

    def evaluated(model, folder):
        prompts = {"categories": {"facts": [{"prompt": "a", "text": "a"}]}}
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        smoke = SmokeConfig(path=str(tmp_path / "prompts.json"), style="text", max_new_tokens=2)
        evaluate(EvaluationConfig(smoke_tests=smoke), load_pretrained(model, device="cpu"), folder)
        return Path(folder)

    return evaluated
