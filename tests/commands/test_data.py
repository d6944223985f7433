import json

import pytest

from lumi.cli import dispatch
from lumi.command_line import run
from lumi.corpus import read_corpus

PREPARE = ["prepare", "--config", "none.json", "--output-dir", "x"]
TOKENIZE = ["tokenize", "--corpus-dirs", "none", "--tokenizer-dir", "none", "--output-dir", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "--config", "none.json", "--output-dir", "x"],
            "none.json: cannot be read: No such file or directory",
        ),
        (
            [*PREPARE, "--tasks", "2"],
            "--tasks must come with --executor, got 2",
        ),
        (
            [*PREPARE, "--sbatch=--time=1"],
            "--sbatch must come with --executor, got --time=1",
        ),
        (
            [*PREPARE, "--executor", "local"],
            "--executor must come with --tasks N, got local alone",
        ),
        (
            [*PREPARE, "--executor", "local", "--tasks", "2", "--analyze-only"],
            "--analyze-only must be used without --executor: tasks leave their results on disk; take a part",
        ),
        (
            [*PREPARE, "--executor", "slurm", "--tasks", "0"],
            "--tasks must be at least 1, got 0",
        ),
        (
            [*TOKENIZE, "--tasks", "2"],
            "--tasks must come with --executor, got 2",
        ),
        (
            [*TOKENIZE, "--executor", "slurm", "--tasks", "2"],
            "--sbatch must hold --partition=... and --time=..., got ''",
        ),
        (
            ["tokenize", "--corpus-dirs", "none", "--tokenizer-dir", "none", "--output-dir", "x"],
            "none: must be a tokenizer folder",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors(arguments, message, refused):
    refused(arguments, message)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Configs of a corpus and of an evaluation whose task stands in one of the documents."""
    monkeypatch.chdir(tmp_path)
    question = "Which of these rivers opens its stones at noon"
    texts = [
        f"Document {name}: nothing that anyone asks. " + "xyz"[index] * 200
        for index, name in enumerate("abc")
    ]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [*texts, f"{question}? {texts[0]}"])
    )
    (tmp_path / "exam.jsonl").write_text(json.dumps({"goal": question, "sol1": "a", "sol2": "b", "label": 0}))
    corpus = {
        "sources": [{"kind": "jsonl", "name": "a", "paths": ["a.jsonl"]}],
        "deduplication": {"near": False},
    }
    task = {"kind": "piqa", "name": "exam", "source": {"kind": "jsonl", "paths": ["exam.jsonl"]}, "limit": 9}
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": [task]}))
    return tmp_path


def prepare(*options):
    arguments = ["prepare", "--config", "corpus.json", "--output-dir", "c", "--num-workers", "1"]
    return run(dispatch, [*arguments, "--decontaminate", "evaluation.json", *options])


def test_a_corpus_is_decontaminated_against_an_evaluation(place):
    assert prepare() == 0
    manifest = read_corpus(place / "c").manifest
    assert manifest["sources"][0]["dropped"] == {"shares_text_with_exam": 1}
    [against] = manifest["config"]["decontamination"]["against"]
    assert (against["name"], against["source"]["paths"], against["fields"]) == ("exam", ["exam.jsonl"], None)


def test_an_evaluation_that_cannot_be_used_is_refused(place, capsys):
    against = {"name": "b", "source": {"kind": "text", "paths": ["a.jsonl"]}}
    assert prepare(f'decontamination={{"against": [{json.dumps(against)}]}}') == 2
    assert "--decontaminate must be left out where the config has decontamination" in capsys.readouterr().err
    (place / "evaluation.json").write_text("{}")
    assert prepare() == 2
    message = "--decontaminate evaluation.json: against must hold at least one evaluation set, got none"
    assert message in capsys.readouterr().err
