"""Two chains from texts to an evaluation, made by the stages themselves, in one folder each."""

import json
import shutil

import pytest
from corpora import write_chats, write_corpus
from runs import merged, touch_picture
from synthetic import conversation, document

from lumi.config import from_dict
from lumi.data.tokenization import tokenize
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
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
