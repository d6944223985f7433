"""Two chains from texts to an evaluation, made by the stages themselves, and models without a past."""

import json
import shutil
from pathlib import Path

import pytest
from crafted_models import save_base
from runs import merged
from synthetic import conversation, document, pair

from lumi.config import from_dict
from lumi.corpus import PrepareConfig, prepare
from lumi.data.tokenization import tokenize
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
from lumi.evaluation.smoke import SmokeConfig
from lumi.formats.export import export_model, merge_adapter
from lumi.formats.export_form import HuggingFaceFolder
from lumi.formats.gguf_export import GgufFolder
from lumi.formats.pretrained import load_pretrained
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

LORA = {"rank": 4, "alpha": 8, "tokens": ["<|im_start|>", "<|im_end|>"]}
TUNING = {"model": None, "lora": LORA, "batches": {"sequence_length": 128, "batch_tokens": 512}}


def draw(metrics, picture, title, unit):
    """In the place of `draw_loss`, which takes longer than the runs."""
    Path(picture).write_bytes(b"a picture")


def run(folder, name, store, seed, model_path=None, **changes):
    """Train in a chain's folder; returns the run."""
    config = from_dict(TrainConfig, merged({"num_steps": 4, "seed": seed, **changes}))
    paths = Paths([str(folder / store)], str(folder / "tokenizer"), folder / name, model_path=model_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumi.training.run_log.draw_loss", draw)
        assert train(config, paths, "cpu") == 0
    return folder / name


def make_corpus(folder, records, conversation=None):
    """Prepare a corpus from a file in a folder beside it, which concerns nobody."""
    file = folder.parent / "secret" / f"{folder.name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"kind": "jsonl", "name": folder.name, "paths": [str(file)], "conversation": conversation}
    config = {"sources": [source], "deduplication": {"near": False}}
    prepare(from_dict(PrepareConfig, config), folder, num_workers=1)


def make_tokens(folder, corpus, store):
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenize([folder / corpus], tokenizer, folder / store, validation_fraction=0.2, num_workers=1)


def plain(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def make_chain(folder, seed):
    make_corpus(folder / "corpus", [{"text": document(seed + i)} for i in range(300)])
    chats = [{"messages": plain(conversation(seed + i))} for i in range(60)]
    make_corpus(folder / "chats", chats, {"kind": "messages"})
    train_tokenizer(TokenizerConfig(vocab_size=384), [folder / "corpus"], folder / "tokenizer")
    make_tokens(folder, "corpus", "tokens")
    make_tokens(folder, "chats", "questions")
    run(folder, "pretrain", "tokens", seed)
    run(folder, "finetune", "questions", seed, folder / "pretrain", **TUNING)
    merge_adapter(folder / "finetune", folder / "merged")
    export_model(folder / "merged", folder / "exported", form=HuggingFaceFolder("bfloat16"))
    export_model(folder / "merged", folder / "gguf", form=GgufFolder("f16"))
    loaded = load_pretrained(folder / "exported", device="cpu")
    evaluate(from_dict(EvaluationConfig, {}), loaded, folder / "evaluation", data_dirs=[folder / "tokens"])


@pytest.fixture(scope="session")
def chains(tmp_path_factory):
    """Two whole chains, `a` and `b`. Nobody changes them."""
    folder = tmp_path_factory.mktemp("chains")
    for name, seed in (("a", 0), ("b", 1000)):
        make_chain(folder / name, seed)
    return folder


@pytest.fixture
def chain(chains, tmp_path):
    """A copy of chain `a` in another place, to tamper with."""
    return shutil.copytree(chains / "a", tmp_path / "moved" / "chain")


@pytest.fixture
def tune(hub, chain):
    """Train an adapter of `me/base`, which is the chain's pre-trained model on the hub; returns the run."""
    hub.upload("me/base", chain / "pretrain" / "final")

    def tune(store, **changes):
        return run(chain, "tuned", store, 0, Path("me/base"), **TUNING, **changes)

    return tune


@pytest.fixture
def again(chain):
    """A run that trains the whole pre-trained model on the same tokens."""
    return run(chain, "again", "tokens", 0, chain / "pretrain", model=None)


@pytest.fixture
def pairs(chain):
    """A token store of pairs in the chain; returns its name."""
    records = [
        {
            "prompt": plain(each.prompt),
            "chosen": plain(each.chosen),
            "rejected": plain(each.rejected),
        }
        for each in map(pair, range(60))
    ]
    make_corpus(chain / "pairs", records, {"kind": "preference"})
    make_tokens(chain, "pairs", "preferences")
    return "preferences"


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    """A model of which nothing is recorded."""
    folder = save_base(tokenizer, tmp_path / "base")
    (folder / "provenance.json").unlink()
    return folder


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
def evaluated(tmp_path):
    """Evaluate a model into a folder; returns the folder."""

    def evaluated(model, folder):
        prompts = {"categories": {"facts": [{"prompt": "a", "text": "a"}]}}
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        smoke = SmokeConfig(path=str(tmp_path / "prompts.json"), style="text", max_new_tokens=2)
        evaluate(EvaluationConfig(smoke_tests=smoke), load_pretrained(model, device="cpu"), folder)
        return Path(folder)

    return evaluated
