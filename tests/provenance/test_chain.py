"""`lumi verify` on real chains: whole, and with each link damaged, removed or replaced."""

import json
import shutil
import sys

import pytest
import torch

from lumi import cli
from lumi.command_line import run
from lumi.config import UserError, from_dict, read_json
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
from lumi.formats.export import export_model
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.gguf_file import write_gguf
from lumi.formats.pretrained import Pretrained, load_pretrained
from lumi.host.storage import sha256_file
from lumi.provenance.chain import verify
from lumi.provenance.training_corpora import training_corpora
from lumi.tokenizer.loading import load_tokenizer

CHECKPOINT = "checkpoints/step-00000004"
# Every artefact of a chain, the one asked about first, and its kind.
ARTEFACTS = {
    "evaluation": "evaluation",
    "exported": "model",
    "merged": "model",
    "finetune/final": "adapter",
    "tokenizer": "tokenizer",
    "corpus": "corpus",
    "questions": "token store",
    "chats": "corpus",
    "pretrain/final": "model",
    "tokens": "token store",
}
FILES = {
    "evaluation": ("evaluation_results.json", "evaluation_report.md"),
    "exported": ("model.safetensors", "config.json"),
    "merged": ("model.safetensors", "tokenizer.model"),
    "finetune/final": ("adapter_model.safetensors", "adapter_config.json"),
    "tokenizer": ("tokenizer.model", "chat_template.jinja"),
    "questions": ("train.mask", "manifest.json"),
    "pretrain/final": ("model.safetensors",),
    "tokens": ("train.tokens", "validation.offsets"),
}


def faults(link, chain):
    """Path and verdict of all that is not "ok"."""
    return {
        str(each.path.resolve().relative_to(chain)): each.verdict
        for each in link.all()
        if each.verdict != "ok"
    }


def detail(link, chain, name):
    (found,) = (each for each in link.all() if each.path.resolve() == chain / name)
    return found.detail


def edges(link):
    return {(link.path.resolve(), parent.path.resolve()) for parent in link.parents}.union(
        *map(edges, link.parents)
    )


@pytest.mark.parametrize(
    ("name", "corpora"),
    [
        ("exported", {"corpus", "chats"}),
        ("gguf/model-f16.gguf", {"corpus", "chats"}),
        ("pretrain/final", {"corpus"}),
        (f"pretrain/{CHECKPOINT}", {"corpus"}),
    ],
)
def test_the_corpora_behind_a_model(chain, name, corpora):
    found = training_corpora(Pretrained(None, None, chain / name))
    assert {folder.name for folder in found} == corpora
    assert None not in found.values()


def test_a_whole_chain_that_was_moved_as_a_whole(chain):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    link = verify(chain / "evaluation")
    assert {str(each.path.resolve().relative_to(chain)): each.kind for each in link.all()} == ARTEFACTS
    assert not link.is_broken
    assert {each.verdict for each in link.all()} == {"ok"}
    expected = {
        "evaluation": ("exported", "tokens"),
        "exported": ("merged",),
        "merged": ("finetune/final", "pretrain/final"),
        "finetune/final": ("tokenizer", "questions", "pretrain/final"),
        "pretrain/final": ("tokenizer", "tokens"),
        "questions": ("tokenizer", "chats"),
        "tokens": ("tokenizer", "corpus"),
        "tokenizer": ("corpus",),
    }
    assert edges(link) == {(chain / child, chain / each) for child in expected for each in expected[child]}
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*")} == before


def test_identities_are_those_that_others_would_compute(chain):
    found = {
        str(each.path.resolve().relative_to(chain)): each.identity
        for each in verify(chain / "evaluation").all()
    }
    assert found["tokenizer"] == sha256_file(chain / "tokenizer" / "tokenizer.model")
    assert found["pretrain/final"] == weights_fingerprint(chain / "pretrain" / "final")
    assert found["finetune/final"] == sha256_file(chain / "finetune" / "final" / "adapter_model.safetensors")
    assert found["corpus"] == read_json(chain / "tokens" / "manifest.json")["inputs"]["corpus 0"]


