"""What belongs to a run is proved, not guessed."""

import json
import os
import shutil
import time

import pytest

from lumi.config import UserError, read_json
from lumi.provenance.run_facts import RunFacts, find_data, find_evaluations, read_run, run_of


def test_a_run_is_known_by_its_folder_and_by_its_final(pretrained_run, base_dir, tmp_path):
    assert run_of(pretrained_run) == pretrained_run
    assert run_of(pretrained_run / "final") == pretrained_run
    assert run_of(pretrained_run / "tokenizer") is None
    assert run_of(base_dir) is None


@pytest.mark.parametrize(("final", "step"), [("last", 12), ("best", 8)])
def test_the_final_step_and_its_validations(final, step, tmp_path):
    state = {"step": 12, "best": {"step": 8, "loss": 1.0}}
    metrics = [{"step": at, "kind": kind} for at in (4, 8, 12) for kind in ("train", "validation")]
    run = RunFacts(folder=tmp_path, config={"final": final}, state=state, metrics=metrics)
    assert run.final_step == step
    assert [record["step"] for record in run.validations()] == list(range(4, step + 1, 4))


def test_without_checkpoints_less_is_known(pretrained_run):
    shutil.rmtree(pretrained_run / "checkpoints")
    run = read_run(pretrained_run)
    assert (run.final_step, run.identity) == (None, {})
    assert find_data(run, []) == ([], [])


class TestData:
    def test_beside_the_run(self, pretrained_run, tmp_path):
        [folder], taken = find_data(read_run(pretrained_run), [])
        assert taken == [tmp_path / "tokens", tmp_path / "corpus"]
        assert folder.weight == 1
        assert folder.store.splits["train"].documents > 100
        assert [each["config"]["sources"][0]["name"] for each in folder.corpora] == ["rivers"]

    def test_elsewhere_it_is_not_known_until_it_is_given(self, pretrained_run, tmp_path):
        (tmp_path / "far" / "away").mkdir(parents=True)
        for name in ("tokens", "corpus"):
            (tmp_path / name).rename(tmp_path / "far" / "away" / name)
        run = read_run(pretrained_run)
        [folder], taken = find_data(run, [])
        assert (folder.store, taken) == (None, [])
        tokens = tmp_path / "far" / "away" / "tokens"
        [folder], taken = find_data(run, [tokens])
        assert (folder.corpora, taken) == ([None], [tokens])
        [folder], taken = find_data(run, [tokens, tokens.with_name("corpus")])
        assert folder.corpora[0]["documents"] == 169

    def test_other_data_is_refused_or_passed_over(self, pretrained_run, chats, tmp_path):
        run = read_run(pretrained_run)
        assert chats not in find_data(run, [])[1]
        with pytest.raises(UserError, match=f"--data-dirs must be data of .*, got {chats}, whose hashes"):
            find_data(run, [chats])

    def test_tokens_inside_the_corpus(self, start, pretrained_run, tmp_path):
        run = start("cached", data_dirs=[tmp_path / "corpus"], num_steps=2)
        [folder], taken = find_data(read_run(run), [])
        assert taken[0].parent == tmp_path / "corpus" / ".tokens"
        assert folder.corpora[0]["config"]["sources"][0]["name"] == "rivers"


class TestEvaluations:
    def test_beside_the_run_and_in_it(self, pretrained_run, evaluated, tmp_path):
        final = pretrained_run / "final"
        made = {evaluated(pretrained_run, tmp_path / "one"), evaluated(final, pretrained_run / "two")}
        assert {place for place, _ in find_evaluations(final, [])} == made
        assert len(find_evaluations(final, [tmp_path / "one"])) == 2

    def test_of_another_model(self, pretrained_run, base_dir, evaluated, tmp_path):
        other = evaluated(base_dir, tmp_path / "other")
        assert find_evaluations(pretrained_run / "final", []) == []
        with pytest.raises(UserError, match=f"--evaluations must be of .*other, which is of {base_dir}"):
            find_evaluations(pretrained_run / "final", [other])

    def test_of_older_weights(self, pretrained_run, evaluated, tmp_path):
        folder = evaluated(pretrained_run, tmp_path / "evaluation")
        later = time.time() + 60
        os.utime(pretrained_run / "final" / "model.safetensors", (later, later))
        assert find_evaluations(pretrained_run / "final", []) == []
        with pytest.raises(UserError, match="which is older than the weights"):
            find_evaluations(pretrained_run / "final", [folder])

    def test_no_evaluation(self, pretrained_run, tmp_path):
        with pytest.raises(UserError, match=r"must be a folder with evaluation_results\.json, got .*corpus"):
            find_evaluations(pretrained_run / "final", [tmp_path / "corpus"])


def test_a_run_that_goes_on_is_not_finished(pretrained_run):
    status = read_json(pretrained_run / "status.json") | {"status": "running"}
    (pretrained_run / "status.json").write_text(json.dumps(status))
    with pytest.raises(UserError, match="must be a finished run, got one running"):
        read_run(pretrained_run)
