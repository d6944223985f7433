"""The benchmarks' own code, walked at tiny sizes (on the CPU in Triton's interpreter): what they check, record and survive. Nothing here
depends on how long anything takes."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lumi.kernels.bundle import REFERENCE, TRITON
from lumi.model import ModelConfig

pytest.importorskip("triton", reason="Triton is not installed here")

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODEL = ModelConfig(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, mlp_dim=64)
DTYPE = torch.float16  # the interpreter's bfloat16 is wrong


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    """Benchmarks import each other as the scripts beside them."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def measure(on_the_path, device):
    module = importlib.import_module("measure")
    with module.ready(torch.device(device)):
        yield module


@pytest.fixture
def results(measure, device, tmp_path):
    return importlib.import_module("results").Results("subject", torch.device(device), tmp_path, rounds=2)


def read(results):
    return json.loads(results.path.read_text())


def assert_whole(results, candidates, left_out=()):
    """Nothing failed, every candidate was timed, and all is in the file."""
    data = read(results)
    assert data == results.data
    assert data["failures"] == []
    assert {t["candidate"] for t in data["times"]} >= set(candidates)
    if results.device.type == "cpu":
        assert {entry["where"].split(": ")[-1] for entry in data["left_out"]} == set(left_out)
    assert all(t["low"] <= t["microseconds"] <= t["high"] for t in data["times"])


# --- how it is measured ---


def test_candidates_take_turns_and_every_buffer_is_used(measure):
    log = []
    calls = {name: [lambda n=name, i=i: log.append((n, i)) for i in range(2)] for name in "ab"}
    samples = measure.interleaved({name: (lambda c=c: [f() for f in c], 2) for name, c in calls.items()}, torch.device("cpu"), rounds=2)
    rounds = [[("a", 0), ("a", 1), ("b", 0), ("b", 1)], [("b", 0), ("b", 1), ("a", 0), ("a", 1)]]
    assert log == [entry for index in range(4) for entry in rounds[index % 2]]  # two of the four rounds are thrown away
    assert all(0 < sample.low <= sample.seconds <= sample.high for sample in samples.values())


def test_a_peer_that_does_not_run_is_left_out_and_ours_is_not(results):
    def broken():
        raise RuntimeError("no such backend")

    times = results.time("case", {"lumi": lambda: [lambda: torch.ones(4)], "peer": broken})
    assert times.keys() == {"lumi"}
    assert read(results)["left_out"] == [{"where": "case: peer", "error": "RuntimeError: no such backend"}]
    with results.case("outer"):
        results.time("case", {"lumi": broken})
    assert read(results)["failures"] == [{"where": "outer", "error": "RuntimeError: no such backend"}]


def test_claims(results):
    results.claim("fast", 1.3, at_least=1.25)
    results.claim("slow", 1.2, at_least=1.25)
    results.claim("small", 1.05, at_most=1.1)
    results.claim("unknown", None, at_least=2.0)
    results.claim("for information", 3.0)
    assert [claim["met"] for claim in read(results)["claims"]] == [True, False, True, None, None]


def test_check_lets_through_what_the_dtype_allows_and_no_more(measure):
    torch.manual_seed(0)
    exact = [torch.randn(100, dtype=torch.float64)]
    rounded = [exact[0].half()]
    measure.check("rounded", rounded, rounded, exact)
    for wrong in (rounded[0] * 1.01, rounded[0].where(torch.arange(100) > 0, torch.nan), rounded[0][:99], rounded[0].float()):
        with pytest.raises(RuntimeError, match="tensor 0"):
            measure.check("wrong", [wrong], rounded, exact)


def test_check_knows_what_a_long_sum_in_float32_loses(measure):
    exact = [torch.ones(4, dtype=torch.float64)]
    off = [(exact[0] * (1 + 20 * torch.finfo(torch.float32).eps)).float()]
    measure.check("sum", off, [exact[0].float()], exact, terms=1000)
    with pytest.raises(RuntimeError, match="exceeds"):
        measure.check("sum", off, [exact[0].float()], exact, terms=100)