@pytest.mark.parametrize(("name", "file"), [(name, file) for name in FILES for file in FILES[name]])
def test_a_flipped_bit_and_a_lost_file(chain, flip, name, file):
    recorded = sha256_file(chain / name / file)
    flip(chain / name / file)
    link = verify(chain / "evaluation")
    assert link.is_broken
    assert faults(link, chain) == {name: "changed"}
    if file != "manifest.json":  # which may be no JSON any more
        found = sha256_file(chain / name / file)
        assert detail(link, chain, name) == f"{file}, recorded {recorded[:12]}, found {found[:12]}"
    (chain / name / file).unlink()
    link = verify(chain / "evaluation")
    assert link.is_broken
    assert faults(link, chain) == {name: "missing"}


def test_a_gguf_file(chain, flip, tmp_path):
    """Its folder has the record; beside others of its kind, the file alone has none."""
    file = chain / "gguf" / "model-f16.gguf"
    for path in (file, file.parent):
        link = verify(path)
        assert (link.kind, link.verdict, link.identity) == ("gguf", "ok", sha256_file(file))
        assert edges(link) >= {(path, chain / "merged"), (chain / "merged", chain / "pretrain" / "final")}
    loaded = load_pretrained(file, tokenizer_path=chain / "tokenizer", device="cpu")
    data = {"data_dirs": [chain / "tokens"]}
    evaluate(from_dict(EvaluationConfig, {}), loaded, tmp_path / "evaluation", **data)
    assert edges(verify(tmp_path / "evaluation")) >= {(tmp_path / "evaluation", file)}
    flip(file)
    assert verify(file).verdict == verify(file.parent).verdict == "changed"
    assert faults(verify(tmp_path / "evaluation").parents[0], chain) == {"gguf/model-f16.gguf": "changed"}
    lone = shutil.move(file, tmp_path / "lone.gguf")
    assert verify(file.parent).verdict == "missing"
    assert (verify(lone).verdict, verify(lone).parents) == ("not recorded", [])


@pytest.mark.parametrize(
    "file", ["model-00000.safetensors", "optimizer-00000.safetensors", "state.json", "manifest.json"]
)
def test_a_checkpoint(chain, flip, file):
    """It is behind what was made of it, such as an export, and not behind `final/`, which outlives it."""
    export_model(chain / "pretrain" / CHECKPOINT, chain / "early")
    link = verify(chain / "early")
    assert not link.is_broken
    assert edges(link) >= {
        (chain / "early", chain / "pretrain" / CHECKPOINT),
        (chain / "pretrain" / CHECKPOINT, chain / "tokens"),
    }
    flip(chain / "pretrain" / CHECKPOINT / file)
    assert faults(verify(chain / "early"), chain) == {f"pretrain/{CHECKPOINT}": "changed"}
    (chain / "pretrain" / CHECKPOINT / file).unlink()
    assert faults(verify(chain / "early"), chain) == {f"pretrain/{CHECKPOINT}": "missing"}
    shutil.rmtree(chain / "pretrain" / "checkpoints")
    assert not verify(chain / "evaluation").is_broken


@pytest.mark.parametrize("name", ["corpus", "chats"])
def test_a_corpus(chain, flip, name):
    (shard,) = (chain / name).glob("*.parquet")
    flip(shard)
    link = verify(chain / "evaluation")
    assert faults(link, chain) == {name: "changed"}
    assert shard.name in detail(link, chain, name)
    shard.unlink()
    assert faults(verify(chain / "evaluation"), chain) == {name: "missing"}


@pytest.mark.parametrize("name", [name for name in ARTEFACTS if name != "evaluation"])
def test_a_removed_and_a_replaced_artefact(chain, chains, name):
    shutil.rmtree(chain / name)
    link = verify(chain / "evaluation")
    assert link.is_broken
    assert faults(link, chain) == {name: "missing"}
    shutil.copytree(chains / "b" / name, chain / name)
    link = verify(chain / "evaluation")
    assert link.is_broken
    assert faults(link, chain) == {name: "from another chain"}
    (foreign,) = (each for each in link.all() if each.verdict != "ok")
    found = verify(chain / name).identity
    assert foreign.detail == f"recorded {foreign.identity[:12]}, found {found[:12]}"
    assert found != foreign.identity
    assert foreign.parents == []


