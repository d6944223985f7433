"""`lumi finetune` on models of a few thousand parameters; PEFT judges what it leaves."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from crafted_models import SHAPE, add_noise
from hugging_face_tokenizers import CHATML, make
from synthetic import conversation

from lumi import cli
from lumi.chat.messages import to_json
from lumi.config import UserError, read_json
from lumi.corpus import read_corpus
from lumi.data.token_store import TokenStore
from lumi.formats.export import export_model
from lumi.formats.hf_format import load_model, read_shape, save_model
from lumi.formats.pretrained import load_pretrained
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.provenance.chain import verify
from lumi.provenance.run_facts import find_run
from lumi.tokenizer.loading import load_tokenizer
from lumi.training.metrics import read_metrics

STEPS = ("num_steps=12", "validate_every=4", "save_every=4", "optimizer.peak_lr=0.01", "dtype=float32")


def write_model(folder, tokenizer, rows=420):
    config = ModelConfig(vocab_size=rows, max_positions=512, **SHAPE)
    save_model(folder, add_noise(Transformer(config, REFERENCE).init_weights(0)), tokenizer)
    return folder


@pytest.fixture
def model(tmp_path):
    """A chat model of others, with a template of its own and rows beyond its tokenizer."""
    return write_model(tmp_path / "model", load_tokenizer(make(tmp_path / "tokenizer", "qwen")), rows=448)


@pytest.fixture
def chats(tmp_path):
    """A file of conversations, three broken records among them."""
    rows = [{"messages": to_json(conversation(seed))} for seed in range(60)]
    rows[7] = {"messages": [{"role": "user"}]}
    rows[8] = {"text": "x"}
    rows[9]["messages"][0]["tool_calls"] = [{"name": "f"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "chats.jsonl"


def finetune(*arguments):
    return cli.dispatch(["finetune", *map(str, arguments)])


def validations(run):
    return [
        record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "validation"
    ]


def test_one_command_and_a_second_call(model, chats, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(model, chats, "--output-dir", out, "--merge", *STEPS) == 0
    said = capsys.readouterr().out
    assert "format: {'kind': 'messages', 'field': 'messages'}, which reads 57 of the first 60 records" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "corpus", "finetune.json", "model", "prepare.json", "run", "tokens", "train.json",
    ]  # fmt: skip
    losses = validations(out / "run")
    assert losses[-1] < losses[0] - 0.2
    counts = read_corpus(out / "corpus").manifest["sources"][0]["dropped"]
    assert {"malformed_messages", "missing_text", "no_place_for_tool_calls"} <= counts.keys()
    config = read_json(out / "train.json")
    assert (config["num_steps"], config["optimizer"]["peak_lr"], config["final"]) == (12, 0.01, "best")
    # The model's own template, whose tokens it knows.
    assert TokenStore.open(out / "tokens").manifest.template.startswith("model-")
    assert config["lora"]["tokens"] == []
    assert said.count("before: ") == said.count("after:  ") == 3
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.PeftModel.from_pretrained(base, out / "run" / "final").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    before = {path: path.stat().st_mtime_ns for path in (out / "run").rglob("*") if path.is_file()}
    assert finetune(model, chats, "--output-dir", out, "--merge", *STEPS) == 0
    assert "is there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "run").rglob("*") if path.is_file()} == before


def test_an_interrupted_call_goes_on(model, chats, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(model, chats, "--output-dir", whole, *STEPS)
    finetune(model, chats, "--output-dir", cut, *STEPS)
    last = sorted((cut / "run" / "checkpoints").iterdir())[-1]
    for path in (*last.rglob("*"), *(cut / "run" / "final").rglob("*")):
        path.unlink()
    last.rmdir()
    (cut / "run" / "final").rmdir()
    assert finetune(model, chats, "--output-dir", cut, *STEPS) == 0
    first, second = (
        (folder / "run" / "final" / "adapter_model.safetensors").read_bytes() for folder in (whole, cut)
    )
    assert first == second


def test_a_folder_is_of_one_fine_tuning(model, chats, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    finetune(model, chats, "--output-dir", out, "--merge", *STEPS)
    shutil.copytree(model, other)
    settings = read_json(out / "train.json")
    for arguments, changed in (
        ((other, chats, *STEPS), "model was"),
        ((model, chats, "--epochs", 2, *STEPS), "epochs was null, is 2.0 now"),
        ((model, chats, *STEPS[:-1]), "overrides.4 was"),
        ((model, chats, chats, *STEPS), "data.1 was"),
    ):
        with pytest.raises(
            UserError, match=rf"must be of the same fine-tuning, got .*{changed}.*; choose another"
        ):
            finetune(*arguments, "--output-dir", out)
    assert read_json(out / "train.json") == settings
    # A run that was removed is trained anew, and merged anew.
    (out / "model" / "stale").touch()
    shutil.rmtree(out / "run")
    finetune(model, chats, "--output-dir", out, *STEPS)
    assert not (out / "model").exists()


def test_all_parameters_instead_of_adapters(model, chats, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match="--merge must be left out where lora is null, got both; leave it out"
    ):
        finetune(model, chats, "--output-dir", out, "--merge", "lora=null", *STEPS)
    assert not (out / "run").exists()
    assert finetune(model, chats, "--output-dir", out, "lora=null", *STEPS) == 0
    assert not (out / "run" / "final" / "adapter_config.json").exists()


def test_what_the_template_refuses_is_not_asked(tmp_path, capsys):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(make(tmp_path / "tokenizer", "qwen", chat_template=refusing))
    chats = [to_json(conversation(seed)) for seed in range(60)]
    for chat in chats[::2]:
        chat.insert(0, {"role": "system", "content": "Be brief."})
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    model = write_model(tmp_path / "model", tokenizer)
    assert finetune(model, tmp_path / "chats.jsonl", "--output-dir", tmp_path / "out", *STEPS) == 0
    said = capsys.readouterr().out
    assert "refused_by_template: must accept the conversation, but says: no system left out" in said
    assert said.count("before: ") == 3


def test_pairs_are_recognised(model, tmp_path, capsys):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes, {n} it is.", "rejected": "No."} for n in range(80)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert finetune(model, tmp_path / "pairs.json", "--output-dir", out, *STEPS) == 0
    said = capsys.readouterr().out
    assert (
        "pairs of answers; the first is:\n  [user] Question 0?\n  [chosen] Yes, 0 it is.\n  [rejected] No."
        in said
    )
    assert read_json(out / "train.json")["dpo"]["beta"] == 0.1
    losses = validations(out / "run")
    assert losses[-1] < losses[0]


def test_chatml_for_a_model_without_a_template(tmp_path, chats, capsys):
    """A tokenizer without ChatML's tokens: a copy of the model gets them, and training sets their rows."""
    folder = make(tmp_path / "tokenizer", "qwen", chat_template=None, eos_token="<|endoftext|>")
    data = json.loads((folder / "tokenizer.json").read_text().replace("<|im_", "<|other_"))
    (folder / "tokenizer.json").write_text(json.dumps(data))
    size = load_tokenizer(folder).vocab_size
    model = write_model(tmp_path / "model", load_tokenizer(folder), rows=size)
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"must have a chat template or the tokens of ChatML, got neither; pass --add"
    ):
        finetune(model, chats, "--output-dir", out, *STEPS)
    assert finetune(model, chats, "--output-dir", out, "--add-chatml", "--merge", *STEPS) == 0
    assert (
        f"a copy of the model with <|im_start|> and <|im_end|> as [{size}, {size + 1}]"
        in capsys.readouterr().out
    )
    assert (read_shape(model).vocab_size, read_shape(out / "base").vocab_size) == (size, size + 2)
    rows = load_model(out / "base", REFERENCE).output_weight
    torch.testing.assert_close(rows[size], load_model(model, REFERENCE).output_weight.mean(dim=0))
    merged = load_pretrained(out / "model", device="cpu")
    assert merged.tokenizer.control_ids["<|im_end|>"] == size + 1
    assert not torch.equal(merged.model.output_weight[size + 1], rows[size + 1])
    assert torch.equal(merged.model.output_weight[:size], rows[:size])
    assert json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"] == [0, size + 1]
    models = {each.path: each.verdict for each in verify(out / "model").all() if each.kind == "model"}
    # What `save_model` wrote for this test stands for a model of others.
    assert models == {out / "model": "ok", out / "base": "ok", model: "not recorded"}
    assert find_run(verify(out / "model")).folder == out / "run"
    theirs = transformers.AutoTokenizer.from_pretrained(out / "model")
    asked = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"][0] == size
    with pytest.raises(UserError, match=r"must be a whole model, got the adapter .*; `lumi merge` makes one"):
        finetune(out / "run", chats, "--output-dir", tmp_path / "again")
    with pytest.raises(UserError, match=r"must lack ChatML, got a chat template; leave --add-chatml out"):
        finetune(out / "model", chats, "--output-dir", tmp_path / "again", "--add-chatml")