def test_pictures(results):
    results.time("case", {"lumi": lambda: [lambda: torch.ones(4)]})
    results.draw()
    assert results.path.with_suffix(".png").stat().st_size > 1000


def test_without_a_gpu_a_benchmark_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["attention.py", "--output-dir", str(tmp_path)])
    assert importlib.import_module("results").main("attention", "", lambda results: None) == 2
    assert capsys.readouterr().err == "benchmarks/attention.py needs a CUDA device, and there is none here\n"
    assert list(tmp_path.iterdir()) == []


# --- the benchmarks ---


@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm", "swiglu", "rope"])
def test_row_kernels(results, operator):
    row_kernels = importlib.import_module("row_kernels")
    shape = (1, 3, 2, 1, 16) if operator == "rope" else (5, 64)
    row_kernels.run(results, {operator: replace(row_kernels.OPERATORS[operator], large=[shape], small=[shape])}, DTYPE)
    assert_whole(results, {"lumi", "copy", "eager", "compiled"})
    claims = read(results)["claims"]
    assert [claim["at_least"] for claim in claims] == ([0.88, 0.88, 3.0] if operator == "rms_norm" else [0.88, 0.88])


def test_row_kernels_count_bytes():
    row_kernels = importlib.import_module("row_kernels")
    assert row_kernels.bytes_moved("rms_norm", (10, 64), 2, backward=True) == 3 * 10 * 64 * 2
    assert row_kernels.bytes_moved("rope", (2, 3, 4, 1, 64), 2, backward=False) == 6 * (2 * 5 * 64 * 2 + 2 * 32 * 4)


def test_attention(results):
    attention = importlib.import_module("attention")
    attention.run(results, [(1, 20, 2, 1, 64), (1, 20, 1, 1, 64)], [(1, 20, 1, 1, 64)], DTYPE)
    assert_whole(results, {"lumi", "sdpa"}, left_out={"flex", "varlen", "sdpa cudnn"})  # which have no backward on the CPU
    claims = {claim["claim"].removesuffix(", at least over 1 shapes"): claim for claim in read(results)["claims"]}
    over_sdpa = [claims[f"attention {direction}, head_dim 64: times as fast as sdpa"] for direction in ("forward", "backward")]
    assert [claim["at_least"] for claim in over_sdpa] == [1.25, 1.1]
    over_flex = [claims[f"packed documents {direction}, head_dim 64: times as fast as flex"] for direction in ("forward", "backward")]
    assert [claim["at_least"] for claim in over_flex] == [1.1, 1.1]


def test_flex_attention_sees_the_same_documents():
    attention = importlib.import_module("attention")
    q, k, v = (torch.randn(2, 50, heads, 16) for heads in (4, 2, 2))
    document_BT = torch.tensor([[0] * 20 + [1] * 30, [0] * 50])
    cu_seqlens = torch.tensor([0, 20, 50, 100], dtype=torch.int32)
    plan = attention.attention_plan(cu_seqlens, 2, 50, "cpu")
    reference_plan = importlib.import_module("lumi.kernels.attention_plan").attention_plan_reference(cu_seqlens, 2, 50, "cpu")
    assert plan.length == reference_plan.length
    actual = attention._flex((2, 50, 4, 2, 16), document_BT, torch.device("cpu"))(q, k, v)
    torch.testing.assert_close(actual, attention.attention_reference(q, k, v, reference_plan))


def test_document_lengths_fill_a_row():
    attention = importlib.import_module("attention")
    lengths = attention.document_lengths(1000, 50, attention.random.Random(0))
    assert sum(lengths) == 1000
    assert len(set(lengths)) > 5
    assert min(lengths) > 0


