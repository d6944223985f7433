"""`lumi evaluate` from end to end, on local data."""

import copy
import json
import re
import shutil

import pytest
import torch

import lumi.evaluation.evaluate
from lumi.cli import dispatch
from lumi.command_line import run
from lumi.config import UserError, from_dict, load_config
from lumi.corpus import PrepareConfig, prepare, read_corpus
from lumi.evaluation.evaluate import CONFIGS, EvaluationConfig, evaluate
from lumi.evaluation.likelihood import encode_request, score
from lumi.evaluation.tasks import TASKS
from lumi.formats.adapter_format import save_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hf_format import save_model
from lumi.formats.pretrained import Pretrained
from lumi.host.provenance import write_provenance
from lumi.model.lora import LoraConfig, adapters, add_lora, merge_lora

BOOLQ = [
    {"question": f"is it stone {i}", "passage": "The river opens. " * (2 * i + 1), "answer": i % 3 > 0}
    for i in range(9)
]
OFF = [f"max_{what}_fraction" for what in ("duplicate_ngram_char", "top_ngram_char")]
CONFIG = {
    "tasks": [
        {"kind": "boolq", "name": "boolq", "source": {"kind": "jsonl", "paths": ["boolq.jsonl"]}},
        {"kind": "piqa", "name": "piqa", "source": {"kind": "jsonl", "paths": ["piqa.jsonl"]}},
    ],
    "texts": [{"name": "river", "source": {"kind": "text", "paths": ["river.txt"]}}],
    "windows": {"window_tokens": 64, "stride_tokens": 32},
    "smoke_tests": {"path": "smoke.json", "style": "text", "max_new_tokens": 5},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, opinionated_model, tokenizer):
    """A folder with a model, data and a config, where the tests stand."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "model", opinionated_model, tokenizer)
    (folder / "boolq.jsonl").write_text("\n".join(map(json.dumps, BOOLQ)))
    (folder / "piqa.jsonl").write_text(
        json.dumps({"goal": "open", "sol1": "turn", "sol2": "eat | drink", "label": 1})
    )
    (folder / "river.txt").write_text("The river opens a stone at noon. " * 20)
    (folder / "smoke.json").write_text(
        json.dumps({"categories": {"words": [{"prompt": "a|b", "any_of": ["unlikely"]}]}})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def call(place, monkeypatch, *arguments):
    monkeypatch.chdir(place)
    return run(dispatch, ["evaluate", "--device", "cpu", *map(str, arguments)])


def test_everything_at_once(place, monkeypatch, capsys, opinionated_model, tokenizer, store_dir):
    arguments = (
        "--model-path",
        "model",
        "--config",
        "config.json",
        "--data_dirs",
        store_dir,
        "--output-dir",
        "out",
    )
    assert call(place, monkeypatch, *arguments, "batch_tokens=500") == 0
    table = capsys.readouterr().out
    results = json.loads((place / "out" / "evaluation_results.json").read_text())
    assert results["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert results["parameters"] == sum(parameter.numel() for parameter in opinionated_model.parameters())
    assert (results["model"], results["adapter"], results["dtype"], results["device"]) == (
        "model",
        None,
        "float32",
        "cpu",
    )
    assert (results["limit"], results["finished"]) == (None, True)
    sources = [
        part["source"]
        for part in (*results["tasks"].values(), *results["perplexity"].values(), results["smoke_tests"])
    ]
    assert sources == [
        "jsonl: boolq.jsonl",
        "jsonl: piqa.jsonl",
        "text: river.txt",
        f"store: {store_dir} / validation",
        "prompts of smoke.json",
    ]
    assert results["config"]["batch_tokens"] == 500
    assert set(results["versions"]) == {"lumi", "torch", "python"}

    right = cut = 0
    for record in BOOLQ:
        prompt = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
        [[no, yes]] = score(
            opinionated_model, [encode_request(tokenizer, prompt, [" no", " yes"])], batch_tokens=1
        )
        right += (yes.nats > no.nats) == record["answer"]
        answer = max(len(tokenizer.encode(prompt + text)) for text in (" no", " yes"))
        cut += answer > opinionated_model.config.max_positions  # BOS is read, the last token is not
    boolq = results["tasks"]["boolq"]
    assert (boolq["acc"], boolq["acc_norm"], boolq["examples"]) == (right / 9, None, 9)
    assert 0 < cut < 9
    assert (boolq["cut_contexts"], results["tasks"]["piqa"]["cut_contexts"]) == (cut, 0)
    assert f"9 examples, {cut} cut" in table
    assert (boolq["majority"], boolq["chance"]) == (6 / 9, 0.5)
    assert results["tasks"]["piqa"]["acc_stderr"] is None
    assert (boolq["few_shot"], results["centred_mean"]["tasks"]) == (None, ["boolq", "piqa"])
    assert boolq["decontaminated"] is results["perplexity"]["river"]["decontaminated"] is None
    assert "decontaminated" not in (place / "out" / "evaluation_report.md").read_text()
    examples = [json.loads(line) for line in (place / "out" / "evaluation_examples.jsonl").open()]
    assert "evaluation_examples.jsonl" in json.loads((place / "out" / "provenance.json").read_text())["files"]
    assert [row["task"] for row in examples] == ["boolq"] * 9 + ["piqa"]
    for metric, key in (("acc", "right"), ("bits_per_byte", "bits_per_byte"), ("margin", "margin")):
        assert boolq[metric] == pytest.approx(sum(row[key] for row in examples[:9]) / 9)
    river = results["perplexity"]["river"]
    assert (river["words"], river["window_tokens"], river["stride_tokens"]) == (141, 64, 32)
    assert results["perplexity"][str(store_dir)]["format"] == "store"
    [answer] = results["smoke_tests"]["answers"]
    assert answer["checks"]["any_of"] is False

    report = (place / "out" / "evaluation_report.md").read_text()
    for figure in (
        f"{right / 9:.2%}",
        "majority 66.67%, chance 50.00%",
        f"{boolq['bits_per_byte']:.4f} ± {boolq['bits_per_byte_stderr']:.4f}",
        f"{boolq['margin']:+.4f} ± {boolq['margin_stderr']:.4f}",
        "over boolq, piqa, as DataComp-LM's CORE",
        f"{river['bits_per_byte']:,.4g}",
        "stride 32",
        f"{cut} contexts cut from the left to the model's positions",
        "EOS not counted",
    ):
        assert figure in report
    assert "Question: {question}" in report
    assert "Not finished" not in report
    for source in sources:  # a figure's protocol names its data
        assert any(re.match(rf"\d+\. {re.escape(source)}; ", line) for line in report.splitlines()), source
    assert "a\\|b" in report
    assert all(
        line.count(" | ") == report.splitlines()[4].count(" | ")
        for line in report.splitlines()[4:]
        if "perplexity" in line
    )
    for name in ("boolq", "piqa", "river", "smoke: words", f"{right / 9:.2%}"):
        assert name in table


def test_limits_and_overrides(place, monkeypatch, capsys):
    arguments = ("--model-path", "model", "--config", "config.json", "--output-dir", "out2", "--limit", "4")
    assert call(place, monkeypatch, *arguments, "tasks.0.limit=3", "smoke_tests=null") == 0
    results = json.loads((place / "out2" / "evaluation_results.json").read_text())
    assert results["tasks"]["boolq"]["examples"] == 3
    assert (results["limit"], results["smoke_tests"]) == (4, None)
    report = (place / "out2" / "evaluation_report.md").read_text()
    assert "The first 4 of each task and text at most (--limit)." in report
    assert ". the first 3 examples of jsonl: boolq.jsonl; zero-shot" in report
    assert ". the first 4 examples of jsonl: piqa.jsonl; zero-shot" in report
    assert ". the first 4 documents of text: river.txt; windows" in report
    assert "| 1 example |" in report


def test_examples_of_another_file(place, monkeypatch, capsys):
    """They stand before each question, so that other figures come out, and the report says so."""
    arguments = ("--model-path", "model", "--config", "config.json", "--output-dir")
    less = ("texts=[]", "smoke_tests=null", "--limit", "1")
    few_shot = {"num_fewshot": 1, "source": {"kind": "jsonl", "paths": ["boolq.jsonl"]}}
    assert call(place, monkeypatch, *arguments, "bare", *less) == 0
    assert (
        call(place, monkeypatch, *arguments, "shot", *less, f"tasks.0.few_shot={json.dumps(few_shot)}") == 0
    )
    bare, shot = (
        json.loads((place / name / "evaluation_results.json").read_text())["tasks"]
        for name in ("bare", "shot")
    )
    assert shot["boolq"]["bits_per_byte"] != pytest.approx(bare["boolq"]["bits_per_byte"], rel=1e-3)
    assert shot["piqa"]["bits_per_byte"] == bare["piqa"]["bits_per_byte"]
    expected = {"num_fewshot": 1, "source": "jsonl: boolq.jsonl", "sampler": "random"}
    assert shot["boolq"]["few_shot"] == expected
    report = (place / "shot" / "evaluation_report.md").read_text()
    assert "1-shot, drawn from jsonl: boolq.jsonl, without chat template" in report


def test_examples_of_an_earlier_evaluation_do_not_stay(place, monkeypatch, capsys):
    arguments = ("--model-path", "model", "--config", "config.json", "--output-dir", "again", "texts=[]")
    assert call(place, monkeypatch, *arguments) == 0
    assert (place / "again" / "evaluation_examples.jsonl").exists()
    assert call(place, monkeypatch, *arguments, "tasks=[]") == 0
    assert not (place / "again" / "evaluation_examples.jsonl").exists()


def test_pairs_are_refused(place, monkeypatch, capsys, pairs_dir):
    """Half of their answers are bad ones: the perplexity of both together means nothing."""
    arguments = ("--model-path", "model", "--output-dir", "pairs", "--data-dirs", pairs_dir)
    assert call(place, monkeypatch, *arguments) == 2
    assert (
        f"--data-dirs must hold texts or conversations, got the pairs of {pairs_dir}"
        in capsys.readouterr().err
    )


def test_data_dirs_alone(place, monkeypatch, capsys, store_dir):
    assert (
        call(
            place,
            monkeypatch,
            "--model-path",
            "model",
            "--output-dir",
            "out3",
            "--data-dirs",
            store_dir,
            "--dtype",
            "bfloat16",
        )
        == 0
    )
    results = json.loads((place / "out3" / "evaluation_results.json").read_text())
    assert (results["tasks"], list(results["perplexity"]), results["dtype"]) == (
        {},
        [str(store_dir)],
        "bfloat16",
    )
    assert results["smoke_tests"]["prompts"] == 20


def test_a_store_behind_a_url(place, monkeypatch, store_dir, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for output, data in (("here", store_dir), ("there", f"file://{store_dir}")):
        arguments = ("--model-path", "model", "--output-dir", output, "--data-dirs", data)
        assert call(place, monkeypatch, *arguments) == 0
        results = json.loads((place / output / "evaluation_results.json").read_text())
        found.append(results["perplexity"][str(data)])
    assert found[0]["bits_per_byte"] == found[1]["bits_per_byte"]


def test_an_adapter_on_its_base(place, monkeypatch, capsys, opinionated_model, tokenizer):
    """The same figures as the merged model's, and others than the base's."""
    model, lora = copy.deepcopy(opinionated_model), LoraConfig(rank=2)
    add_lora(model, lora)
    with torch.no_grad():
        for _, module in adapters(model):
            module.lora_B.normal_(std=0.3)
    save_adapter(
        place / "adapter", model, lora, tokenizer, place / "model", weights_fingerprint(place / "model")
    )
    merge_lora(model)
    save_model(place / "whole", model, tokenizer)
    nats = {}
    for name, arguments in {
        "base": ["--model-path", "model"],
        "both": ["--model-path", "model", "--adapter-path", "adapter"],
        "merged": ["--model-path", "whole"],
    }.items():
        assert (
            call(place, monkeypatch, *arguments, "--config", "config.json", "--output-dir", name, "tasks=[]")
            == 0
        )
        results = json.loads((place / name / "evaluation_results.json").read_text())
        nats[name] = results["perplexity"]["river"]["nats"]
        assert results["adapter"] == ("adapter" if name == "both" else None)
    assert nats["both"] == pytest.approx(nats["merged"], rel=1e-5)
    assert nats["both"] != pytest.approx(nats["base"], rel=1e-3)
    assert "with the adapter `adapter`" in (place / "both" / "evaluation_report.md").read_text()


def test_quick_is_the_standard_with_limits():
    standard, quick = (
        load_config(EvaluationConfig, CONFIGS / f"{name}.json") for name in ("standard", "quick")
    )
    assert [(task.kind, task.name, task.source) for task in standard.tasks] == [
        (task.kind, task.name, task.source) for task in quick.tasks
    ]
    assert {task.limit for task in standard.tasks} | {text.limit for text in standard.texts} == {None}
    assert all(part.limit for part in (*quick.tasks, *quick.texts))
    assert {task.kind for task in standard.tasks} == set(TASKS) - {"blimp"}  # which has 67 subsets


def test_one_batch_size_or_another(place, monkeypatch, opinionated_model, tokenizer, capsys):
    monkeypatch.chdir(place)
    pretrained = Pretrained(opinionated_model, tokenizer, place / "model")
    small, large = (
        evaluate(
            load_config(EvaluationConfig, "config.json", [f"batch_tokens={size}"]), pretrained, place / "out4"
        )
        for size in (1, 9999)
    )
    assert small["tasks"]["boolq"]["acc"] == large["tasks"]["boolq"]["acc"]
    assert small["perplexity"]["river"]["nats"] == pytest.approx(
        large["perplexity"]["river"]["nats"], rel=1e-6
    )
    assert small["smoke_tests"]["answers"] == large["smoke_tests"]["answers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["batch_tokens=0"], "config.json: batch_tokens must be at least 1, got 0"),
        (["batches=1"], "config.json: batches unknown key (value 1); did you mean 'batch_tokens'?"),
        (["tasks.1.name=boolq"], "config.json: tasks must have different names, got 'boolq' twice"),
        (['tasks.0.source.paths=["none.jsonl"]'], "paths must match at least one file, got 'none.jsonl'"),
        (
            ['tasks.0.source.paths=["empty.jsonl"]'],
            "jsonl: empty.jsonl: must hold at least one record, got none",
        ),
        (
            ["tasks.0.kind=piqa"],
            "task 'boolq': jsonl: boolq.jsonl, record 1: 'goal' must be a string,"
            " got no such field (it has question",
        ),
        (
            ["windows.window_tokens=1000"],
            "windows.window_tokens must be at most the model's 96 positions, got 1000",
        ),
        (["smoke_tests.path=none.json"], "none.json: cannot be read"),
        (["--data-dirs", "model"], "--data-dirs must name token stores"),
        (["--data-dirs", "river"], "texts and --data-dirs must have different names, got 'river' twice"),
        (["--data-dirs", "a", "a/"], "--data-dirs must be different folders, got a a; leave one out"),
        (
            ["--output-dir", "river.txt"],
            "--output-dir must be a folder that can be written to, got river.txt: ",
        ),
        (["--output-dir", "model"], "--output-dir must be a folder for results, got model, which holds"),
        (
            ["--output-dir", "river.txt/x"],
            "--output-dir must be a folder that can be written to, got river.txt/x: ",
        ),
        (
            ["smoke_tests.style=chat", "smoke_tests.path=long.json"],
            "smoke tests: long, prompt 1: a prompt must be shorter than the model's 96",
        ),
        (["smoke_tests.path=deep.json"], "deep.json: not valid JSON: maximum recursion depth"),
        (["--model-path", "none"], "none: must be a model folder"),
        (["--config", "none.json"], "none.json: cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments, message, place, monkeypatch, capsys):
    (place / "empty.jsonl").write_text("")
    (place / "long.json").write_text(json.dumps({"categories": {"long": [{"prompt": "x" * 300}]}}))
    (place / "deep.json").write_text("[" * 100_000)
    given = ["--model-path", "model", "--config", "config.json", "--output-dir", "refused"]
    for name in ("score_questions", "perplexity", "run_smoke_tests"):
        monkeypatch.setattr(
            f"lumi.evaluation.evaluate.{name}",
            lambda *_arguments, **_options: pytest.fail("the model was run"),
        )
    assert call(place, monkeypatch, *given, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("stop", "code", "last"),
    [(KeyboardInterrupt(), 130, None), (UserError("broken"), 2, "error: broken")],
    ids=["Ctrl-C", "an error"],
)
def test_what_was_measured_is_kept(stop, code, last, place, monkeypatch, capsys):
    seen = []

    def stops(*_arguments, **_options):
        seen.append(json.loads((place / "stopped" / "evaluation_results.json").read_text()))
        raise stop

    monkeypatch.setattr(lumi.evaluation.evaluate, "perplexity", stops)
    assert (
        call(
            place, monkeypatch, "--model-path", "model", "--config", "config.json", "--output-dir", "stopped"
        )
        == code
    )
    results = json.loads((place / "stopped" / "evaluation_results.json").read_text())
    assert [results] == seen
    assert (results["finished"], list(results["tasks"]), results["perplexity"]) == (
        False,
        ["boolq", "piqa"],
        {},
    )
    assert "**Not finished**" in (place / "stopped" / "evaluation_report.md").read_text()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("stopped", "error"))]
    kept = "stopped; boolq, piqa measured, kept in stopped/evaluation_results.json and evaluation_report.md"
    assert lines == [line for line in (kept, last) if line]


def test_control_c_before_anything_was_measured(place, monkeypatch, capsys):
    def stops(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lumi.evaluation.evaluate, "score_questions", stops)
    assert (
        call(place, monkeypatch, "--model-path", "model", "--config", "config.json", "--output-dir", "early")
        == 130
    )
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "stopped before anything was measured; nothing was written"
    )
    assert not list((place / "early").iterdir())


def test_a_broken_model_passes_no_smoke_tests(place, opinionated_model, tokenizer, monkeypatch):
    monkeypatch.chdir(place)
    broken = copy.deepcopy(opinionated_model)
    with torch.no_grad():
        broken.final_norm.weight[3] = float("nan")
    config = load_config(EvaluationConfig, "config.json", ["tasks=[]", "texts=[]"])
    with pytest.raises(UserError, match="the model's output must be finite, got NaN or infinity"):
        evaluate(config, Pretrained(broken, tokenizer, place / "model"), place / "broken")


def test_nothing_to_do(opinionated_model, tokenizer, tmp_path):
    with pytest.raises(
        UserError, match="the config must name at least one of tasks, texts and smoke_tests, got none"
    ):
        evaluate(EvaluationConfig(), Pretrained(opinionated_model, tokenizer, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_corpora_that_were_not_decontaminated_give_one_warning(place, monkeypatch, capsys, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Nothing that is asked stands here. " * 8}))
    boolq = {"name": "yes or no", "source": {"kind": "jsonl", "paths": [str(place / "boolq.jsonl")]}}
    config = {
        "sources": [{"kind": "jsonl", "name": "a", "paths": [str(tmp_path / "a.jsonl")]}],
        "filters": dict.fromkeys(OFF),
        "decontamination": {"against": [boolq]},
    }
    prepare(from_dict(PrepareConfig, config), tmp_path / "corpus", num_workers=1)
    corpus = read_corpus(tmp_path / "corpus")
    write_provenance(tmp_path / "model", "model", [corpus.as_parent], {})
    arguments = (
        "--model-path",
        tmp_path / "model",
        "--config",
        "config.json",
        "--output-dir",
        tmp_path / "out",
    )
    assert call(place, monkeypatch, *arguments, "--limit", 1, "smoke_tests=null") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split(": if")[0] for line in warnings] == [
        f"lumi: warning: the model was trained on {corpus.folder}, not decontaminated against piqa, river"
    ]
    results = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
    found = {**results["tasks"], **results["perplexity"]}
    assert {name: part["decontaminated"] for name, part in found.items()} == {
        "boolq": True,
        "piqa": False,
        "river": False,
    }
    report = (tmp_path / "out" / "evaluation_report.md").read_text()
    assert report.count("; training data NOT decontaminated against it") == 2 + report.count("; words: ")
    assert report.count("; training data decontaminated against it") == 1
