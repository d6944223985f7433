"""Names on the hub -> folders here, by huggingface_hub's own client against a hub in this process."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
import transformers
from crafted_models import save_adapted, save_base
from hub_server import TOKEN
from runs import final_weights, merged

from lumi.cli import dispatch
from lumi.config import UserError, from_dict, read_json
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
from lumi.evaluation.smoke import SmokeConfig
from lumi.finetune import FineTuning
from lumi.formats.adapter_format import base_of
from lumi.formats.export import merge_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hub import as_before, hub_model, local_folder
from lumi.formats.pretrained import load_pretrained
from lumi.host.hub_cache import HubModel, name_of, origin_of
from lumi.model.lora import LoraConfig
from lumi.provenance.chain import verify
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

LORA = {"rank": 2, "alpha": 4}


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    """As others publish theirs, without a record."""
    folder = save_base(tokenizer, tmp_path / "base")
    (folder / "provenance.json").unlink()
    return folder


@pytest.fixture
def on_hub(hub, base_dir):
    """`me/base` on the hub; returns its commit."""
    return hub.upload("me/base", base_dir)


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("me/base", HubModel("me/base", None)),
        ("me/base@v1", HubModel("me/base", "v1")),
        ("me/base@refs/pr/1", HubModel("me/base", "refs/pr/1")),
        ("runs/missing", None),  # a folder `runs` is here
        ("runs/missing@main", HubModel("runs/missing", "main")),
        ("runs/there", None),
        ("base", None),
        ("/me/base", None),
        ("../me/base", None),
        ("me/base/final", None),
        ("me--x/base", None),
    ],
)
def test_what_a_path_means(path, meant, tmp_path, monkeypatch):
    (tmp_path / "runs" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_model(path) == hub_model(Path(path)) == meant


def test_a_model_on_the_hub_is_the_one_that_was_uploaded(on_hub, base_dir):
    loaded = load_pretrained("me/base", device="cpu")
    here = load_pretrained(base_dir, device="cpu")
    assert all(map(torch.equal, loaded.model.parameters(), here.model.parameters()))
    assert loaded.tokenizer.fingerprint == here.tokenizer.fingerprint
    assert origin_of(loaded.folder) == HubModel("me/base", on_hub)
    assert name_of(loaded.folder) == f"me/base@{on_hub}"
    assert origin_of(base_dir) is None
    assert name_of(base_dir) == str(base_dir)


@pytest.fixture
def evaluated(tmp_path):
    """Evaluates `me/base` into a folder `evaluation`."""

    def evaluated():
        (tmp_path / "prompts.json").write_text('{"categories": {"facts": [{"prompt": "a", "text": "a"}]}}')
        config = EvaluationConfig(
            smoke_tests=SmokeConfig(path="prompts.json", style="text", max_new_tokens=1)
        )
        evaluate(config, load_pretrained("me/base", device="cpu"), tmp_path / "evaluation")

    return evaluated


def test_a_revision_is_a_branch_or_a_commit(hub, on_hub, tokenizer, tmp_path):
    other = save_base(tokenizer, tmp_path / "other", qk_norm=True)
    hub.upload("me/base", other, branch="next")
    assert load_pretrained("me/base", device="cpu").model.config.qk_norm is False
    assert load_pretrained("me/base@next", device="cpu").model.config.qk_norm is True
    hub.upload("me/base", other)
    assert load_pretrained("me/base", device="cpu").model.config.qk_norm is True
    assert load_pretrained(f"me/base@{on_hub}", device="cpu").model.config.qk_norm is False


def test_only_what_is_read_is_downloaded(hub, base_dir):
    files = {path.name: path.read_bytes() for path in base_dir.iterdir()}
    others = ["pytorch_model.bin", "model.pt", "run.py", "onnx/model.safetensors", "consolidated.safetensors"]
    hub.commit("me/base", files | dict.fromkeys(others, b"x"))
    assert {path.name for path in local_folder("me/base").iterdir()} == set(files)
    asked = [path for method, path in hub.requests if "/resolve/" in path]
    assert not [path for path in asked if path.endswith(tuple(others))]


def test_a_tokenizer_comes_without_the_weights(hub, on_hub, tokenizer):
    folder = local_folder("me/base", weights=False)
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "tokenizer.json").is_file()


def test_a_folder_of_that_name_wins(hub, tokenizer, tmp_path):
    save_base(tokenizer, tmp_path / "me" / "base", qk_norm=True)
    assert load_pretrained("me/base", device="cpu").model.config.qk_norm is True
    assert hub.requests == []


class TestRefusals:
    def test_neither_a_folder_nor_on_the_hub(self, hub):
        with pytest.raises(UserError) as refusal:
            local_folder("me/nothing")
        assert str(refusal.value) == (
            "me/nothing: must be a folder or a model on the Hugging Face hub, got no such folder, and the hub"
            " knows no such model that this login may read; check the name; for a private model: "
            "`hf auth login`, or set HF_TOKEN"
        )

    def test_a_private_model_needs_the_token(self, hub, on_hub, monkeypatch):
        hub.hidden.add("me/base")
        local_folder("me/base")
        shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match=r"no such model that this login may read; .*`hf auth login`"):
            local_folder("me/base")

    def test_no_such_revision(self, on_hub):
        with pytest.raises(UserError, match="has no revision v9; pass a branch, a tag or a commit"):
            local_folder("me/base@v9")

    def test_offline_the_cache_is_enough(self, hub, on_hub, monkeypatch):
        local_folder("me/base")
        hub.requests.clear()
        offline(monkeypatch)
        assert origin_of(local_folder("me/base")) == HubModel("me/base", on_hub)
        assert origin_of(local_folder(f"me/base@{on_hub}")) == HubModel("me/base", on_hub)
        assert hub.requests == []

    @pytest.mark.parametrize("cached", ["nothing", "a part"])
    def test_offline_without_a_whole_copy(self, cached, on_hub, monkeypatch):
        if cached == "a part":
            local_folder("me/base", weights=False)
        offline(monkeypatch)
        with pytest.raises(UserError, match="the hub cannot be reached, and the cache holds no whole copy"):
            local_folder("me/base")

    def test_no_network(self, hub, on_hub, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(UserError, match="the hub cannot be reached"):
            local_folder("me/base")


class TestAdapters:
    def test_one_on_the_hub_brings_its_base(self, hub, on_hub, tokenizer, tmp_path):
        base = local_folder("me/base")
        save_adapted(base, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
        config = read_json(tmp_path / "adapter" / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", on_hub)
        hub.upload("me/base", save_base(tokenizer, tmp_path / "newer", qk_norm=True))
        hub.upload("me/adapter", tmp_path / "adapter")
        loaded = load_pretrained("me/adapter", device="cpu")
        assert origin_of(loaded.folder) == HubModel("me/base", on_hub)
        assert origin_of(loaded.adapter).repo == "me/adapter"
        merge_adapter("me/adapter", tmp_path / "merged")
        assert load_pretrained(tmp_path / "merged", device="cpu").model.config.qk_norm is False

    def test_peft_s_own(self, hub, on_hub, base_dir, tmp_path):
        model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
        config = peft.LoraConfig(target_modules=["q_proj"], base_model_name_or_path="me/base")
        adapted = peft.get_peft_model(model, config)
        adapted.peft_config["default"].base_model_name_or_path = "me/base"
        adapted.save_pretrained(tmp_path / "adapter")
        assert origin_of(base_of(tmp_path / "adapter")) == HubModel("me/base", on_hub)

    def test_peft_loads_what_lumi_names(self, hub, on_hub, tokenizer, tmp_path):
        base = local_folder("me/base")
        ours = save_adapted(base, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        ids = torch.tensor([[5, 80, 200, 3]])
        ours.eval()
        logits = torch.nn.functional.linear(ours.hidden(ids), ours.output_weight)
        torch.testing.assert_close(theirs(ids).logits, logits)


class TestTraining:
    @pytest.mark.parametrize("resume", ["auto", "path"])
    def test_a_run_goes_on_from_the_commit_that_it_began_with(
        self, resume, hub, on_hub, start, tokenizer, tmp_path
    ):
        settings = {"model": None, "lora": LORA, "model_path": Path("me/base"), "num_steps": 8}
        run = start(**settings)
        middle, last = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 8))
        for checkpoint in (middle, last):
            assert read_json(checkpoint / "state.json")["model_path"] == f"me/base@{on_hub}"
            assert origin_of(base_of(checkpoint)) == HubModel("me/base", on_hub)
        assert read_json(run / "final" / "adapter_config.json")["revision"] == on_hub
        names = ["adapter_model.safetensors", "adapter_config.json"]
        before = [(run / "final" / name).read_bytes() for name in names]

        hub.upload("me/base", save_base(tokenizer, tmp_path / "newer", qk_norm=True))
        shutil.rmtree(run / "final")
        if resume == "auto":
            shutil.rmtree(last)
        start(resume="auto" if resume == "auto" else str(middle), **settings)
        assert [(run / "final" / name).read_bytes() for name in names] == before

    def test_offline_from_the_cache(self, on_hub, start, monkeypatch):
        settings = {"model": None, "model_path": Path("me/base")}
        weights = final_weights(start(num_steps=4, **settings))
        offline(monkeypatch)
        assert final_weights(start("again", num_steps=4, **settings)) == weights

    def test_the_tokenizer_may_come_from_there_too(self, on_hub, store_dir, tmp_path):
        config = from_dict(TrainConfig, merged({"model": None, "num_steps": 1}))
        paths = Paths([str(store_dir)], "me/base", tmp_path / "run", model_path=Path("me/base"))
        assert train(config, paths, "cpu") == 0
        state = read_json(tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json")
        assert state["model_path"] == f"me/base@{on_hub}"

    def test_fine_tuning_goes_on_from_its_commit(self, hub, on_hub, tokenizer, tmp_path):
        tuning = FineTuning(Path("me/base"), tmp_path / "tuned", "cpu")
        tuning.claim({"data": ["x"]})
        assert read_json(tmp_path / "tuned" / "finetune.json")["model"] == f"me/base@{on_hub}"
        hub.upload("me/base", save_base(tokenizer, tmp_path / "newer", qk_norm=True))
        again = FineTuning(Path("me/base"), tmp_path / "tuned", "cpu")
        again.claim({"data": ["x"]})
        assert origin_of(again.model) == HubModel("me/base", on_hub)
        with pytest.raises(UserError, match="must be of the same fine-tuning, got other arguments"):
            FineTuning(Path("me/base@main"), tmp_path / "tuned", "cpu").claim({"data": ["x"]})

    def test_a_recorded_commit_holds_where_no_revision_is_given(self, on_hub):
        recorded = f"me/base@{on_hub}"
        assert as_before(Path("me/base"), recorded) == Path(recorded)
        assert as_before("me/base@main", recorded) == Path("me/base@main")
        assert as_before("me/other", recorded) == Path("me/other")
        assert as_before("me/base", None) == Path("me/base")


class TestChains:
    """Records name the commit, and `lumi verify` finds it in the cache."""

    @pytest.fixture
    def trained(self, on_hub, start):
        return start(model=None, num_steps=2, model_path=Path("me/base"))

    def verdicts(self, path):
        found = {name_of(each.path): each.verdict for each in verify(path).all()}
        return {name: found[name] for name in found if name.startswith("me/")}

    def test_a_run_records_the_name_and_no_place_on_this_machine(self, trained, on_hub, tmp_path):
        for parents in (
            read_json(trained / "final" / "provenance.json")["parents"],
            read_json(trained / "checkpoints" / "step-00000002" / "state.json")["parents"],
        ):
            assert parents[-1]["path"] == f"me/base@{on_hub}"
            assert "hub-cache" not in json.dumps(parents)

    def test_it_is_verified_without_a_network(self, trained, hub, on_hub, monkeypatch, capsys):
        hub.requests.clear()
        offline(monkeypatch)
        assert dispatch(["verify", str(trained)]) == 0
        fingerprint = weights_fingerprint(local_folder("me/base"))
        assert f"└── model  me/base@{on_hub}  {fingerprint[:12]}  not recorded\n" in capsys.readouterr().out
        assert hub.requests == []

    @pytest.mark.parametrize("there", ["nothing", "the tokenizer", "a part of the weights"])
    def test_what_the_cache_lacks_is_missing_and_not_downloaded(self, trained, hub, on_hub, there, capsys):
        folder = local_folder("me/base")
        if there == "a part of the weights":
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
        else:
            shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
        if there == "the tokenizer":
            local_folder("me/base", weights=False)
        hub.requests.clear()
        assert dispatch(["verify", str(trained)]) == 1
        assert re.search(rf"model  me/base@{on_hub}  \w+  missing", capsys.readouterr().out)
        assert hub.requests == []

    def test_weights_that_were_changed_in_the_cache(self, trained, on_hub, tokenizer, tmp_path):
        other = save_base(tokenizer, tmp_path / "other", qk_norm=True)
        for name in ("config.json", "model.safetensors"):
            (local_folder("me/base") / name).unlink()
            shutil.copy(other / name, local_folder("me/base") / name)
        assert self.verdicts(trained) == {f"me/base@{on_hub}": "from another chain"}

    def test_tokenizers_and_evaluations(self, on_hub, corpus_dir, evaluated, tmp_path):
        words = f"tokenize --corpus-dirs {corpus_dir} --tokenizer-dir me/base --output-dir tokens"
        assert dispatch(words.split()) == 0
        evaluated()
        assert self.verdicts(tmp_path / "tokens") == {f"me/base@{on_hub}": "not recorded"}
        assert self.verdicts(tmp_path / "evaluation") == {f"me/base@{on_hub}": "not recorded"}


def test_the_commands_take_names(hub, on_hub, base_dir, corpus_dir, tmp_path, capsys):
    assert dispatch("generate --model-path me/base --prompt a --max-new-tokens 2 --device cpu".split()) == 0
    assert dispatch(f"export --model-path me/base@{on_hub} --output-dir exported".split()) == 0
    assert weights_fingerprint(tmp_path / "exported") == weights_fingerprint(base_dir)
    tokenize = f"tokenize --corpus-dirs {corpus_dir} --tokenizer-dir me/base --output-dir tokens"
    assert dispatch(tokenize.split()) == 0
    assert TOKEN not in capsys.readouterr().out


def test_an_evaluation_names_the_commit(on_hub, evaluated, tmp_path):
    evaluated()
    results = json.loads((tmp_path / "evaluation" / "evaluation_results.json").read_text())
    assert results["model"] == f"me/base@{on_hub}"
