"""Models go to a hub in this process by huggingface_hub's own client, and come back as they were."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from crafted_models import save_adapted, save_base
from hub_server import TOKEN
from huggingface_hub.repocard import metadata_load
from pushing import card_of, push, refusal

from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hub import HubModel, origin_of
from lumi.formats.pretrained import load_pretrained
from lumi.model.lora import LoraConfig

LORA = {"rank": 2, "alpha": 4}


class TestPretrained:
    def test_there_and_back(self, pretrained_run, hub, capsys):
        push(pretrained_run, "me/rivers", "--license", "apache-2.0")
        files = hub.files("me/rivers")
        final = {path.name: path.read_bytes() for path in (pretrained_run / "final").iterdir()}
        assert {name: files[name] for name in final} == final
        assert files["loss.png"] == (pretrained_run / "loss.png").read_bytes()
        assert files.keys() - final.keys() == {"README.md", "loss.png", ".gitattributes"}
        assert len(hub.messages) == 2  # the repository's first, and ours
        loaded = load_pretrained("me/rivers", device="cpu")
        ours = load_pretrained(pretrained_run, device="cpu")
        assert all(map(torch.equal, loaded.model.parameters(), ours.model.parameters()))
        assert loaded.tokenizer.fingerprint == ours.tokenizer.fingerprint
        assert TOKEN not in "".join(capsys.readouterr())

    def test_the_card(self, pretrained_run, evaluated, hub, tokenizer, tmp_path):
        evaluated(pretrained_run / "final", tmp_path / "evaluation")
        push(pretrained_run, "me/rivers", "--license", "apache-2.0")
        (tmp_path / "card.md").write_bytes(hub.files("me/rivers")["README.md"])
        assert metadata_load(tmp_path / "card.md") == {
            "license": "apache-2.0",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["lumi", "pretraining"],
        }
        text = card_of(hub, "me/rivers").text
        assert "3,072 in the batches of these steps" in text  # 12 steps of 256 tokens
        assert "| steps | 12 of 12 |" in text
        assert tokenizer.fingerprint in text
        assert weights_fingerprint(pretrained_run / "final") in text
        assert "| rivers | jsonl: raw.jsonl |" in text
        assert "secret" not in text  # where the files lay concerns nobody
        records = [json.loads(line) for line in (pretrained_run / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if record["kind"] == "validation"]
        assert f"| last | 12 | {losses[-1]:.4f}" in text
        assert "smoke: facts" in text
        assert "prompts of prompts.json; greedy, at most 2 tokens, continued as text" in text
        assert "![Loss of training and validation by step](loss.png)" in text
        assert json.dumps(json.loads((pretrained_run / "config.json").read_text()), indent=2) in text

    def test_the_snippet_works(self, pretrained_run, hub, capsys):
        push(pretrained_run, "me/rivers")
        [code] = [part.split("```")[0] for part in card_of(hub, "me/rivers").text.split("```python\n")[1:]]
        capsys.readouterr()
        names = {}
        exec(code, names)
        judged = transformers.AutoModelForCausalLM.from_pretrained(pretrained_run / "final")
        expected = judged.generate(**names["inputs"], max_new_tokens=64)
        assert torch.equal(names["output"], expected)

    def test_a_dry_run_shows_everything_and_asks_nothing(self, pretrained_run, hub, monkeypatch, capsys):
        monkeypatch.delenv("HF_TOKEN")
        (pretrained_run / "final" / "notes.txt").write_text("mine")
        push(pretrained_run, "me/rivers", "--dry-run")
        shown = capsys.readouterr().out
        size = (pretrained_run / "final" / "model.safetensors").stat().st_size
        assert f"{size:,} bytes  model.safetensors" in shown
        assert "to me/rivers\n" in shown
        assert "left out: notes.txt" in shown
        assert "base_model" not in shown
        assert "# rivers\n" in shown
        assert "No licence was given." in shown
        assert "dry run: the hub was asked nothing, and nothing was sent" in shown
        assert hub.requests == []


class TestAdapters:
    @pytest.fixture
    def tune(self, hub, start):
        """Train an adapter of `me/base`; returns the run."""
        rows = {"sequence_length": 128}
        hub.upload("me/base", start("base", num_steps=2, model={"max_positions": 256}) / "final")
        common = {"model": None, "lora": LORA, "batches": rows, "num_steps": 4, "draws": True}

        def tune(data, **changes):
            return start(data_dirs=[data], model_path=Path("me/base"), **common, **changes)

        return tune

    @pytest.fixture
    def adapter_run(self, tune, chats):
        return tune(chats)

    def test_an_sft_adapter(self, adapter_run, hub, tmp_path, capsys):
        push(adapter_run, "me/tuned")
        base = hub.refs["me/base"]["main"]
        card = card_of(hub, "me/tuned")
        assert card.data.to_dict() == {
            "base_model": "me/base",
            "base_model_relation": "adapter",
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": ["lumi", "lora", "sft"],
        }
        assert f"[me/base](https://huggingface.co/me/base) at `{base}`" in card.text
        assert "fine-tuning of an adapter" in card.text
        assert "| chats | jsonl: chats.jsonl | 60 | 60 |" in card.text
        assert " conversations, " in card.text
        loaded, ours = (load_pretrained(path, device="cpu") for path in ("me/tuned", adapter_run))
        assert all(map(torch.equal, loaded.model.parameters(), ours.model.parameters()))
        assert origin_of(loaded.folder) == HubModel("me/base", base)

    def test_the_snippet_works_with_peft(self, adapter_run, hub):
        push(adapter_run, "me/tuned")
        [code] = [part.split("```")[0] for part in card_of(hub, "me/tuned").text.split("```python\n")[1:]]
        names = {}
        exec(code, names)
        assert isinstance(names["model"], peft.PeftModel)
        ends = json.loads((adapter_run / "final" / "generation_config.json").read_text())["eos_token_id"]
        assert names["settings"].eos_token_id == ends
        ours = load_pretrained(adapter_run, device="cpu").model
        ids = names["inputs"]["input_ids"]
        logits = torch.nn.functional.linear(ours.hidden(ids), ours.output_weight)
        torch.testing.assert_close(names["model"](ids).logits, logits)

    def test_dpo(self, tune, hub, pairs):
        trained = tune(pairs, dpo={})
        push(trained, "me/preferred")
        card = card_of(hub, "me/preferred")
        assert card.data.tags == ["lumi", "lora", "dpo"]
        assert "direct preference optimization of an adapter" in card.text
        assert "loss (nats per pair)" in card.text
        assert " pairs, " in card.text
        assert "| pairs | jsonl: pairs.jsonl | 60 | 60 |" in card.text

    def test_a_base_that_is_not_on_the_hub(self, hub, base_dir, tokenizer, tmp_path, capsys):
        save_adapted(base_dir, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
        assert refusal(capsys, "adapter", "me/adapter") == (
            f"adapter: the base must be on the hub for whoever loads the adapter, got {base_dir}; push it "
            "(`lumi push BASE OWNER/NAME`) and pass --base-model OWNER/NAME, or `lumi merge` both"
        )
        push(base_dir, "me/base")
        push("adapter", "me/adapter", "--base-model", "me/base")
        config = json.loads(hub.files("me/adapter")["adapter_config.json"])
        assert config["base_model_name_or_path"] == "me/base"
        assert config["revision"] == hub.refs["me/base"]["main"]
        here = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert here["base_model_name_or_path"] == str(base_dir)  # the user's own is left as it is
        loaded, ours = (load_pretrained(path, device="cpu") for path in ("me/adapter", "adapter"))
        assert all(map(torch.equal, loaded.model.parameters(), ours.model.parameters()))

    def test_another_model_is_not_the_base(self, hub, base_dir, tokenizer, tmp_path, capsys):
        save_adapted(base_dir, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
        push(save_base(tokenizer, tmp_path / "other", tied_embeddings=True), "me/other")
        said = refusal(capsys, "adapter", "me/adapter", "--base-model", "me/other")
        assert "--base-model must be the model that training began with, of fingerprint" in said
        assert "me/adapter" not in hub.commits


class TestFineTunes:
    def test_a_whole_model_names_its_base(self, hub, start, base_dir):
        hub.upload("me/base", base_dir)
        push(start(model=None, num_steps=2, model_path=Path("me/base")), "me/tuned")
        data = card_of(hub, "me/tuned").data
        assert (data.base_model, data.base_model_relation) == ("me/base", "finetune")

    def test_of_a_model_here(self, hub, start, base_dir):
        trained = start(model=None, num_steps=2, model_path=base_dir)
        push(trained, "me/tuned")
        card = card_of(hub, "me/tuned")
        assert "base_model" not in card.data.to_dict()
        assert "a model that is not on the hub, as far as is known" in card.text
        assert weights_fingerprint(base_dir) in card.text
        assert str(base_dir) not in card.text
        push(base_dir, "me/base")
        push(trained, "me/tuned", "--base-model", "me/base")
        assert card_of(hub, "me/tuned").data.base_model == "me/base"


class TestOtherFolders:
    def test_what_is_not_known_is_said(self, hub, base_dir):
        push(base_dir, "me/base")
        card = card_of(hub, "me/base")
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["lumi"],
        }
        assert "How it was trained is not known here" in card.text
        assert "The data is not known here." in card.text

    def test_a_card_of_somebody_is_sent_as_it_is(self, hub, base_dir, capsys):
        (base_dir / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        push(base_dir, "me/base")
        assert hub.files("me/base")["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
        assert (
            "base/README.md: is the card; --replace-card has another one written" in capsys.readouterr().out
        )
        push(base_dir, "me/base", "--replace-card")
        assert card_of(hub, "me/base").data.tags == ["lumi"]

    def test_data_needs_a_run(self, base_dir, store_dir, hub, capsys):
        said = refusal(capsys, base_dir, "me/base", "--data-dirs", store_dir)
        assert said.startswith("--data-dirs must come with a run, got ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing", "me/x"], "RUN must be a run or a model folder here, got missing; check the path"),
        (["base", "x"], "REPO must be OWNER/NAME, got 'x'; letters, digits, -, _ and . make a name"),
        (["base", "me/x@v1"], "REPO must be OWNER/NAME, got 'me/x@v1'; pass a branch by --branch"),
        (
            ["base", "me/x", "--license", "MIT"],
            "--license must be spelt as the hub does, such as apache-2.0 or mit, got 'MIT'",
        ),
        (["base", "me/x", "--base-model", "x"], "--base-model must be OWNER/NAME on the hub, got 'x'"),
    ],
)
def test_wrong_arguments(words, said, hub, base_dir, capsys):
    assert refusal(capsys, *words) == said
    assert hub.requests == []


def test_a_run_must_be_finished(pretrained_run, hub, capsys):
    status = pretrained_run / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"status": "preempted"}))
    assert "must be a finished run, got one preempted" in refusal(capsys, pretrained_run, "me/x")


def test_a_base_needs_a_fine_tuned_run(pretrained_run, hub, capsys):
    said = refusal(capsys, pretrained_run, "me/x", "--base-model", "me/base")
    assert said.startswith("--base-model must come with a fine-tuned model, got a run that began with random")
