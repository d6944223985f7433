"""Fine-tuning through the one loop: what is trained, what is not, what is left behind."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic import sentence

import lumi.data.rows
import lumi.train
import lumi.training.objective
import lumi.training.trainer
from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.chat.templates import TEMPLATES
from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.config import UserError, from_dict, read_json
from lumi.corpus import DeduplicationConfig, JsonlSource, PrepareConfig, prepare
from lumi.corpus.conversations import MessagesFormat
from lumi.data.batches import BatchConfig, Batches
from lumi.data.rows import ConversationRows
from lumi.data.store_manifest import Counts
from lumi.data.store_writer import StoreWriter
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import tokenize
from lumi.formats.hf_format import load_model, save_model
from lumi.formats.pretrained import load_pretrained
from lumi.host.tensor_files import load_tensors, save_tensors
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.training.metrics import read_metrics
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

NOUNS = ["river", "stone", "garden", "letter"]
PLACES = ["at noon", "in silence", "near the harbour", "under the old roof"]
ANSWERS = {noun: f"The {noun} opens a window {place}." for noun, place in zip(NOUNS, PLACES, strict=True)}
SHAPE = ModelConfig(vocab_size=384, num_layers=2, model_dim=64, num_heads=2, mlp_dim=128, max_positions=128)
CONFIG = {
    "batches": {"sequence_length": 96, "batch_tokens": 384, "micro_batch_size": 2},
    "optimizer": {"peak_lr": 0.005, "weight_decay": 0.0, "schedule": {"kind": "cosine", "warmup_steps": 5}},
    "num_steps": 60,
    "dtype": "float32",
    "validate_every": 20,
    "save_every": 20,
    "preflight": False,
}
LORA = {"rank": 32, "alpha": 64, "tokens": ["<|im_start|>", "<|im_end|>"]}


def question(noun):
    return f"What does the {noun} open?"


@pytest.fixture(scope="module")
def chat_dir(tokenizer, tmp_path_factory):
    """A token store of four questions and answers, all of them in both splits."""
    folder = tmp_path_factory.mktemp("chat")
    records = [
        {"messages": [{"role": "user", "content": question(n)}, {"role": "assistant", "content": a}]}
        for n, a in ANSWERS.items()
    ]
    (folder / "raw.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    source = JsonlSource(name="toy", paths=(str(folder / "raw.jsonl"),), conversation=MessagesFormat())
    prepare(
        PrepareConfig(sources=(source,), deduplication=DeduplicationConfig(near=False)),
        folder / "corpus",
        num_workers=1,
    )
    tokenize(
        [folder / "corpus"],
        tokenizer,
        folder / "tokens",
        validation_corpus_dirs=[folder / "corpus"],
        num_workers=1,
    )
    return folder / "tokens"


@pytest.fixture(scope="module")
def base_dir(tokenizer, tmp_path_factory):
    """A model that has seen sentences with the nouns, so that an adapter finds something to adapt."""
    folder = tmp_path_factory.mktemp("base") / "base"
    model = Transformer(SHAPE, REFERENCE).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    text = "\n".join(sentence(random.Random(seed)) for seed in range(400))
    ids = torch.tensor(tokenizer.encode(text))
    for _ in range(100):
        starts = rng.integers(0, len(ids) - 65, size=8)
        rows = torch.stack([ids[start : start + 65] for start in starts])
        (model(rows[:, :-1], rows[:, 1:].contiguous()) / rows[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture
def start(chat_dir, base_dir, tokenizer_dir, tmp_path):
    def start(
        name="run", resume=None, expect=0, model_path=base_dir, data_dirs=(chat_dir,), weights=None, **changes
    ):
        paths = Paths(
            [str(folder) for folder in data_dirs],
            str(tokenizer_dir),
            tmp_path / name,
            weights,
            resume,
            model_path,
        )
        assert train(from_dict(TrainConfig, CONFIG | changes), paths, "cpu") == expect
        return tmp_path / name

    return start


def ask(folder, nouns=NOUNS):
    model, tokenizer, *_ = load_pretrained(folder, device="cpu")
    prompts = [prompt_ids(tokenizer, [Message("user", question(noun))]) for noun in nouns]
    config = SamplingConfig(max_new_tokens=40, temperature=0.0)
    completions = generate_ids(model, prompts, config, stop_ids=stop_ids(tokenizer), pad_id=tokenizer.pad_id)
    return [(tokenizer.decode(completion.ids), completion.stopped) for completion in completions]


def curve(folder, kind="train"):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_tuned_model_answers_and_stops_by_itself(lora, start, capsys):
    folder = start(lora=lora, num_steps=100)
    assert ask(folder) == [(ANSWERS[noun], True) for noun in NOUNS]
    before, *_, after = curve(folder, "validation")
    assert after < 0.25 * before
    printed = capsys.readouterr().out
    asked = f"<s><|im_start|>user\n{question('river')}<|im_end|>\n"
    first = f"{asked}<|im_start|>assistant\n[[{ANSWERS['river']}<|im_end|>]]\n"
    assert first in printed
    assert printed.index(first) < printed.index("step 0: validation loss")
    assert (folder / "final" / "adapter_model.safetensors").exists() == (lora is not None)
    assert (folder / "final" / "chat_template.jinja").read_text() == TEMPLATES["chatml"].jinja


def test_with_the_mask_inverted_it_does_not(start, monkeypatch):
    """What the test above would say if the mask were wrong: the questions are learned, the answers and their
    end are not."""
    mask = lumi.data.rows.Split.loss_mask
    monkeypatch.setattr(lumi.data.rows.Split, "loss_mask", lambda split, begin, end: ~mask(split, begin, end))
    answers = ask(start(num_steps=100))
    assert not any(stopped for _, stopped in answers)
    assert not any(text == ANSWERS[noun] for noun, (text, _) in zip(NOUNS, answers, strict=True))


def test_a_frozen_base_is_bit_identical_after_training(start, base_dir, monkeypatch):
    before = {path.name: path.read_bytes() for path in base_dir.iterdir()}
    kept = {}
    build = lumi.training.trainer.build

    def spy(*arguments):
        kept["model"] = build(*arguments)
        return kept["model"]

    monkeypatch.setattr(lumi.training.trainer, "build", spy)
    folder = start(lora=LORA | {"base_dtype": "bfloat16"}, num_steps=8)
    trained = {
        name.replace(".parametrizations.weight.original", ".weight"): p
        for name, p in kept["model"].named_parameters()
    }
    for name, tensor in load_model(base_dir, REFERENCE).state_dict().items():
        expected = tensor.bfloat16() if tensor.ndim >= 2 else tensor
        assert trained[name].dtype == expected.dtype
        assert torch.equal(trained[name], expected), name
    assert all(parameter.any() for name, parameter in trained.items() if name.endswith("lora_B"))
    assert {path.name: path.read_bytes() for path in base_dir.iterdir()} == before
    names = {path.name: path.stat().st_size for path in (folder / "checkpoints" / "step-00000008").iterdir()}
    adapters = sum(p.numel() for p in trained.values() if p.requires_grad)
    assert names["model-00000.safetensors"] < 4 * adapters + 4096
    assert names["optimizer-00000.safetensors"] < 8 * adapters + 16384


def test_the_loss_is_the_sum_over_trained_tokens_by_their_number(start, base_dir, chat_dir, tokenizer):
    """The first step's loss against conversations one by one, without packing."""
    folder = start(num_steps=6, seed=5)
    split = TokenStore.open(chat_dir).split("train")
    batches = Batches([split], None, BatchConfig(sequence_length=96, batch_tokens=384, micro_batch_size=2), 5)
    model, nats, count = load_model(base_dir, REFERENCE), 0.0, 0
    for _, documents in batches.documents(1, 0, 4):
        for document in documents:
            ids = torch.from_numpy(split.document(document).astype(np.int64))
            begin = int(split.offsets[document])
            trained = torch.from_numpy(split.loss_mask(begin, begin + len(ids)))
            with torch.no_grad():
                log_probabilities = model.logits(model.hidden(ids[None, :-1]))[0].double().log_softmax(-1)
            picked = log_probabilities[torch.arange(len(ids) - 1), ids[1:]]
            nats, count = nats - picked[trained[1:]].sum().item(), count + int(trained[1:].sum())
    record = read_metrics(folder / "metrics.jsonl")[1]
    assert (record["kind"], record["targets"]) == ("train", count)
    assert record["loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.soak  # tests/parallel/test_sharding.py trains adapters on two processes
def test_two_processes_share_the_trained_tokens(start, chat_dir, base_dir, tokenizer_dir, tmp_path):
    """Each has another number of trained tokens: a mean of their means would be another loss."""
    changes = {
        "lora": LORA,
        "num_steps": 6,
        "batches": {"sequence_length": 100, "batch_tokens": 200, "micro_batch_size": 1},
    }
    alone = start("alone", **changes)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    paths = [
        "--data-dirs",
        chat_dir,
        "--tokenizer-dir",
        tokenizer_dir,
        "--model-path",
        base_dir,
        "--output-dir",
        tmp_path / "two",
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        lumi.train.__file__,
    ]
    command = [*launcher, "--config", tmp_path / "config.json", *paths, "--device", "cpu"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path / "two") == pytest.approx(curve(alone), rel=1e-5)
    ours, theirs = (
        load_tensors(folder / "final" / "adapter_model.safetensors") for folder in (alone, tmp_path / "two")
    )
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in ours | theirs)
    split = TokenStore.open(chat_dir).split("train")
    rows = ConversationRows(split, 100, seed=0)
    assert (
        len({int(rows.row(index).trained.sum()) for index in range(2)}) == 2
    )  # the first step's two rows differ


