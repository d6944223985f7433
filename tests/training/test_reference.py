"""The log-probabilities under the model that a run begins with: right, computed once, kept."""

import json
import shutil
import signal

import pytest
import torch

import lumi.training.reference
from lumi.data.token_store import TokenStore
from lumi.host.tensor_files import load_tensors
from lumi.training.metrics import read_metrics

LORA = {"rank": 8, "alpha": 16, "dropout": 0.1, "tokens": ["<|im_end|>"]}


def test_the_reference_is_the_model_that_the_run_begins_with(start_dpo, pairs_dir, dpo_models, tokenizer):
    from transformers import AutoModelForCausalLM

    folder = start_dpo(num_steps=3)
    (path,) = folder.glob("reference-*.safetensors")
    found = load_tensors(path)
    judge = AutoModelForCausalLM.from_pretrained(dpo_models / "reference", dtype=torch.float64)
    for index, name in enumerate(("train", "validation")):
        split = TokenStore.open(pairs_dir).split(name)
        assert len(found[str(index)]) == split.num_documents
        for document in range(0, split.num_documents, 7):
            begin, end = int(split.offsets[document]), int(split.offsets[document + 1])
            ids = torch.tensor(split.tokens[begin:end].tolist())
            with torch.no_grad():
                log_probs = judge(ids[None]).logits[0, :-1].log_softmax(-1)
            expected = log_probs[torch.arange(len(ids) - 1), ids[1:]][
                torch.from_numpy(split.loss_mask(begin, end))[1:]
            ]
            assert found[str(index)][document].item() == pytest.approx(expected.sum().item(), rel=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_is_bit_exact_and_computes_no_reference_again(lora, start_dpo, monkeypatch):
    whole = start_dpo("whole", lora=lora)
    cut = start_dpo("cut", lora=lora)
    shutil.rmtree(cut / "checkpoints" / "step-00000008")

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(lumi.training.reference, "_compute", never)
    start_dpo("cut", lora=lora, resume="auto")
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (cut / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (whole, cut)]
    losses = [[record["loss"] for record in log if record["kind"] == "train"] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_lost_or_damaged_reference_is_computed_again_from_the_start_model(start_dpo):
    """Although the run goes on from weights of its own."""
    folder = start_dpo(num_steps=4)
    (path,) = folder.glob("reference-*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    start_dpo(num_steps=4, resume="auto")
    assert path.read_bytes() == data
    path.unlink()
    start_dpo(num_steps=4, resume="auto")
    assert path.read_bytes() == data


def test_another_precision_has_a_reference_of_its_own(start_dpo):
    folder = start_dpo(num_steps=4)
    start_dpo(num_steps=4, resume="auto", dtype="bfloat16")
    assert len(list(folder.glob("reference-*.safetensors"))) == 2


def test_a_signal_ends_the_reference(start_dpo, monkeypatch):
    real = lumi.training.reference.answer_log_probabilities

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(lumi.training.reference, "answer_log_probabilities", interrupted)
    folder = start_dpo(expect=128 + signal.SIGTERM)
    assert not list(folder.glob("reference*"))
    assert json.loads((folder / "status.json").read_text())["status"] == "preempted"
    monkeypatch.undo()
    start_dpo(resume="auto")
