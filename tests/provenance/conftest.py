"""Runs that end in a moment, with their data beside them."""

import json
from pathlib import Path

import pytest
from crafted_models import save_base
from synthetic import write_jsonl

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
    """Tokens of conversations, and their corpus beside them."""
    questions = [{"role": "user", "content": f"say {number}"} for number in range(60)]
    answers = [{"role": "assistant", "content": f"{number}"} for number in range(60)]
    records = [{"messages": list(both)} for both in zip(questions, answers, strict=True)]
    return _tokens(tmp_path / "chats", records, {"kind": "messages"}, tokenizer)


@pytest.fixture
def pairs(tokenizer, tmp_path):
    """Tokens of pairs, and their corpus beside them."""
    records = [{"prompt": f"say {n}", "chosen": f"{n}", "rejected": "no"} for n in range(60)]
    return _tokens(tmp_path / "pairs", records, {"kind": "preference"}, tokenizer)


def _tokens(folder, records, conversation, tokenizer):
    folder.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"kind": "jsonl", "name": folder.name, "paths": [str(folder.with_suffix(".jsonl"))]}
    config = from_dict(PrepareConfig, {"sources": [source | {"conversation": conversation}]})
    prepare(config, folder, num_workers=1)
    tokens = folder.with_name(f"{folder.name}-tokens")
    tokenize([folder], tokenizer, tokens, validation_fraction=0.2, num_workers=1)
    return tokens


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
