"""Two chains from texts to an evaluation, made by the stages themselves; and runs that end in a moment."""

import json
import shutil
from pathlib import Path

import pytest
from corpora import write_chats, write_corpus
from crafted_models import save_base
from runs import merged, touch_picture
from synthetic import conversation, document, write_jsonl

from lumi.config import from_dict
from lumi.corpus import PrepareConfig, prepare
from lumi.data.tokenization import tokenize
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
from lumi.evaluation.smoke import SmokeConfig
from lumi.formats.export import export_model, merge_adapter
from lumi.formats.pretrained import load_pretrained
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

LORA = {"rank": 4, "alpha": 8, "tokens": ["<|im_start|>", "<|im_end|>"]}


def run(folder, name, store, seed, model_path=None, **changes):
    config = from_dict(TrainConfig, merged({"num_steps": 4, "seed": seed, **changes}))
    paths = Paths([str(folder / store)], str(folder / "tokenizer"), folder / name, model_path=model_path)
    assert train(config, paths, "cpu") == 0


def make_chain(folder, seed):
    for name in ("corpus", "chats"):
        (folder / name).mkdir(parents=True)
    write_corpus(folder / "corpus", [document(seed + i) for i in range(300)])
    write_chats(folder / "chats", [conversation(seed + i) for i in range(60)])
    train_tokenizer(TokenizerConfig(vocab_size=384), [folder / "corpus"], folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for corpus, store in (("corpus", "tokens"), ("chats", "questions")):
        tokenize([folder / corpus], tokenizer, folder / store, validation_fraction=0.2, num_workers=1)
    run(folder, "pretrain", "tokens", seed)
    batches = {"sequence_length": 128, "batch_tokens": 512}
    run(folder, "finetune", "questions", seed, folder / "pretrain", model=None, batches=batches, lora=LORA)
    merge_adapter(folder / "finetune", folder / "merged")
    export_model(folder / "merged", folder / "exported", dtype="bfloat16")
    loaded = load_pretrained(folder / "exported", device="cpu")
    evaluate(from_dict(EvaluationConfig, {}), loaded, folder / "evaluation", data_dirs=[folder / "tokens"])


@pytest.fixture(scope="session")
def chains(tmp_path_factory):
    """Two whole chains, `a` and `b`. Nobody changes them."""
    folder = tmp_path_factory.mktemp("chains")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumi.training.run_log.draw_loss", touch_picture)
        for name, seed in (("a", 0), ("b", 1000)):
            make_chain(folder / name, seed)
    return folder


@pytest.fixture
def chain(chains, tmp_path):
    """A copy of chain `a` in another place, to tamper with."""
    return shutil.copytree(chains / "a", tmp_path / "moved" / "chain")


@pytest.fixture
def flip():
    """Flips one bit in the middle of a file."""

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return flip


@pytest.fixture
def change_json():
    """Changes a JSON file by a function."""

    def change_json(path, change):
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return change_json


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