def test_decode_attention(results):
    decode_attention = importlib.import_module("decode_attention")
    decode_attention.run(results, [(2, 128, 4, 2, 64)], [(1, 64, 2, 2, 64)], DTYPE)
    assert_whole(results, {"lumi", "lumi paged", "sdpa", "sdpa masked", "copy"})


def test_linear_cross_entropy(results):
    linear_cross_entropy = importlib.import_module("linear_cross_entropy")
    linear_cross_entropy.run(results, [(9, 16, 97)], DTYPE, matmul_size=64)
    assert_whole(results, {"lumi", "eager", "compiled"})
    assert [list(value) for value in read(results)["notes"].values()] == [
        ["lumi", "eager", "compiled", "lumi's bound"],
        ["lumi", "eager", "lumi's bound"],
    ]


def test_lora_linear(results):
    lora_linear = importlib.import_module("lora_linear")
    lora_linear.run(results, [(33, 32, 3, 4)], (17, 32, 1, 4))
    assert_whole(results, {"lumi", "base", "plain", "compiled"})


def test_optimizer(results):
    optimizer = importlib.import_module("optimizer")
    optimizer.run(results, {"tiny": MODEL})
    assert_whole(results, {"lumi", "torch fused"})


def test_training_step(results, device):
    training_step = importlib.import_module("training_step")
    ops = TRITON if device == "cuda" else REFERENCE
    training_step.run(results, {"23M": training_step.Case(MODEL, 2, 16, ("gpt", "llama"))}, ops, rounds=1)
    names = ("lumi", "lumi layers compiled", "gpt", "llama")
    assert_whole(results, {*names, *(f"{name}, captured" for name in names)})


def test_the_models_that_are_trained_have_the_sizes_they_are_named_after():
    training_step = importlib.import_module("training_step")
    assert training_step.CASES["23M"].config.num_parameters == 23_072_000
    assert training_step.CASES["124M"].config.num_parameters == 123_587_328
    for case in training_step.CASES.values():
        with torch.device("meta"):
            gpt = training_step.GPT(case.config, case.length)
        assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(case.config.num_parameters, rel=0.02)


# --- correctness, sanitizer, all together ---


@pytest.mark.parametrize("operator", ["rms_norm", "rope", "attention", "linear_cross_entropy", "lora_linear", "adamw"])
def test_correctness(operator, device, capsys):
    correctness = importlib.import_module("correctness")
    assert correctness.run(operator, (torch.float32,), torch.device(device), small=True) == 0
    assert capsys.readouterr().out == f"{operator}, float32: 1 of 1 right, the same bits twice\n"


def test_correctness_walks_every_operator():
    correctness, sanitize = importlib.import_module("correctness"), importlib.import_module("sanitize")
    assert all(list(cases()) for cases in correctness.OPERATORS.values())
    assert set(sanitize.CHECKS["memcheck"]) == set(correctness.OPERATORS) > set(sanitize.CHECKS["racecheck"])


def spoilt(kind):
    calls = []

    def function(x):
        calls.append(x)
        if kind == "changes its input":
            x.detach().mul_(2)
        return x * {"wrong": 1.001, "changes from run to run": 1 + len(calls) * 1e-6}.get(kind, 1.0)

    return function


@pytest.mark.parametrize(
    ("kind", "message"),
    [("wrong", "exceeds"), ("changes from run to run", "a second run gave other bits"), ("changes its input", "an input was changed")],
)
def test_correctness_finds_what_is(kind, message, device, monkeypatch, capsys):
    correctness = importlib.import_module("correctness")
    make = correctness._operands([correctness._draw(3, 4)], [correctness._draw(3, 4)])
    monkeypatch.setitem(correctness.OPERATORS, "bad", lambda: iter([correctness.Case("bad", spoilt(kind), lambda x: x * 1.0, make)]))
    assert correctness.run("bad", (torch.float32,), torch.device(device), small=True) == 1
    assert message in capsys.readouterr().err


