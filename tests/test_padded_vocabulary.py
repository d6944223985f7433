"""A model with more rows than its tokenizer has ids, whose padding is its end of text and which has no BOS:
generation, scores, export and fine-tuning, by the commands, judged by transformers."""

import json
import random

import pytest
import torch
import transformers
from crafted_models import wanderer
from hugging_face_tokenizers import make
from synthetic import sentence
from torch.nn.functional import log_softmax

from lumi.cli import dispatch
from lumi.evaluation.likelihood import encode_request, score
from lumi.finetune import finetune
from lumi.formats.hf_format import load_model, save_model
from lumi.formats.pretrained import load_pretrained
from lumi.kernels.bundle import REFERENCE
from lumi.tokenizer.loading import load_tokenizer

PADDING = 29
PROMPT = "The river"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("padded") / "model"
    make(folder, "qwen", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, tokenizer.eos_id)
    save_model(folder, wanderer(tokenizer, padding=PADDING), tokenizer)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_text(model, tokenizer, text, count):
    """Greedy, without the ids of the padding, which this model likes best."""
    prompt = torch.tensor([tokenizer.encode(text)])
    padding = list(range(tokenizer.vocab_size, model.config.vocab_size))
    options = {"max_new_tokens": count, "do_sample": False, "suppress_tokens": padding}
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return tokenizer.decode(ids[0].tolist())


def test_generation_never_leaves_the_tokenizer(folder, theirs, capsys):
    tokenizer = load_tokenizer(folder)
    with torch.no_grad():
        liked = theirs(torch.tensor([tokenizer.encode(PROMPT)])).logits[0, -1].argmax()
    assert liked >= tokenizer.vocab_size
    greedy = "--temperature 0 --max-new-tokens 20 --device cpu".split()
    assert dispatch(["generate", "--model-path", str(folder), "--prompt", PROMPT, *greedy]) == 0
    assert capsys.readouterr().out == their_text(theirs, tokenizer, PROMPT, 20) + "\n"


def test_scores_are_theirs(folder, theirs):
    """Of all rows, as they were trained; a text without a context is scored after the end of another one."""
    model, tokenizer, *_ = load_pretrained(folder, device="cpu")
    requests = [encode_request(tokenizer, context, [" opens", " a stone"]) for context in ("The river", "")]
    assert requests[1].context == [tokenizer.eos_id]
    for request, scores in zip(requests, score(model, requests, batch_tokens=64), strict=True):
        for ids, found in zip(request.continuations, scores, strict=True):
            with torch.no_grad():
                logits = theirs(torch.tensor([request.context + ids])).logits[
                    0, len(request.context) - 1 : -1
                ]
            expected = log_softmax(logits.double(), -1)[torch.arange(len(ids)), ids].sum().item()
            assert found.nats == pytest.approx(expected, abs=1e-3)


def test_export_keeps_the_rows(folder, theirs, tmp_path):
    assert dispatch(["export", "--model-path", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.vocab_size == load_tokenizer(folder).vocab_size + PADDING
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_fine_tuning_from_data_to_answers(folder, tmp_path, capsys):
    """A question and its answer become a model whose answer ends; the rows of the padding stay."""
    rng = random.Random(0)
    turns = [[("user", f"Number {n}?"), ("assistant", sentence(rng))] for n in range(40)]
    records = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    few = ["num_steps=6", "optimizer.schedule.warmup_steps=1", "validate_every=3", "save_every=3"]
    out = tmp_path / "out"
    assert finetune(folder, [str(tmp_path / "data.jsonl")], out, merge=True, device="cpu", overrides=few) == 0
    printed = capsys.readouterr().out
    assert "before: " in printed
    tokenizer = load_tokenizer(folder)
    before, after = load_model(folder, REFERENCE), load_model(out / "model", REFERENCE)
    assert after.config.vocab_size == tokenizer.vocab_size + PADDING
    padding = slice(tokenizer.vocab_size, None)
    assert torch.equal(after.output_weight[padding], before.output_weight[padding])
    assert load_tokenizer(out / "model").fingerprint == tokenizer.fingerprint