@pytest.mark.parametrize("lora", [None, LORA | {"dropout": 0.2}], ids=["full", "lora"])
def test_resumed_is_uninterrupted(lora, start, tmp_path):
    folder = start(lora=lora, num_steps=12, save_every=4, keep_last=3)
    file = folder / "final" / ("adapter_model.safetensors" if lora else "model.safetensors")
    whole, weights = curve(folder), load_tensors(file)
    start(
        resume=str(folder / "checkpoints" / "step-00000004"),
        lora=lora,
        num_steps=12,
        save_every=4,
        keep_last=3,
    )
    assert curve(folder) == whole
    again = load_tensors(file)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.fixture
def validations(monkeypatch):
    """Make the validation losses of a run what a test says."""

    def validations(losses):
        values, real = iter(losses), lumi.training.objective.held_out_loss
        monkeypatch.setattr(
            lumi.training.objective,
            "held_out_loss",
            lambda *rest: dataclasses.replace(real(*rest), loss=float(next(values))),
        )

    return validations


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_final_is_the_best_where_asked(lora, start, validations, capsys):
    validations([1, 5, 4, 6])  # at steps 0, 4, 8 and 12: what fine-tuning begins at is no checkpoint
    folder = start(final="best", lora=lora, num_steps=12, save_every=4, validate_every=4)
    assert (
        "final is the checkpoint of step 8, of the lowest validation loss: 4.0000" in capsys.readouterr().out
    )
    best, last = (
        open_checkpoint(folder / "checkpoints" / f"step-{step:08d}").tensors("model") for step in (8, 12)
    )
    if lora is None:
        name = "layers.0.attention.q_proj.weight"
        final = load_model(folder / "final", REFERENCE).state_dict()[name]
    else:
        name = "layers.0.attention.q_proj.lora_B"
        final = load_tensors(folder / "final" / "adapter_model.safetensors")[f"{IN_PEFT}q_proj.lora_B.weight"]
    assert torch.equal(final, best[name])
    assert not torch.equal(final, last[name])


