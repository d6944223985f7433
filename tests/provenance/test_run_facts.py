"""What belongs to a model is found by records, and nothing else is."""

import shutil

import pytest
from crafted_models import save_adapted

from lumi.config import UserError, read_json
from lumi.formats.export import export_model, merge_adapter
from lumi.model.lora import LoraConfig
from lumi.provenance.chain import verify
from lumi.provenance.run_facts import RunFacts, find_evaluations, find_run, find_runs
from lumi.tokenizer.loading import load_tokenizer

CHECKPOINT = "pretrain/checkpoints/step-00000004"


def facts(path, search=()):
    return find_run(verify(path, search, all_bytes=False))


@pytest.mark.parametrize(
    ("name", "run", "data"),
    [
        ("pretrain", "pretrain", "corpus"),
        (CHECKPOINT, "pretrain", "corpus"),
        ("finetune", "finetune", "chats"),
        ("merged", "finetune", "chats"),
        ("exported", "finetune", "chats"),
    ],
)
def test_a_model_reaches_its_run_and_its_data(chain, name, run, data):
    found = facts(chain / name)
    assert (found.folder, found.step, found.is_recorded) == (chain / run, 4, True)
    assert found.config == read_json(chain / run / "config.json")
    [folder] = found.data
    assert folder.weight == 1
    assert [each["config"]["sources"][0]["name"] for each in folder.corpora] == [data]
    assert folder.store.splits["train"].documents > 20
    if run == "pretrain":
        assert found.from_random
    else:
        assert found.start.path.resolve() == chain / "pretrain" / "final"


def test_the_runs_of_a_chain_and_their_data(chain, again):
    """A run that reads the store of the one before it has its data, too."""
    found = find_runs(verify(again, all_bytes=False))
    assert [each.folder.name for each in found] == ["again", "pretrain"]
    assert [[len(folder.corpora) for folder in each.data] for each in found] == [[1], [1]]
    assert [each.folder.name for each in find_runs(verify(chain / "merged"))] == ["finetune", "pretrain"]
    assert find_runs(verify(chain / "pretrain"))[0].from_random


def test_an_earlier_run_that_goes_on_is_left_out(chain, change_json, capsys):
    change_json(chain / "pretrain" / "status.json", lambda status: status.update(status="running"))
    assert [each.folder.name for each in find_runs(verify(chain / "merged"))] == ["finetune"]
    assert "not in the card: the run of " in capsys.readouterr().out


def test_of_a_model_of_others_nothing_is_known(base_dir, tmp_path):
    export_model(base_dir, tmp_path / "exported")
    assert facts(base_dir) is None
    assert facts(tmp_path / "exported") is None


def test_the_run_of_a_base_is_not_that_of_the_model(chain, tmp_path):
    """Nothing is known of the adapter's training."""
    base = chain / "pretrain" / "final"
    tokenizer = load_tokenizer(chain / "tokenizer")
    save_adapted(base, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert facts(tmp_path / "merged") is None


def test_a_run_that_is_another_one_now(chain, chains):
    shutil.rmtree(chain / "finetune")
    shutil.copytree(chains / "b" / "finetune", chain / "finetune")
    assert facts(chain / "merged") is None


@pytest.mark.parametrize(("final", "step"), [("last", 12), ("best", 8)])
def test_the_step_and_its_validations(start, final, step, change_json):
    folder = start(final=final, keep_last=1)
    newest = folder / "checkpoints" / "step-00000012"
    best = read_json(newest / "state.json")["best"]["step"]
    assert not verify(folder).is_broken
    found = facts(folder)
    assert found.step == (12 if final == "last" else best)
    records = [{"step": at, "kind": kind} for at in (4, 8, 12) for kind in ("train", "validation")]
    run = RunFacts(folder=folder, config={}, metrics=records, step=step, is_recorded=True)
    assert [record["step"] for record in run.validations()] == list(range(4, step + 1, 4))


def test_without_checkpoints_the_data_is_known_and_the_step_is_not(chain):
    shutil.rmtree(chain / "pretrain" / "checkpoints")
    found = facts(chain / "pretrain")
    assert found.step is None
    assert [(each.weight, len(each.corpora)) for each in found.data] == [(None, 1)]


def test_without_a_record_neither_data_nor_start_is_known(chain):
    (chain / "finetune" / "final" / "provenance.json").unlink()
    found = facts(chain / "finetune")
    assert (found.step, found.data, found.start, found.from_random) == (4, [], None, False)


def test_data_that_is_gone_or_has_moved(chain, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    for name in ("tokens", "corpus"):
        (chain / name).rename(tmp_path / "far" / "away" / name)
    [folder] = facts(chain / "pretrain").data
    assert (folder.weight, folder.store) == (1, None)
    [folder] = facts(chain / "pretrain", [tmp_path / "far"]).data
    assert folder.corpora[0]["config"]["sources"][0]["name"] == "corpus"


def test_tokens_inside_the_corpus(start, corpus_dir):
    folder = start(data_dirs=[corpus_dir], num_steps=2)
    [data] = facts(folder).data
    assert data.corpora[0]["config"]["sources"][0]["name"] == "synthetic"


class TestEvaluations:
    def found(self, path, *given):
        return {place for place, _ in find_evaluations(verify(path, all_bytes=False), given)}

    def test_those_near_a_model_that_name_its_weights(self, chain, chains, evaluated):
        final = chain / "pretrain" / "final"
        made = {evaluated(final, chain / "one"), evaluated(final, chain / "pretrain" / "two")}
        assert self.found(chain / "pretrain") == made
        assert self.found(chain / "pretrain", chain / "one") == made
        assert self.found(chain / "exported") == {chain / "evaluation"}
        assert self.found(chain / "merged") == self.found(chain / "finetune") == set()

    def test_the_same_weights_elsewhere(self, chain, evaluated, tmp_path):
        place = evaluated(chain / "pretrain", tmp_path / "far" / "evaluation")
        export_model(chain / "pretrain", chain / "copy")
        assert self.found(chain / "copy") == set()
        assert self.found(chain / "copy", place) == {place}

    def test_an_adapter_s_is_not_its_base_s(self, chain, evaluated):
        place = evaluated(chain / "finetune", chain / "judged")
        assert self.found(chain / "finetune") == {place}
        assert self.found(chain / "pretrain") == set()

    @pytest.mark.parametrize(
        ("place", "fault"),
        [
            ("evaluation", "is of other weights"),
            ("corpus", r"is missing \(something else is there\)"),
            ("nothing", "is missing"),
        ],
    )
    def test_others_are_refused(self, chain, place, fault):
        with pytest.raises(
            UserError, match=f"must be of the weights in .*final, got .*{place}, which {fault}"
        ):
            self.found(chain / "pretrain", chain / place)

    def test_one_that_was_changed(self, chain, change_json):
        change_json(chain / "evaluation" / "evaluation_results.json", lambda results: results.update(limit=1))
        assert self.found(chain / "exported") == set()
        with pytest.raises(UserError, match=r"is changed \(evaluation_results\.json, recorded"):
            self.found(chain / "exported", chain / "evaluation")


@pytest.mark.parametrize("name", ["pretrain", "pretrain/final"])
def test_a_run_that_goes_on_is_not_finished(chain, name, change_json):
    change_json(chain / "pretrain" / "status.json", lambda status: status.update(status="running"))
    with pytest.raises(UserError, match="must be a finished run, got one running"):
        facts(chain / name)
    assert facts(chain / CHECKPOINT).step == 4
