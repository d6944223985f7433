"""Models go to a hub in this process by huggingface_hub's own client, and come back as they were."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from crafted_models import save_adapted, save_base
from hub_server import TOKEN
from huggingface_hub.repocard import metadata_load
from pushing import card_of, push, refusal

from lumi.formats.export import merge_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.pretrained import load_pretrained
from lumi.host.hub_cache import HubModel, origin_of
from lumi.host.storage import sha256_file
from lumi.model.lora import LoraConfig
from lumi.tokenizer.loading import load_tokenizer


class TestPretrained:
    def test_there_and_back(self, chain, hub, capsys):
        push(chain / "pretrain", "me/rivers", "--license", "apache-2.0")
        files = hub.files("me/rivers")
        final = {path.name: path.read_bytes() for path in (chain / "pretrain" / "final").iterdir()}
        del final["provenance.json"]  # it names folders of this machine
        assert {name: files[name] for name in final} == final
        assert files["loss.png"] == b"a picture"
        assert files.keys() - final.keys() == {"README.md", "loss.png", ".gitattributes"}
        assert len(hub.messages) == 2  # the repository's first, and ours
        loaded = load_pretrained("me/rivers", device="cpu")
        ours = load_pretrained(chain / "pretrain", device="cpu")
        assert all(map(torch.equal, loaded.model.parameters(), ours.model.parameters()))
        assert loaded.tokenizer.fingerprint == ours.tokenizer.fingerprint
        assert TOKEN not in "".join(capsys.readouterr())

    def test_the_card(self, chain, evaluated, hub, tmp_path):
        run = chain / "pretrain"
        evaluated(run / "final", chain / "judged")
        push(run, "me/rivers", "--license", "apache-2.0")
        (tmp_path / "card.md").write_bytes(hub.files("me/rivers")["README.md"])
        assert metadata_load(tmp_path / "card.md") == {
            "license": "apache-2.0",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["lumi", "pretraining"],
        }
        text = card_of(hub, "me/rivers").text
        assert "1,024 in the batches of these steps" in text  # 4 steps of 256 tokens
        assert "| steps | 4 of 4 |" in text
        assert load_tokenizer(chain / "tokenizer").fingerprint in text
        assert weights_fingerprint(run / "final") in text
        assert "| corpus | jsonl: corpus.jsonl |" in text
        assert "secret" not in text  # where the files lay concerns nobody
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if record["kind"] == "validation"]
        assert f"| the only one | 4 | {losses[-1]:.4f}" in text
        assert "smoke: facts" in text
        assert "prompts of prompts.json; greedy, at most 2 tokens, continued as text" in text
        assert "![Loss of training and validation by step](loss.png)" in text
        assert json.dumps(json.loads((run / "config.json").read_text()), indent=2) in text

    def test_the_snippet_works(self, chain, hub, capsys):
        push(chain / "pretrain", "me/rivers")
        [code] = [part.split("```")[0] for part in card_of(hub, "me/rivers").text.split("```python\n")[1:]]
        capsys.readouterr()
        names = {}
        exec(code, names)
        judged = transformers.AutoModelForCausalLM.from_pretrained(chain / "pretrain" / "final")
        expected = judged.generate(**names["inputs"], max_new_tokens=64)
        assert torch.equal(names["output"], expected)

    def test_a_dry_run_shows_everything_and_asks_nothing(self, chain, hub, monkeypatch, capsys):
        monkeypatch.delenv("HF_TOKEN")
        (chain / "pretrain" / "final" / "notes.txt").write_text("mine")
        push(chain / "pretrain", "me/rivers", "--dry-run")
        shown = capsys.readouterr().out
        size = (chain / "pretrain" / "final" / "model.safetensors").stat().st_size
        assert "trained by the run: moved/chain/pretrain\n" in shown
        assert f"{size:,} bytes  model.safetensors" in shown
        assert "to me/rivers\n" in shown
        assert "left out: notes.txt" in shown
        assert "base_model" not in shown
        assert "# rivers\n" in shown
        assert "No licence was given." in shown
        assert "dry run: the hub was asked nothing, and nothing was sent" in shown
        assert hub.requests == []


class TestMerged:
    """Of its run, its data and its evaluation it knows by its records alone."""

    def test_an_export_of_a_merged_model(self, chain, hub):
        push(chain / "exported", "me/tuned")
        card = card_of(hub, "me/tuned")
        assert card.data.tags == ["lumi", "sft"]
        assert "fine-tuning of an adapter, merged into its base" in card.text
        assert "| chats | jsonl: chats.jsonl | 60 | 60 |" in card.text
        assert weights_fingerprint(chain / "pretrain" / "final") in card.text
        assert "| began with | the model of the run below |" in card.text
        assert "| began with | random weights |" in card.text
        assert "| corpus | jsonl: corpus.jsonl |" in card.text  # the data of its base
        assert "What its base had learnt" not in card.text
        for kind in ("The last run: fine-tuning", "Before it: pre-training"):
            assert card.text.count(f"### {kind}") == 3  # training, data, configuration
        assert card.text.count("store: tokens / validation;") == 2  # each protocol once
        assert "| baseline |" not in card.text
        assert hub.files("me/tuned")["loss.png"] == b"a picture"

    def test_its_base_on_the_hub(self, tune, hub, chain):
        merge_adapter(tune("questions"), chain / "whole")
        push(chain / "whole", "me/whole")
        assert card_of(hub, "me/whole").data.base_model == "me/base"


class TestBrokenChains:
    def test_a_changed_model_is_refused(self, chain, flip, hub, capsys):
        file = chain / "merged" / "model.safetensors"
        recorded = sha256_file(file)
        flip(file)
        said = refusal(capsys, chain / "merged", "me/x")
        shown = f"changed: model.safetensors, recorded {recorded[:12]}, found {sha256_file(file)[:12]}"
        assert f"must be as it was written, got model  moved/chain/merged  -  {shown}" in said
        assert said.endswith("; restore it; if you have changed it yourself, remove its provenance.json")
        assert hub.requests == []
        (chain / "merged" / "provenance.json").unlink()
        push(chain / "merged", "me/x")
        assert "How it was trained is not known here" in card_of(hub, "me/x").text

    def test_what_is_behind_it_is_named_and_not_in_the_card(self, chain, chains, hub, capsys):
        shutil.rmtree(chain / "questions")
        shutil.copytree(chains / "b" / "questions", chain / "questions")
        shutil.rmtree(chain / "corpus")
        push(chain / "merged", "me/x")
        shown = capsys.readouterr().out
        assert re.search(
            r"not in the card: token store  \S+questions  \w+  from another chain: recorded", shown
        )
        assert re.search(r"not in the card: corpus  \S+corpus  \w+  missing", shown)
        assert "Nothing is known of this data but its hash" in card_of(hub, "me/x").text

    def test_what_has_moved_is_searched(self, chain, hub, tmp_path):
        (tmp_path / "far").mkdir()
        (chain / "chats").rename(tmp_path / "far" / "chats")
        push(chain / "merged", "me/x")
        assert "the corpus was not found" in card_of(hub, "me/x").text
        push(chain / "merged", "me/x", "--search", tmp_path / "far")
        assert "| chats | jsonl: chats.jsonl | 60 | 60 |" in card_of(hub, "me/x").text


class TestAdapters:
    @pytest.fixture
    def adapter_run(self, tune):
        return tune("questions")

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
        assert "fine-tuning of an adapter |" in card.text
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
        push(tune(pairs, dpo={}), "me/preferred")
        card = card_of(hub, "me/preferred")
        assert card.data.tags == ["lumi", "lora", "dpo"]
        assert "direct preference optimization of an adapter" in card.text
        assert "loss (nats per pair)" in card.text
        assert " pairs, " in card.text
        assert "| pairs | jsonl: pairs.jsonl | 60 | 60 |" in card.text

    def test_a_base_that_is_not_on_the_hub(self, hub, base_dir, tokenizer, tmp_path, capsys):
        save_adapted(base_dir, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
        assert refusal(capsys, "adapter", "me/adapter") == (
            f"adapter: the base must be on the hub for whoever loads it, got {base_dir}; push it "
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


def test_a_run_must_be_finished(chain, hub, change_json, capsys):
    change_json(chain / "pretrain" / "status.json", lambda status: status.update(status="preempted"))
    assert "must be a finished run, got one preempted" in refusal(capsys, chain / "pretrain", "me/x")


def test_a_base_needs_a_fine_tuned_run(chain, hub, capsys):
    said = refusal(capsys, chain / "pretrain", "me/x", "--base-model", "me/base")
    assert said.startswith("--base-model must come with a fine-tuned model, got a run that began with random")
