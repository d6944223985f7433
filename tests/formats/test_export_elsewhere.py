"""Folders that Lumi writes, in the hands of transformers 5 and 4.57, and back in Lumi's."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers_judge
from crafted_models import add_noise
from hugging_face_tokenizers import make
from llama_2_tokenizers import train_model, write_config
from synthetic import document

from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids
from lumi.formats.export import export_model
from lumi.formats.hf_format import save_model
from lumi.formats.pretrained import load_pretrained
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

# Without their dependencies: what is installed beside them is new enough, and torch stays as it is.
OLDER = (
    "transformers==4.57.* tokenizers==0.22.* huggingface-hub==0.36.* requests urllib3 idna certifi "
    "charset-normalizer"
).split()
MESSAGES = [("system", "Brief."), ("user", "Où est  le río?")]
FOLDERS = ["final", "sentencepiece", "sentencepiece and config", "byte level"]


def texts(folder):
    """Texts without control tokens. U+2581 is a space to transformers where a vocabulary writes it so."""
    rng = np.random.default_rng(0)
    ranges = [(32, 127)] * 3 + [(0x80, 0x2500), (0x3000, 0x9000), (0x1F300, 0x1F700), (9, 14)]
    random = [
        "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(40)) for _ in range(170)
    ]
    prose = document(7) + "def f(x):\n    if x:\n\t\treturn '🎉 é' * 2\r\n don't I'LL 1234567 12 "
    cuts = [prose[i : i + 50] for i in range(0, len(prose), 10)]
    spaces = [" " * n + "river" + " " * n + "x" + "\n" * n + "  " for n in range(40)]
    awkward = ["", " ", "     ", "\n", "\t x", "a\0b", "<0x0A>", "e\u0301 ｶﾞ ﬁ \u00a0\u3000", "▁"]
    found = [*random, *cuts, *spaces, *awkward]
    if folder != "byte level":
        found = [text for text in found if "▁" not in text]
    if folder == "sentencepiece and config":  # transformers 5 loses the first space of its LlamaTokenizer
        found = [text for text in found if not text.startswith(" ")]
    return found


def build(tokenizer, **changes):
    """A small noisy model that likes to end texts."""
    shape = {"num_layers": 2, "model_dim": 48, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 80}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_positions=64, **shape, **changes)
    model = add_noise(Transformer(config, REFERENCE).init_weights(0).eval())
    with torch.no_grad():
        model.lm_head.weight[list(tokenizer.eos_ids)] *= 2
    return model


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """By name: what Lumi writes, of a run of its own or exported from what others gave it."""
    made = tmp_path_factory.mktemp("elsewhere")
    save_model(made / "final", build(tokenizer), tokenizer)
    found = {"final": made / "final"}
    for name in FOLDERS[1:]:
        given = made / "given" / name
        if name == "byte level":
            make(given, "qwen")
        else:
            train_model(given)
        if name == "sentencepiece and config":
            write_config(given)
        files = {path.name: path.read_bytes() for path in given.iterdir()}
        theirs = load_tokenizer(given)
        save_model(given, build(theirs, qkv_bias=name == "byte level"), theirs)
        for path in given.iterdir():  # as others publish it
            if path.name not in files and "tokenizer" in path.name:
                path.unlink()
        found[name] = made / "exported" / name
        export_model(given, found[name])
    return found


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """transformers 4.57 in a folder of its own."""
    folder = tmp_path_factory.mktemp("packages")
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *OLDER], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"pip cannot install transformers 4.57 here: {done.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(params=["installed", pytest.param("4.57", marks=pytest.mark.soak)])
def judge(request, tmp_path):
    """`transformers_judge.judge`, by the transformers that is installed or by an older one."""
    if request.param == "installed":
        return transformers_judge.judge
    folder = request.getfixturevalue("older")

    def judge(**question):
        asked, answer = tmp_path / "asked.json", tmp_path / "answer.json"
        asked.write_text(json.dumps(question))
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, transformers_judge.__file__, str(asked), str(answer)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        judged = json.loads(answer.read_text())
        assert judged["version"].startswith("4.57.")
        return judged

    return judge


@pytest.mark.parametrize("name", FOLDERS)
def test_others_read_and_save_what_lumi_writes(name, folders, judge, tmp_path):
    """The same ids, logits and answers to their ends; and Lumi knows the folder again that they save."""
    model, tokenizer, *_ = load_pretrained(folders[name], device="cpu", kernels="reference")
    messages = None if tokenizer.chat_template is None else [Message(*message) for message in MESSAGES]
    shape = (12, 10)
    prompts = torch.randint(10, tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    judged = judge(
        folder=str(folders[name]),
        saved=str(tmp_path / "saved"),
        texts=texts(name),
        prompts=prompts.tolist(),
        messages=messages and [{"role": role, "content": text} for role, text in MESSAGES],
    )
    assert len(texts(name)) > 200
    ids = [tokenizer.encode(text) for text in texts(name)]
    assert judged["ids"] == ids
    assert judged["decoded"] == [tokenizer.decode(row) for row in ids]
    assert tuple(judged["begin"]) == tokenizer.begin_ids
    assert judged["roles"] == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert judged["chat"] == (None if messages is None else prompt_ids(tokenizer, messages))
    with torch.no_grad():
        logits = model.logits(model.hidden(prompts))
    torch.testing.assert_close(torch.tensor(judged["logits"]), logits, rtol=0, atol=1e-4)

    greedy = SamplingConfig(max_new_tokens=transformers_judge.MAX_NEW_TOKENS, temperature=0.0)
    ends = frozenset(tokenizer.eos_ids)
    answers = generate_ids(model, prompts.tolist(), greedy, stop_ids=ends, pad_id=0)
    assert {answer.stopped for answer in answers} == {True, False}
    for answer, theirs in zip(answers, judged["generated"], strict=True):
        assert answer.ids == (theirs[:-1] if answer.stopped else theirs)
        assert answer.stopped == (theirs[-1] in ends)

    again = load_pretrained(tmp_path / "saved", device="cpu", kernels="reference")
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    assert again.tokenizer.chat_template == tokenizer.chat_template
    assert again.tokenizer.eos_ids == tokenizer.eos_ids
    assert again.tokenizer.control_ids == tokenizer.control_ids
    assert [again.tokenizer.encode(text, "control") for text in texts(name)] == [
        tokenizer.encode(text, "control") for text in texts(name)
    ]
    weights, others = model.state_dict(), again.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