def test_sanitizer_is_left_out_where_there_is_none(monkeypatch, capsys):
    sanitize = importlib.import_module("sanitize")
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 0
    assert capsys.readouterr().out == "compute-sanitizer: left out, there is none here\n"


@pytest.mark.parametrize(("found", "code"), [("true", 0), ("false", 1)])
def test_sanitizer_fails_where_it_finds_something(found, code, monkeypatch, capsys):
    sanitize = importlib.import_module("sanitize")
    monkeypatch.setattr(sanitize, "find_tool", lambda: found)  # programs that take any argument
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == code
    assert ("memcheck: clean" in capsys.readouterr().out) == (code == 0)


def test_one_benchmark_that_fails_or_hangs_is_reported():
    run_all = importlib.import_module("run_all")
    assert run_all.run_one([sys.executable, "-c", ""], 60) is None
    assert run_all.run_one([sys.executable, "-c", "raise SystemExit(1)"], 60) == "exit code 1"
    assert run_all.run_one([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == "not done after 0 s"


def test_every_subject_is_a_script():
    run_all = importlib.import_module("run_all")
    for subject in run_all.SUBJECTS:
        assert (FOLDER / f"{subject}.py").exists()


def test_table(results):
    run_all = importlib.import_module("run_all")
    results.claim("fast", 1.3, at_least=1.25)
    results.claim("unknown", None, at_least=2.0)
    with results.case("case"):
        raise RuntimeError("it broke\nin two lines")
    text = run_all.table([read(results)], {"optimizer": "not done after 60 s"})
    rows = text.split("\n\n")
    assert rows[0].splitlines()[2:] == ["| fast | 1.300 | >= 1.25 | yes |", "| unknown | not measured | >= 2 | no |"]
    assert rows[1:3] == ["optimizer: not done after 60 s", "subject, failed: case: RuntimeError: it broke"]
    assert rows[3].startswith("subject: ")


def test_make_gpu_names_tests_that_exist():
    text = subprocess.run(["make", "-n", "gpu-check"], cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in text.splitlines() if " -m pytest tests/" in line)
    paths = [word for word in line.split() if word.startswith("tests/")]
    assert len(paths) >= 3
    assert all((FOLDER.parent / path).exists() for path in paths)


def test_tuning_takes_a_tile_that_runs_and_writes_the_table(measure, device, tmp_path, monkeypatch, capsys):
    """Of two tiles one cannot run; the other gets its row, and the rest of the table stays as it was."""
    tuner, tiles = importlib.import_module("tune_attention"), importlib.import_module("lumi.kernels.attention_tiles")
    shipped = json.loads(tiles.TABLE.read_text())
    table = json.loads(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "table", lambda: table)
    monkeypatch.setattr(tuner, "CHECKED", (1, 20, 1, 1))
    good, bad = ({"BLOCK_M": m, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "DESCRIPTORS": False} for m in (16, 24))
    assert tuner.tune("dq", 32, [bad, good], torch.device(device), DTYPE, (1, 20, 1, 1), rounds=1) == good
    assert "dq K=32 24 16 4 2 False: left out" in capsys.readouterr().out
    tuner.write(tmp_path / "table.json")
    arch = str(tiles.architecture(torch.device(device)))
    expected = {**shipped, arch: {**shipped[arch], "64": {**shipped[arch]["64"], "dq": good}}}
    assert json.loads((tmp_path / "table.json").read_text()) == expected
    with pytest.raises(RuntimeError, match="dq K=32: not one of 1 tiles runs"):
        tuner.tune("dq", 32, [bad], torch.device(device), DTYPE, (1, 20, 1, 1), rounds=1)


def test_the_table_is_written_as_it_was_read(on_the_path, tmp_path):
    tuner = importlib.import_module("tune_attention")
    tuner.write(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == importlib.import_module("lumi.kernels.attention_tiles").TABLE.read_text()