def test_a_base_model_that_has_the_tokens_learns_their_rows(tmp_path, chats):
    folder = make(tmp_path / "tokenizer", "smollm2", chat_template=None)
    out = tmp_path / "out"
    assert (
        finetune(write_model(tmp_path / "model", load_tokenizer(folder)), chats, "--output-dir", out, *STEPS)
        == 0
    )
    assert read_json(out / "train.json")["lora"]["tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert TokenStore.open(out / "tokens").manifest.template == "chatml"


def test_the_long_way_goes_on_from_what_it_leaves(model, chats, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    finetune(model, chats, "--output-dir", out, *STEPS)
    cli.dispatch(["prepare", "--config", str(out / "prepare.json"), "--output-dir", str(again / "corpus")])
    fraction = TokenStore.open(out / "tokens").manifest.inputs["validation_fraction"]
    arguments = ["--tokenizer-dir", str(model), "--output-dir", str(again / "tokens")]
    cli.dispatch(
        ["tokenize", "--corpus-dirs", str(again / "corpus"), "--validation-fraction", fraction, *arguments]
    )
    stores = [TokenStore.open(folder / "tokens").manifest.splits for folder in (out, again)]
    assert stores[0] == stores[1]
    export_model(model, again / "copy")  # the same weights in another folder


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[1, 2]", "must hold conversations or pairs of answers in a known format"),
        ('[{"body": "x"}]', "must hold conversations or pairs .*, got the fields body; rename the fields"),
        ("[]", "must hold conversations or pairs of answers in a known format, got no record"),
    ],
)
def test_data_that_is_not_recognised(model, tmp_path, data, message):
    (tmp_path / "data.json").write_text(data)
    with pytest.raises(UserError, match=message):
        finetune(model, tmp_path / "data.json", "--output-dir", tmp_path / "out")


def test_what_is_no_model_or_no_data(model, chats, tmp_path):
    for arguments, message in (
        ((tmp_path / "nowhere", chats), "must be a model folder"),
        ((model, tmp_path / "nowhere.jsonl"), "nowhere.jsonl"),
        ((model, chats, chats.with_suffix(".parquet")), "all of one kind"),
        ((model, tmp_path / "a.csv"), "must be .jsonl, .json or .parquet files"),
        ((model, chats, "--split", "sft"), "--split must come with a dataset on the hub"),
        ((model, chats, "--epochs", "0"), "--epochs must be above 0, got 0.0"),
        ((model, chats, "--epochs", "nan"), "--epochs must be above 0, got nan"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(*arguments, "--output-dir", tmp_path / "out")
