"""Every task against what lm-evaluation-harness computed for it; `harness_judge.py` says how."""

import json
import math

import harness_judge
import pytest

from lumi.corpus import JsonlFiles
from lumi.evaluation.few_shot import FewShotConfig
from lumi.evaluation.multiple_choice import (
    DELIMITER,
    outcomes,
    read_questions,
    result_of,
    score_questions,
)
from lumi.evaluation.tasks import TASKS, TaskConfig

VALUES = json.loads(harness_judge.VALUES.read_text(encoding="utf-8"))
# transformers computed them in float32 over up to 25 tokens whose logits are below 10 in size.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The model and the tokenizer that the harness had."""
    tokenizer = harness_judge.write_tokenizer(tmp_path_factory.mktemp("harness"))
    assert tokenizer.fingerprint == VALUES["tokenizer_fingerprint"]
    return harness_judge.fixed_model(tokenizer), tokenizer


def questions_of(run, folder):
    kind, sources = run["kind"], {}
    for part, records in VALUES["records"][kind].items():
        path = folder / f"{kind}_{part}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        sources[part] = JsonlFiles(paths=(str(path),))
    few_shot = None
    if run["num_fewshot"]:
        few_shot = FewShotConfig(
            num_fewshot=run["num_fewshot"], source=sources["examples"], sampler=run["sampler"]
        )
    return read_questions(TaskConfig(kind=kind, name=kind, source=sources["asked"], few_shot=few_shot))


@pytest.mark.parametrize(
    "run", VALUES["runs"], ids=lambda run: f"{run['kind']}-{run['num_fewshot']}-{run['sampler']}"
)
def test_each_example_is_theirs(run, judged, tmp_path):
    task, samples = TASKS[run["kind"]], run["samples"]
    questions = questions_of(run, tmp_path)
    assert [list(question.contexts) for question in questions] == [sample["contexts"] for sample in samples]
    for question, sample in zip(questions, samples, strict=True):
        assert [DELIMITER + choice for choice in question.choices] == sample["continuations"]
    scores = score_questions(questions, *judged, batch_tokens=500)
    found = outcomes(questions, scores.scored, task.normalised)
    for scored, outcome, sample in zip(scores.scored, found, samples, strict=True):
        assert list(outcome.nats) == pytest.approx(sample["nats"], abs=ROUNDING)
        assert [choice.is_greedy for choice in scored] == sample["is_greedy"]
        assert (outcome.right, outcome.right_norm) == (sample["acc"], sample["acc_norm"])
    means = result_of(task, questions, found).to_plain()
    for name, value in run["results"].items():
        assert means[name] == pytest.approx(value, rel=1e-4), name
    assert means["bits_per_byte"] == pytest.approx(theirs_per_byte(run, questions), abs=ROUNDING)


def theirs_per_byte(run, questions):
    """Bits per byte of the right choices by the harness's log-likelihoods and its `byte_length`."""
    pairs = zip(questions, run["samples"], strict=True)
    bits = [
        -sample["nats"][question.answer]
        / len(sample["continuations"][question.answer][1:].encode())
        / math.log(2)
        for question, sample in pairs
    ]
    return sum(bits) / len(bits)


def test_the_values_tell_tasks_apart(judged):
    """They hold right and wrong answers, some that length decides, some greedy ones, and contexts that are
    cut."""
    _, tokenizer = judged
    samples = [sample for run in VALUES["runs"] for sample in run["samples"]]
    assert {sample["acc"] for sample in samples} == {0, 1}
    assert any(sample["acc_norm"] not in (None, sample["acc"]) for sample in samples)
    assert any(any(sample["is_greedy"]) for sample in samples)
    longest = max(len(tokenizer.encode(sample["contexts"][0])) for sample in samples)
    assert longest > harness_judge.POSITIONS
    assert {run["kind"] for run in VALUES["runs"]} == set(TASKS)