IN_PEFT = "base_model.model.model.layers.0.self_attn."


def test_a_best_that_was_pruned_since_is_forgotten(start, validations):
    """Step 4 is best, 6 is better, so 4 goes; resumed from 5, which knows of 4, step 6 is bad."""
    validations([9, 8, 7, 6, 5, 5.5, 4, 6])  # at steps 0 to 6, and at 6 again
    changes = {"final": "best", "num_steps": 6, "save_every": 1, "validate_every": 1, "keep_last": 2}
    folder = start(**changes)
    assert not (folder / "checkpoints" / "step-00000004").exists()
    start(resume=str(folder / "checkpoints" / "step-00000005"), **changes)
    assert (folder / "final" / "model.safetensors").exists()


def test_conversations_and_texts_are_mixed_by_weight(start, chat_dir, store_dir):
    """Three rows of conversations to one of text: the number of targets says which were there."""
    folder = start(data_dirs=(chat_dir, store_dir), weights=[3, 1], num_steps=6)
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert records[-1]["mix"] == [0.75, 0.25]
    splits = [TokenStore.open(path).split("train") for path in (chat_dir, store_dir)]
    batches = Batches(
        splits, [3, 1], BatchConfig(sequence_length=96, batch_tokens=384, micro_batch_size=2), 0
    )
    for record in records:
        rows = batches.documents(record["step"], 0, 4)
        answers = sum(
            int(splits[0].loss_mask(*span(splits[0], document)).sum())
            for store, ids in rows
            if store == 0
            for document in ids
        )
        text = next(
            batches.rows(record["step"], row, row + 1).num_targets
            for row, (store, _) in enumerate(rows)
            if store == 1
        )
        assert record["targets"] == answers + text
        assert text > 80