def test_what_has_moved_is_found_by_its_identity(chain, chains, tmp_path):
    attic = tmp_path / "attic" / "deep"
    attic.mkdir(parents=True)
    for name in ("corpus", "tokenizer", "tokens", "pretrain/final", "finetune/final", "merged"):
        other_name = name.replace("/", "-")
        shutil.move(chain / name, attic / f"a-{other_name}")
        shutil.copytree(chains / "b" / name, attic / f"b-{other_name}")  # another of its kind
    (attic / "damaged").mkdir()
    (attic / "damaged" / "manifest.json").write_text("{")
    assert verify(chain / "evaluation").is_broken
    # The adapter that moved alone no longer knows the way to its data, which stayed.
    link = verify(chain / "evaluation", [tmp_path / "attic"])
    assert [each.path.name for each in link.all() if each.verdict == "missing"] == ["questions"]
    link = verify(chain / "evaluation", [tmp_path / "attic", chain])
    assert {each.verdict for each in link.all()} == {"ok"}
    moved = {each.path.name for each in link.all() if each.detail == "it has moved"}
    stayed = {each.path.name for each in link.all() if each.detail == ""}
    names = ("corpus", "tokenizer", "tokens", "pretrain-final", "finetune-final", "merged")
    assert moved == {"questions", *(f"a-{name}" for name in names)}
    assert stayed == {"evaluation", "exported", "chats"}


def test_artefacts_without_a_record_count_but_are_no_fault(chain, change_json):
    """As earlier versions of Lumi and other programs leave them."""
    for name in ("tokenizer", "pretrain/final"):
        (chain / name / "provenance.json").unlink()
    link = verify(chain / "evaluation")
    assert faults(link, chain) == {"tokenizer": "not recorded", "pretrain/final": "not recorded"}
    assert not link.is_broken
    (chain / "tokens" / "provenance.json").unlink()
    store = verify(chain / "tokens")
    assert (store.verdict, store.parents) == ("not recorded", [])


def test_weights_without_a_record_still_have_their_identity(chain, flip):
    (chain / "pretrain" / "final" / "provenance.json").unlink()
    flip(chain / "pretrain" / "final" / "model.safetensors")
    assert faults(verify(chain / "finetune"), chain) == {"pretrain/final": "from another chain"}


def test_files_of_an_older_store_are_checked_by_its_manifest(chain, flip):
    (chain / "tokens" / "provenance.json").unlink()
    flip(chain / "tokens" / "train.tokens")
    assert verify(chain / "tokens").verdict == "changed"


def test_a_run_is_its_final_or_its_newest_checkpoint(chain):
    assert verify(chain / "pretrain").path == chain / "pretrain" / "final"
    shutil.rmtree(chain / "pretrain" / "final")
    link = verify(chain / "pretrain")
    assert (link.kind, link.path.name, link.is_broken) == ("checkpoint", "step-00000004", False)


def test_a_tokenizer_may_lie_in_a_model(chain):
    """As in a fine-tuning of somebody's model, which brings its tokenizer."""
    from lumi.data.tokenization import tokenize

    tokenizer = load_tokenizer(chain / "pretrain" / "final")
    tokenize([chain / "corpus"], tokenizer, chain / "more", validation_fraction=0.1, num_workers=1)
    link = verify(chain / "more")
    assert [(each.kind, each.path.name, each.verdict) for each in link.parents] == [
        ("tokenizer", "final", "ok"),
        ("corpus", "corpus", "ok"),
    ]


def test_an_evaluation_of_an_adapter(chain):
    from lumi.config import from_dict
    from lumi.evaluation.evaluate import EvaluationConfig, evaluate

    loaded = load_pretrained(chain / "finetune", device="cpu", dtype=torch.float32)
    evaluate(from_dict(EvaluationConfig, {}), loaded, chain / "judged", data_dirs=[chain / "corpus"])
    link = verify(chain / "judged")
    assert not link.is_broken
    assert [each.kind for each in link.parents] == ["adapter", "model", "token store"]
    assert link.parents[2].path.resolve().parent == chain / "corpus" / ".tokens"


def test_kinds_of_a_later_version_are_no_fault(chain, change_json):
    def rename(record):
        record["parents"][0]["kind"] = "hologram"

    change_json(chain / "exported" / "provenance.json", rename)
    (unknown,) = verify(chain / "exported").parents
    assert (unknown.verdict, unknown.detail) == (
        "not recorded",
        "this version of lumi does not know the kind",
    )


def test_a_chain_that_leads_back_to_itself_ends(chain, change_json):
    model = verify(chain / "exported")

    def name_itself(record):
        record["parents"] = [{"kind": "model", "path": ".", "identity": model.identity}]

    change_json(chain / "exported" / "provenance.json", name_itself)
    (again,) = verify(chain / "exported").parents
    assert (again.repeated, again.parents) == (True, [])


