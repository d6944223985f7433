"""How kinds of artefact are recognised."""

import shutil

import pytest

from lumi.config import UserError
from lumi.provenance.artifacts import KINDS, is_artifact, kind_of


def test_each_folder_is_of_one_kind(chains, tmp_path):
    folder = chains / "a"
    kinds = {path.name: kind_of(path) for path in folder.iterdir() if path.name != "secret"}
    assert kinds == {
        "corpus": "corpus",
        "chats": "corpus",
        "tokenizer": "tokenizer",
        "tokens": "token store",
        "questions": "token store",
        "pretrain": None,  # `verify` takes what it made
        "finetune": None,
        "merged": "model",
        "exported": "model",
        "gguf": "gguf",
        "evaluation": "evaluation",
    }
    assert kind_of(folder / "finetune" / "final") == "adapter"
    assert kind_of(folder / "finetune" / "checkpoints" / "step-00000004") == "checkpoint"
    assert kind_of(folder / "gguf" / "model-f16.gguf") == "gguf"
    assert kind_of(tmp_path) is None


def test_a_folder_is_recognised_without_its_record_and_without_its_main_file(chain):
    for name, file in (
        ("tokens", "manifest.json"),
        ("tokenizer", "tokenizer.model"),
        ("merged", "config.json"),
        ("finetune/final", "adapter_config.json"),
        ("evaluation", "evaluation_results.json"),
    ):
        kind = kind_of(chain / name)
        shutil.copytree(chain / name, chain / "plain")
        (chain / "plain" / "provenance.json").unlink()
        assert kind_of(chain / "plain") == kind
        assert is_artifact(chain / "plain", kind)
        shutil.rmtree(chain / "plain")
        (chain / name / file).unlink()
        assert kind_of(chain / name) == kind
        assert is_artifact(chain / name, kind)
        assert not is_artifact(chain / name, "corpus")


def test_a_tokenizer_that_brings_a_model_s_config_is_none(chain):
    """As the hub's cache has it where only the tokenizer was asked for."""
    for name in ("provenance.json", "model.safetensors"):
        (chain / "merged" / name).unlink()
    assert kind_of(chain / "merged") == "tokenizer"
    assert not is_artifact(chain / "merged", "model")


def test_a_forged_record_makes_no_corpus(chain, change_json):
    change_json(chain / "merged" / "provenance.json", lambda record: record.update(kind="corpus"))
    with pytest.raises(UserError, match="must be a corpus folder"):
        KINDS["corpus"].record(chain / "merged")