def span(split, document):
    return int(split.offsets[document]), int(split.offsets[document + 1])


def test_dora_muon_and_float16_train_too(start):
    lora = LORA | {"dora": True, "dropout": 0.1}
    optimizer = {"kind": "muon", "peak_lr": 0.003, "schedule": {"kind": "cosine", "warmup_steps": 5}}
    losses = curve(
        start(lora=lora, dtype="float16", optimizer=optimizer, gradient_checkpointing=True, num_steps=20)
    )
    assert losses[-1] < 0.75 * losses[0]


def test_the_model_may_stand_in_the_config_as_well(start):
    start(
        model={
            "vocab_size": 384,
            "num_layers": 2,
            "model_dim": 64,
            "num_heads": 2,
            "mlp_dim": 128,
            "max_positions": 128,
        },
        num_steps=6,
    )


def test_the_resolved_config_holds_the_model(start):
    assert from_dict(TrainConfig, read_json(start(num_steps=6) / "config.json")).model.model_dim == 64


def test_an_adapter_vouches_for_the_base_that_was_loaded(start, base_dir, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    build = lumi.training.trainer.build

    def change_afterwards(*arguments):
        model = build(*arguments)
        tensors = load_tensors(base / "model.safetensors")
        save_tensors(base / "model.safetensors", {name: tensor * 1.5 for name, tensor in tensors.items()})
        return model

    monkeypatch.setattr(lumi.training.trainer, "build", change_afterwards)
    folder = start(model_path=base, lora=LORA, num_steps=6)
    with pytest.raises(UserError, match="the base must be the one that the adapter was trained with"):
        load_pretrained(folder, device="cpu")


@pytest.mark.parametrize("bad", ["train", "validation"])
def test_a_split_that_fits_no_row_is_named_before_the_first_step(bad, start, tokenizer, tmp_path):
    writer = StoreWriter(
        tmp_path, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
    )
    for split in ("train", "validation"):
        size = 40 if split == bad else 10
        mask = np.arange(size) >= size - 3
        counts = Counts(documents=1, tokens=size, bytes=3)
        writer.append(split, np.full(size, 300), np.array([size]), {"made": counts}, mask)
    writer.finish({}, "chatml")
    with pytest.raises(
        UserError,
        match=f"{bad} split: a token store must hold an answer that ends within sequence_length = 20 tokens",
    ):
        start(
            batches={"sequence_length": 20, "batch_tokens": 40, "micro_batch_size": 1}, data_dirs=[tmp_path]
        )


SMALL = {
    "vocab_size": 384,
    "num_layers": 1,
    "model_dim": 64,
    "num_heads": 2,
    "mlp_dim": 128,
    "max_positions": 128,
}
LONG = {"sequence_length": 192, "batch_tokens": 384, "micro_batch_size": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_path": None},
            r"config\.model must give the shape of the model where --model-path gives no model",
        ),
        (
            {"model_path": None, "model": SMALL, "lora": LORA},
            r"config\.lora needs a model to adapt: pass --model-path",
        ),
        (
            {"model": SMALL},
            r"config\.model must be null, or that of --model-path .*: num_layers must be 2, got 1",
        ),
        (
            {"batches": LONG},
            r"--model-path .*sequence_length must be at most model\.max_positions = 128, got 192",
        ),
    ],
)
def test_refuses(changes, message, start):
    with pytest.raises(UserError, match=message):
        start(**changes)


def test_an_adapter_is_no_base_and_keeps_its_config(start):
    adapter = start("adapter", lora=LORA, num_steps=6)
    with pytest.raises(UserError, match="--model-path must be a whole model to train, got the adapter"):
        start("again", model_path=adapter)
    with pytest.raises(UserError, match=r"lora\.rank was 32, is 8 now"):
        start("adapter", resume="auto", lora={"rank": 8}, num_steps=7)


def test_the_best_needs_a_validation_split(start, chat_dir, tmp_path):
    with pytest.raises(UserError, match='must be "last" where no data folder has a validation split'):
        start("best", final="best", data_dirs=[without_validation(chat_dir, tmp_path)])


def without_validation(store, folder):
    manifest = read_json(store / "manifest.json")
    for name in manifest["splits"].pop("validation")["files"]:
        assert name.startswith("validation")
    for path in store.glob("train.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