def test_a_damaged_record_is_a_change(chain):
    (chain / "merged" / "provenance.json").write_text("{")
    link = verify(chain / "exported")
    assert faults(link, chain) == {"merged": "changed"}
    assert "provenance.json: not valid JSON" in detail(link, chain, "merged")


def test_records_alone_tell_who_is_who(chain, flip):
    """As `lumi push` reads them: the bytes of data are not, those of the model itself are."""
    (shard,) = (chain / "corpus").glob("*.parquet")
    for file in (shard, chain / "tokens" / "train.tokens", chain / "evaluation" / "evaluation_report.md"):
        flip(file)
    link = verify(chain / "evaluation", all_bytes=False)
    assert faults(link, chain) == {"evaluation": "changed"}
    shutil.rmtree(chain / "tokens")
    assert faults(verify(chain / "pretrain", all_bytes=False), chain) == {"tokens": "missing"}


def test_the_command(chain, flip, capsys):
    assert cli.dispatch(["verify", str(chain / "tokens")]) == 0
    assert capsys.readouterr().out.endswith("\n3 artefacts: 3 ok\n")
    flip(chain / "tokens" / "train.tokens")
    assert cli.dispatch(["verify", str(chain / "pretrain"), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["parents"][1]["verdict"] == "changed"
    for wrong in (["nothing"], [str(chain)], [str(chain / "tokens"), "--search", "nowhere"]):
        assert run(cli.dispatch, ["verify", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_says_what_of_it_was_looked_at(chain, capsys):
    (chain / "pretrain" / "config.json").write_text("{")
    assert cli.dispatch(["verify", str(chain / "pretrain"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["path"] == str(chain / "pretrain" / "final")
    said = f"{chain / 'pretrain'}: looked at {chain / 'pretrain' / 'final'}, which the run made"
    assert captured.err.startswith(said)
    cli.dispatch(["verify", str(chain / "tokens")])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("content", [b"", b"G", b"x", b"a model, honestly" * 9])
def test_a_file_that_is_no_gguf_file_is_damaged_without_a_record(
    content, package, chain, tmp_path, monkeypatch
):
    if not package:
        monkeypatch.setitem(sys.modules, "gguf", None)
    whole = shutil.copy(chain / "gguf" / "model-f16.gguf", tmp_path / "whole.gguf")
    assert verify(whole).verdict == "not recorded"
    (tmp_path / "bad.gguf").write_bytes(content)
    link = verify(tmp_path / "bad.gguf")
    assert (link.verdict, link.is_broken) == ("changed", True)
    assert "must be a whole GGUF file" in link.detail


def test_a_gguf_file_that_only_this_machine_cannot_read_is_whole(tmp_path):
    write_gguf(tmp_path / "part.gguf", "llama", {"split.count": 3}, {}, lambda name: None)
    assert verify(tmp_path / "part.gguf").verdict == "not recorded"


@pytest.mark.parametrize("config", [True, False])
def test_a_model_without_its_weights_is_no_tokenizer(config, chain):
    """A link to itself, or to what has gone, is a trace of weights."""
    (chain / "merged" / "provenance.json").unlink()
    weights = chain / "merged" / "model.safetensors"
    if not config:
        (chain / "merged" / "config.json").unlink()
        assert (verify(chain / "merged").kind, verify(chain / "merged").is_broken) == ("model", True)
    for target in (weights, chain / "gone"):
        weights.unlink()
        weights.symlink_to(target)
        link = verify(chain / "merged")
        assert (link.kind, link.is_broken) == ("model", True)
        if config:
            assert link.verdict == "missing"
            assert "model.safetensors: is missing" in link.detail


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("evaluation", "evaluation_results.json"),
        ("finetune/final", "adapter_model.safetensors"),
        ("finetune/final", "adapter_config.json"),
        ("merged", "model.safetensors"),
        ("merged", "config.json"),
    ],
)
def test_damage_is_seen_without_a_record(name, file, chain):
    (chain / name / "provenance.json").unlink()
    (chain / name / file).write_bytes(b"")
    assert verify(chain / name).verdict == "changed"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "must be the folder of one of adapter, checkpoint, corpus, .* or a run, got nothing"),
        ("tokens/train.tokens", "got a file"),
        (".", "got another folder; a folder of several stages holds them one by one: pass one of those"),
    ],
)
def test_what_is_no_artefact_is_refused(chain, path, message):
    with pytest.raises(UserError, match=message):
        verify(chain / path)
