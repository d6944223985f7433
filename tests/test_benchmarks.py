"""The benchmarks' own code, walked at tiny sizes (on the CPU in Triton's interpreter): what they check,
record and survive. Nothing here depends on how long anything takes."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lumi.config import UserError
from lumi.kernels.bundle import REFERENCE, TRITON
from lumi.model.transformer import ModelConfig

pytest.importorskip("triton", reason="Triton is not installed here")

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODEL = ModelConfig(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, mlp_dim=64)
DTYPE = torch.float16  # the interpreter's own bfloat16 is wrong


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
    samples = measure.interleaved(
        {name: (lambda c=c: [f() for f in c], 2) for name, c in calls.items()}, torch.device("cpu"), rounds=2
    )
    rounds = [[("a", 0), ("a", 1), ("b", 0), ("b", 1)], [("b", 0), ("b", 1), ("a", 0), ("a", 1)]]
    assert log == [
        entry for index in range(3) for entry in rounds[index % 2]
    ]  # the first of the three rounds is thrown away
    assert all(0 < sample.low <= sample.seconds <= sample.high for sample in samples.values())


@pytest.mark.parametrize(("graph", "repeats"), [(True, 50), (False, 5)])
def test_a_sample_is_as_long_as_what_is_launched_says(graph, repeats, measure, monkeypatch):
    """The host takes 1 ms for two calls, the device 0.1 ms: in a graph, samples of 5 ms are 50 times the
    two."""
    lengths = {}

    def arranged(kind):
        def arrange(calls):
            run = lambda: None
            lengths[run] = (kind, len(calls))
            return run

        return arrange

    monkeypatch.setattr(measure, "_captured", arranged("graph"))
    monkeypatch.setattr(measure, "_in_turn", arranged("eager"))
    monkeypatch.setattr(
        measure,
        "_seconds",
        lambda run, device: {"graph": 1e-4, "eager": 1e-3}[lengths[run][0]] * lengths[run][1] / 2,
    )
    run, num_calls = measure.prepared([lambda: None] * 2, torch.device("cuda"), graph=graph)
    assert lengths[run] == ("graph" if graph else "eager", 2 * repeats)
    assert num_calls == 2 * repeats


def test_a_candidate_says_that_it_replays_a_graph_of_its_own(results, measure, monkeypatch):
    module = importlib.import_module("results")
    monkeypatch.setattr(module, "prepared", lambda calls, device, graph: (calls, 1))
    monkeypatch.setattr(
        module, "interleaved", lambda ready, *_: {name: measure.Sample(1.0, 1.0, 1.0) for name in ready}
    )
    for kind, graph in (("cuda", False), ("cuda", True), ("cpu", False)):
        results.device = torch.device(kind)
        results.time(
            "case",
            {"lumi": lambda: [], "lumi, captured": lambda: []},
            graph=graph,
            replays=["lumi, captured"],
        )
    launches = [t["launch"] for t in read(results)["times"]]
    assert launches == ["eager", "graph", "graph", "graph", "eager", "eager"]


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
    for wrong in (
        rounded[0] * 1.01,
        rounded[0].where(torch.arange(100) > 0, torch.nan),
        rounded[0][:99],
        rounded[0].float(),
    ):
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


@pytest.mark.parametrize("ends", [True, False])
def test_only_a_benchmark_that_came_to_its_end_is_finished(ends, monkeypatch, tmp_path):
    module = importlib.import_module("results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "ready", lambda device: nullcontext())
    monkeypatch.setattr(
        module,
        "Results",
        lambda subject, _, *rest, kind=module.Results: kind(subject, torch.device("cpu"), *rest),
    )
    monkeypatch.setattr(sys, "argv", ["subject.py", "--output-dir", str(tmp_path)])

    def run(results):
        assert read(results)["finished"] is False
        results.claim("fast", 1.3, at_least=1.25)
        if not ends:
            raise KeyboardInterrupt

    if ends:
        assert module.main("subject", "", run) == 0
    else:
        with pytest.raises(KeyboardInterrupt):
            module.main("subject", "", run)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["finished"] is ends
    assert len(json.loads(path.read_text())["claims"]) == 1


# --- the benchmarks ---


@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm", "swiglu", "rope"])
def test_row_kernels(results, operator):
    row_kernels = importlib.import_module("row_kernels")
    shape = (1, 3, 2, 1, 16) if operator == "rope" else (5, 64)
    row_kernels.run(
        results, {operator: replace(row_kernels.OPERATORS[operator], large=[shape], small=[shape])}, DTYPE
    )
    assert_whole(results, {"lumi", "copy", "eager", "compiled"})
    claims = read(results)["claims"]
    assert [claim["at_least"] for claim in claims] == (
        [0.88, 0.88, 3.0] if operator == "rms_norm" else [0.88, 0.88]
    )


def test_row_kernels_count_bytes():
    row_kernels = importlib.import_module("row_kernels")
    assert row_kernels.bytes_moved("rms_norm", (10, 64), 2, backward=True) == 3 * 10 * 64 * 2
    assert row_kernels.bytes_moved("rope", (2, 3, 4, 1, 64), 2, backward=False) == 6 * (
        2 * 5 * 64 * 2 + 2 * 32 * 4
    )


def test_attention(results):
    attention = importlib.import_module("attention")
    attention.run(results, [(1, 20, 2, 1, 64), (1, 20, 1, 1, 64)], [(1, 20, 1, 1, 64)], DTYPE)
    assert_whole(
        results, {"lumi", "sdpa"}, left_out={"flex", "varlen", "sdpa cudnn"}
    )  # which have no backward on the CPU
    claims = {
        claim["claim"].removesuffix(", at least over 1 shapes"): claim for claim in read(results)["claims"]
    }
    over_sdpa = [
        claims[f"attention {direction}, head_dim 64: times as fast as sdpa"]
        for direction in ("forward", "backward")
    ]
    assert [claim["at_least"] for claim in over_sdpa] == [1.25, 1.1]
    over_flex = [
        claims[f"packed documents {direction}, head_dim 64: times as fast as flex"]
        for direction in ("forward", "backward")
    ]
    assert [claim["at_least"] for claim in over_flex] == [1.1, 1.1]


def test_flex_attention_sees_the_same_documents():
    attention = importlib.import_module("attention")
    q, k, v = (torch.randn(2, 50, heads, 16) for heads in (4, 2, 2))
    document_BT = torch.tensor([[0] * 20 + [1] * 30, [0] * 50])
    cu_seqlens = torch.tensor([0, 20, 50, 100], dtype=torch.int32)
    plan = attention.attention_plan(cu_seqlens, 2, 50, "cpu")
    reference_plan = importlib.import_module("lumi.kernels.attention_plan").attention_plan_reference(
        cu_seqlens, 2, 50, "cpu"
    )
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
    over_sdpa, share = read(results)["claims"]
    assert over_sdpa["measured"] > 0
    assert share["measured"] is None  # no cache was that large


def test_decode_attention_claims_nothing_over_all_shapes_where_one_failed(results, monkeypatch):
    decode_attention = importlib.import_module("decode_attention")

    def measure_shape(results, shape, dtype, *, graph):
        if shape[0] == 2:
            raise RuntimeError("no")
        return {"lumi": 1.0, "sdpa": 2.0, "copy": 0.5}

    monkeypatch.setattr(decode_attention, "measure_shape", measure_shape)
    monkeypatch.setattr(decode_attention, "LARGE_BYTES", 0)
    for shapes, expected in (([1, 3], [2.0, 0.5]), ([1, 2, 3], [None, None])):
        decode_attention.run(results, [(B, 128, 4, 2, 64) for B in shapes], [], DTYPE)
        assert [claim["measured"] for claim in read(results)["claims"][-2:]] == expected


def test_decode_attention_lets_peers_round_elsewhere_and_us_not(results, monkeypatch):
    decode_attention = importlib.import_module("decode_attention")
    slacks, check = {2.0: 0, 10.0: 0}, decode_attention.measure.check

    def counted(name, actual, same_dtype, exact, slack):
        slacks[slack] += 1
        check(name, actual, same_dtype, exact, slack)

    monkeypatch.setattr(decode_attention.measure, "check", counted)
    decode_attention.run(results, [(1, 64, 2, 2, 64)], [], DTYPE)
    assert slacks == {2.0: 2, 10.0: 2}


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
    training_step.run(
        results, {"23M": training_step.Case(MODEL, 3, 16, ("gpt", "llama"), checked=2)}, ops, rounds=1
    )
    names = ("lumi", "lumi layers compiled", "gpt", "llama")
    assert_whole(results, {*names, *(f"{name}, captured" for name in names)})


@pytest.mark.parametrize("wrong", ["gradient", "loss"])
def test_a_wrong_training_step_is_found(wrong, measure, device, monkeypatch):
    training_step = importlib.import_module("training_step")

    class Wrong(training_step.Transformer):
        def forward(self, *args):
            loss = super().forward(*args)
            if self.ops is not REFERENCE:
                loss = (
                    loss + (0.01 * loss).detach() if wrong == "loss" else 1.05 * loss - (0.05 * loss).detach()
                )
            return loss

    monkeypatch.setattr(training_step, "Transformer", Wrong)
    tokens, targets = torch.randint(0, 64, (2, 2, 16), device=device)
    ours = replace(REFERENCE)
    assert ours is not REFERENCE
    with pytest.raises(RuntimeError, match=f"tensor {int(wrong == 'gradient')}: error"):
        training_step.check_gradients("wrong", MODEL, ours, tokens, targets)


def test_what_is_checked_of_the_larger_model_takes_several_chunks(on_the_path):
    training_step, lce = (
        importlib.import_module("training_step"),
        importlib.import_module("lumi.kernels.linear_cross_entropy"),
    )
    case = training_step.CASES["124M"]
    rows = case.checked * case.length
    assert case.checked < case.batch
    assert lce.triton_chunk_rows(rows, case.config.vocab_size, 2) < rows


def test_the_models_that_are_trained_have_the_sizes_they_are_named_after():
    training_step = importlib.import_module("training_step")
    assert training_step.CASES["23M"].config.num_parameters == 23_072_000
    assert training_step.CASES["124M"].config.num_parameters == 123_587_328
    for case in training_step.CASES.values():
        with torch.device("meta"):
            gpt = training_step.GPT(case.config, case.length)
        assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(case.config.num_parameters, rel=0.02)


# --- counting ---


def test_what_a_stand_in_for_a_gpu_counts(on_the_path):
    """A product with a cast weight: the cast reads 4 bytes and writes 2, the products of forward and of both
    gradients read or write 2 each, the gradient's cast reads 2 and writes 4."""
    stand_in_gpu = importlib.import_module("stand_in_gpu")
    gpu = stand_in_gpu.StandInGpu({(96, 32)}, (2, 8))
    with gpu.entered() as tally:
        weight = torch.nn.Parameter(torch.empty(96, 32, device="cuda"))
        x = torch.empty(16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert weight.device == x.device == torch.device("cuda", 0)
        before = tally.copy()
        y = torch.nn.functional.linear(x, weight.bfloat16())
        y.backward(torch.empty_like(y))
        step = tally - before
        assert (step.operators, step.launches, step.waits, step.copies) == (5, 5, 0, 0)
        assert step.by_name == {"aten::_to_copy": 2, "aten::mm": 3}
        assert step.weight_bytes == (6 + 2 + 2 + 2 + 6) * 96 * 32
        assert step.cast_bytes == 12 * 96 * 32
        assert step.bytes == step.weight_bytes + (2 * (32 + 96) + 2 * (96 + 32) + 2 * (96 + 32)) * 16
        assert torch.zeros(3).to("cuda").tolist() == [1.0, 1.0, 1.0]
        assert float(y.sum()) == 1.0
        torch.empty(96).copy_(y[0], non_blocking=True)
        assert (tally.waits, tally.late, tally.copies) == (2, 1, 1)
    assert weight.device.type == "meta"


def test_the_stand_in_knows_how_many_tensors_the_optimizer_launches_take(on_the_path):
    stand_in_gpu = importlib.import_module("stand_in_gpu")
    for name, capacity in (
        ("adamw", stand_in_gpu.ADAMW_CAPACITY),
        ("global_norm", stand_in_gpu.NORM_CAPACITY),
    ):
        source = (FOLDER.parent / "csrc" / f"{name}.cu").read_text(encoding="utf-8")
        assert f"constexpr int kCapacity = {capacity};" in source
        assert source.count("<<<") == 2  # one for each table of tensors, one beside them


def test_launches(data, tmp_path, monkeypatch):
    """Of Lumi's operators a layer has 10: two norms, SwiGLU, attention and RoPE, forward and backward;
    the rest has 5: a norm, the loss, and a factor for both of its gradients."""
    launches = importlib.import_module("launches")
    monkeypatch.setattr(launches, "LENGTH", 40)
    counts = {}
    for layers in (1, 2):
        model = {"vocab_size": 512, "num_layers": layers, "model_dim": 64, "num_heads": 1, "mlp_dim": 128}
        config = {"model": model, "optimizer": {"kind": "adamw", "schedule": {"kind": "cosine"}}}
        (tmp_path / "tiny.json").write_text(json.dumps(config))
        counts[layers] = launches.count(tmp_path / "tiny.json", data, tmp_path / str(layers))
        assert counts[layers]["micro-step"]["custom"] == 10 * layers + 5
        assert counts[layers]["parameters"] == ModelConfig(**model).num_parameters
        assert (counts[layers]["step"]["waits"], counts[layers]["step"]["late"]) == (0, 1)
    one, two = (counts[layers]["micro-step"] for layers in (1, 2))
    matrices = 4 * 64 * 64 + 3 * 64 * 128  # of a layer
    # Two products read the copy of 2 bytes, one writes the gradient of 4. The sum of gradients reads both and
    # writes one.
    assert two["weight_bytes"] - one["weight_bytes"] == (2 + 2 + 4 + 12) * matrices
    text = launches.table({"before": {"tiny": counts[2]}, "now": {"tiny": counts[1]}})
    share = one["operators"] / two["operators"]
    assert f"tiny, now beside before: {share:.0%} of the micro-step's operators" in text
    assert len(re.findall(r"^\| tiny \| (?:before|now) \|", text, re.MULTILINE)) == 4


def test_an_interrupted_count_writes_nothing(data, tmp_path, monkeypatch, capsys):
    """The run itself would take the signal for a request to stop after this step."""
    launches = importlib.import_module("launches")
    monkeypatch.setattr(launches, "LENGTH", 40)
    monkeypatch.setattr(launches, "random_data", lambda *_: data)
    train = launches.CountedTrainer.train
    interrupted = lambda trainer: (signal.raise_signal(signal.SIGINT), train(trainer))
    monkeypatch.setattr(launches.CountedTrainer, "train", interrupted)
    assert launches.main(["--sizes", "micro", "--output-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert list(tmp_path.glob("launches.*")) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--output-dir", "file", "--output-dir must be a folder that can be written to, got "),
        ("--output-dir", "broken", "{path}/broken/launches.json must be as launches.py writes it; remove it"),
        ("--output-dir", "other", "{path}/other/launches.json must be as launches.py writes it; remove it"),
        ("--label", "a|b", "--label must be a word without |, got 'a|b'"),
        ("--label", "", "--label must be a word without |, got ''"),
    ],
)
def test_what_launches_cannot_write_is_said_before_it_counts(option, value, message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name, text in (("broken", "{"), ("other", '{"now": {"tiny": 1}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "launches.json").write_text(text)
    launches = importlib.import_module("launches")
    monkeypatch.setattr(launches, "count_sizes", lambda *_: pytest.fail("counted"))
    monkeypatch.chdir(tmp_path)
    value = str(tmp_path / value) if option == "--output-dir" else value
    with pytest.raises(UserError) as caught:
        launches.main([option, value])
    assert str(caught.value).startswith(message.format(path=tmp_path))


def test_launches_says_which_counts_it_replaces(on_the_path, tmp_path, monkeypatch, capsys):
    launches = importlib.import_module("launches")
    recorded = json.loads((FOLDER / "results" / "launches.json").read_text())
    counts = recorded["after"]["tiny"]
    monkeypatch.setattr(launches, "count_sizes", lambda sizes: dict.fromkeys(sizes, counts))
    said = "launches.json: the counts of tiny under now will be replaced"
    for sizes, replaced in ((["tiny"], False), (["tiny", "micro"], True)):
        assert launches.main(["--sizes", *sizes, "--output-dir", str(tmp_path)]) == 0
        assert (said in capsys.readouterr().out) == replaced


# --- the loop, and several processes ---


@pytest.fixture
def data(on_the_path, store_dir, tokenizer_dir):
    return importlib.import_module("loop").Data(store_dir, tokenizer_dir)


def test_shares_of_the_loop():
    loop = importlib.import_module("loop")
    forward_backward, optimizer = loop.WORK
    first = loop.Step(0.0, 2.0, {forward_backward: 1.0, optimizer: 0.5, "log": 0.25})
    second = loop.Step(2.0, 6.0, {forward_backward: 5.0, optimizer: 0.5, "log": 0.25, "save": 0.125})
    assert (first.outside, second.outside, second.unsaved) == (0.5, 0.5, 5.875)
    assert loop.shares([first, second]) == {
        "outside": 1 / 8,
        forward_backward: 6 / 8,
        optimizer: 1 / 8,
        "log": 0.5 / 8,
    }


def test_what_a_save_costs():
    """Seven steps of about a second; two of them lose 0.5 and 0.25 s to a save that is written beside them,
    and another is waited for."""
    loop = importlib.import_module("loop")
    lengths = [(0.75, 0.0), (1.25, 0.25), (1.5, 0.0), (1.25, 0.0), (0.875, 0.0), (3.25, 2.0), (1.0, 0.0)]
    steps, start = [], 0.0
    for seconds, save in lengths:
        steps.append(loop.Step(start, seconds, {"save": save}))
        start += seconds
    # Steps 2 and 3 are from 2 to 3.5 and to 4.75.
    beside = loop.Save(step=1, waited=False, stall=0.25, begin=1.875, end=3.75, cpu_seconds=0.5)
    waited = loop.Save(step=5, waited=True, stall=2.0, begin=7.0, end=8.625, cpu_seconds=0.25)
    expected = loop.SaveCost(
        synchronous=2.0, stall=0.25, slowdown=0.75, writing=1.875, writing_cpu=0.5, noise=0.0625
    )
    assert loop.save_cost(steps, [beside, waited]) == expected
    assert loop.save_cost(steps, [waited, beside]) == expected
    with pytest.raises(ValueError, match="median"):
        loop.save_cost(steps, [beside])


def test_the_parts_of_a_step_are_what_takes_the_time(data, tmp_path, monkeypatch):
    loop = importlib.import_module("loop")

    def slow(owner, name, seconds):
        original = getattr(owner, name)

        def slower(*args, **options):
            time.sleep(seconds)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, slower)

    slow(loop.Trainer, "agree", 0.02)
    slow(loop.Trainer, "forward_backward", 0.03)
    slow(importlib.import_module("lumi.training.optimizer").Optimizer, "step", 0.04)
    slow(importlib.import_module("lumi.checkpoint.saver").Saver, "_write", 0.05)
    config = loop.run_config(True, 8, batches={"micro_batch_size": 2}) | {"save_every": 2}
    run = loop.timed_run(config, data, tmp_path / "run", "cpu", waiting=True)
    records = [
        record
        for record in importlib.import_module("lumi.training.metrics").read_metrics(run.folder.metrics)
        if record["kind"] == "train"
    ]
    assert len(run.steps) == len(records) == 8
    for step, record in zip(run.steps, records, strict=True):
        assert sum(step.parts.values()) <= step.seconds
        assert step.parts["data wait"] == pytest.approx(
            record["data_wait_seconds"], abs=6e-5
        )  # which is rounded to 1e-4
        assert step.parts[loop.WORK[0]] >= 2 * 0.03
        assert step.parts[loop.WORK[1]] >= 0.04
        assert step.outside >= step.parts["agreement"] >= 0.02
    assert [(save.step, save.waited) for save in run.saves] == [(1, False), (3, True), (5, False), (7, True)]
    for save in run.saves:
        step = run.steps[save.step]
        assert step.start < save.begin < save.begin + 0.05 <= save.end
        assert save.stall == step.parts["save"]
        if save.waited:
            assert save.end <= step.start + step.seconds
            assert save.stall >= save.end - save.begin


def test_loop(tmp_path, capsys):
    loop = importlib.import_module("loop")
    assert loop.main(["--quick", "--num-steps", "6", "--num-saves", "6", "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("loop-*.json")
    record = json.loads(path.read_text())
    assert record["finished"]
    assert [claim["at_most"] for claim in record["claims"]] == [0.02, 0.02, 0.005, None, None]
    assert all(claim["measured"] is not None for claim in record["claims"])
    assert record["notes"]["loop"]["steps"] == 2
    assert len(record["notes"]["save"]["saves"]) == 3
    with pytest.raises(SystemExit):
        loop.main(["--quick", "--num-saves", "4", "--output-dir", str(tmp_path)])
    assert "--num-saves must be at least 5" in capsys.readouterr().err


def test_random_data_is_what_the_benchmarks_ask_for(on_the_path, tmp_path):
    loop, token_store = importlib.import_module("loop"), importlib.import_module("lumi.data.token_store")
    split = token_store.TokenStore.open(loop.random_data(tmp_path, 50_000).store).split("train")
    assert 40_000 < split.num_tokens <= 50_000


@pytest.mark.soak
def test_scaling(results, data, tmp_path):
    """One process and two train the same, and the figures are those of their logs."""
    scaling, read_metrics = (
        importlib.import_module("scaling"),
        importlib.import_module("lumi.training.metrics").read_metrics,
    )
    config = scaling.run_config(True, 4, batches={"micro_batch_size": 2}) | {"dtype": "float32"}
    scaling.measure(results, ["DDP, strong"], config, data, tmp_path, rounds=1)
    logs = [read_metrics(tmp_path / f"0-{index}" / "run-0" / "metrics.jsonl") for index in range(2)]
    one, two = ([record for record in log if record["kind"] == "train"] for log in logs)
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=5e-5)
    rates = [2 * 128 / (records[2]["step_seconds"] + records[3]["step_seconds"]) for records in (one, two)]
    (claim,) = read(results)["claims"]
    assert claim["measured"] == pytest.approx(rates[1] / rates[0] / 2, abs=6e-5)


def test_scaling_tells_why_a_run_failed(on_the_path, tmp_path, monkeypatch):
    loop, scaling = importlib.import_module("loop"), importlib.import_module("scaling")
    program = tmp_path / "train.py"
    program.write_text("import sys; sys.exit('error: ' + sys.argv[sys.argv.index('--data-dirs') + 1])")
    monkeypatch.setattr(scaling.lumi.train, "__file__", str(program))
    with pytest.raises(RuntimeError, match=r"exit code 1: error: .*no-store"):
        scaling.tokens_per_second(
            scaling.ONE,
            scaling.run_config(True, 4),
            loop.Data(tmp_path / "no-store", tmp_path),
            tmp_path / "case",
        )


# --- correctness, sanitizer, all together ---


REPEATED = ["rms_norm", "rope", "attention", "decode_attention", "linear_cross_entropy"]


# The tests of the kernels prove most of it; one operator with a gradient and one without walk this code.
@pytest.mark.parametrize(
    "operator",
    ["lora_linear", "adamw", *(pytest.param(name, marks=pytest.mark.soak) for name in REPEATED)],
)
def test_correctness(operator, device, capsys):
    correctness = importlib.import_module("correctness")
    assert correctness.run(operator, (torch.float32,), torch.device(device), small=True) == 0
    count = sum(case.small for case in correctness.OPERATORS[operator]())
    assert capsys.readouterr().out == f"{operator}, float32: {count} of {count} right, the same bits twice\n"


def test_correctness_walks_every_operator():
    correctness, sanitize = importlib.import_module("correctness"), importlib.import_module("sanitize")
    for operator, cases in correctness.OPERATORS.items():
        names = [case.name for case in cases()]
        assert len(set(names)) == len(names)
        assert sum(case.small for case in cases()) in ({1} if operator == "adamw" else {2, 3})
    assert set(sanitize.CHECKS["memcheck"]) == set(correctness.OPERATORS) > set(sanitize.CHECKS["racecheck"])


def test_the_cases_that_are_named_risky_are_there(on_the_path):
    correctness, lce = (
        importlib.import_module("correctness"),
        importlib.import_module("lumi.kernels.linear_cross_entropy"),
    )
    cases = {case.name: case for make in correctness.OPERATORS.values() for case in make()}
    small = [name for name, case in cases.items() if case.small]
    assert [name for name in small if re.search(r"K=96 H=4 G=2 documents window=\d", name)]
    assert [name for name in small if re.search(r"decode.*page_size=\d", name)]
    assert [name for name in small if "norm rows=5 D=16384" in name]
    sizes = [
        tuple(map(int, re.search(r"N=(\d+) D=\d+ V=(\d+)", name).groups()))
        for name in cases
        if "entropy" in name
    ]
    assert {lce.tile_config(V, 2)["num_warps"] for _, V in sizes} == {4, 8, 16, 32}
    chunked = [
        name
        for name, (N, V) in zip((n for n in cases if "entropy" in n), sizes, strict=True)
        if lce.triton_chunk_rows(N, V, 2) < N
    ]
    assert [name for name in chunked if "float32 weight" in name]
    assert [name for name in chunked if "float32 weight" not in name]


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
    [
        ("wrong", "exceeds"),
        ("changes from run to run", "a second run gave other bits"),
        ("changes its input", "an input was changed"),
    ],
)
def test_correctness_finds_what_is(kind, message, device, monkeypatch, capsys):
    correctness = importlib.import_module("correctness")
    make = correctness._operands([correctness._draw(3, 4)], [correctness._draw(3, 4)])
    monkeypatch.setitem(
        correctness.OPERATORS,
        "bad",
        lambda: iter([correctness.Case("bad", spoilt(kind), lambda x: x * 1.0, make, small=True)]),
    )
    assert correctness.run("bad", (torch.float32,), torch.device(device), small=True) == 1
    assert message in capsys.readouterr().err


def test_sanitizer_is_left_out_where_there_is_none(monkeypatch, capsys):
    sanitize = importlib.import_module("sanitize")
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 0
    assert capsys.readouterr().out == "compute-sanitizer: left out, there is none here\n"


@pytest.mark.parametrize(
    ("codes", "memcheck", "racecheck", "code"),
    [
        ({"memcheck": 0, "racecheck": 0}, "clean", "clean", 0),
        ({"memcheck": 86, "racecheck": 0}, "found something", "clean", 1),
        ({"memcheck": 0, "racecheck": 86}, "clean", "found something, which fails nothing", 0),
        ({"memcheck": 0, "racecheck": 1}, "clean", "exit code 1", 1),
    ],
)
def test_sanitizer_fails_for_what_memcheck_finds(codes, memcheck, racecheck, code, monkeypatch, capsys):
    sanitize = importlib.import_module("sanitize")
    uncached = "os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'"
    program = f"import os, sys; sys.exit({codes}[sys.argv[1]] if {uncached} else 3)"
    monkeypatch.setattr(sanitize, "find_tool", lambda: "a tool")
    monkeypatch.setattr(
        sanitize, "command", lambda tool, check, operators: [sys.executable, "-S", "-c", program, check]
    )
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == code
    assert (
        capsys.readouterr().out
        == f"compute-sanitizer memcheck: {memcheck}\ncompute-sanitizer racecheck: {racecheck}\n"
    )


def test_one_benchmark_that_fails_or_hangs_is_reported():
    run_all = importlib.import_module("run_all")
    assert run_all.run_one([sys.executable, "-c", ""], 60) is None
    assert run_all.run_one([sys.executable, "-c", "raise SystemExit(1)"], 60) == "exit code 1"
    assert run_all.run_one([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == "not done after 0 s"


def test_what_hangs_is_ended_with_its_children(tmp_path):
    run_all = importlib.import_module("run_all")
    write_pid = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    child = f"import os, pathlib, time; {write_pid}; time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    assert run_all.run_one([sys.executable, "-S", "-c", program], 6) == "not done after 6 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} lives on")


def alive(pid):
    """Neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_subject_is_a_script_and_has_time():
    run_all = importlib.import_module("run_all")
    limits = run_all.GPU_SUBJECTS
    assert all((FOLDER / f"{subject}.py").exists() for subject in (*limits, *run_all.CPU_SUBJECTS))
    assert sum(run_all.CPU_SUBJECTS.values()) <= 840
    first, rest = list(limits)[:4], list(limits)[4:]
    assert set(first) == {"attention", "training_step", "linear_cross_entropy", "optimizer"}
    assert first[:2] == ["attention", "training_step"]
    for group in (first, rest):  # as benchmarks/README.md has them
        assert sum(limits[subject] for subject in group) <= 540
        assert f'ONLY="{" ".join(group)}"' in (FOLDER / "README.md").read_text()


def test_a_benchmark_that_is_not_begun_keeps_its_earlier_figures(tmp_path, monkeypatch, capsys):
    run_all = importlib.import_module("run_all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(run_all, "slug", lambda device: "gpu")
    monkeypatch.setattr(run_all, "SUBJECTS", run_all.GPU_SUBJECTS)
    monkeypatch.setattr(run_all, "run_one", lambda command, seconds: "exit code 9")
    record = {
        "claims": [],
        "failures": [],
        "left_out": [],
        "finished": True,
        "environment": {"device": "gpu", "date": "a day"},
    }
    for seconds, left in (("0", True), ("60", False)):
        path = tmp_path / "optimizer-gpu.json"
        path.write_text(json.dumps({"subject": "optimizer"} | record))
        monkeypatch.setattr(
            sys,
            "argv",
            ["run_all.py", "--only", "optimizer", "--seconds", seconds, "--output-dir", str(tmp_path)],
        )
        assert run_all.main() == 1
        assert path.exists() == left
        text = (tmp_path / "README-gpu.md").read_text()
        assert ("optimizer: not begun" in text) == ("optimizer: gpu, a day" in text) == left
        assert ("optimizer: exit code 9" in text) != left


def test_table(results):
    run_all = importlib.import_module("run_all")
    results.claim("fast", 1.3, at_least=1.25)
    results.claim("unknown", None, at_least=2.0)
    with results.case("case"):
        raise RuntimeError("it broke\nin two lines")
    killed = read(results)
    results.finish()
    finished = {**read(results), "subject": "attention"}
    text = run_all.table([killed, finished], {"optimizer": "not done after 60 s"})
    rows = text.split("\n\n")
    assert (
        rows[0].splitlines()[2:]
        == ["| fast | 1.300 | >= 1.25 | yes |", "| unknown | not measured | >= 2 | no |"] * 2
    )
    assert rows[1] == "optimizer: not done after 60 s"
    missing = set(run_all.SUBJECTS) - {"optimizer", "attention"}
    assert rows[2 : 2 + len(missing)] == [
        f"{subject}: not measured" for subject in run_all.SUBJECTS if subject in missing
    ]
    rest = rows[2 + len(missing) :]
    assert rest[0] == "subject: it was ended before it was done, so cases and claims are missing"
    assert rest[1:3] == [f"{name}, failed: case: RuntimeError: it broke" for name in ("subject", "attention")]
    assert [row.partition(":")[0] for row in rest[3:]] == ["subject", "attention"]


# --- machine code ---


def inspect_kernels(*arguments, before="pass"):
    """Run the script on these arguments, after a statement, in a process without the interpreter."""
    program = (
        f"import os, runpy, sys; sys.path.insert(0, {str(FOLDER)!r}); sys.argv[0] = 'inspect_kernels.py'; "
        f"{before}; runpy.run_path({str(FOLDER / 'inspect_kernels.py')!r}, run_name='__main__')"
    )
    pytest.importorskip("triton", reason="Triton is not installed here")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", ["3.6", ""])
def test_a_version_of_triton_that_is_not_supported_is_refused(version):
    result = inspect_kernels("--triton", version, "--kernel", "rope")
    assert result.returncode == 2
    assert f"argument --triton: invalid choice: {version!r}" in result.stderr.splitlines()[-1]


def test_another_triton_than_its_folder_says_is_refused(tmp_path):
    """The process that has the folder on its path does not start another one like it."""
    installed = pytest.importorskip("triton").__version__
    version = "3.6.0" if installed == "3.7.1" else "3.7.1"
    place = tmp_path / f"triton-{version}"
    (place / "triton").mkdir(parents=True)
    before = (
        "import pathlib, triton, triton_wheels; os.execve = None; "
        f"triton_wheels.BUILD = pathlib.Path({str(tmp_path)!r}); sys.path.append({str(place)!r})"
    )
    result = inspect_kernels("--triton", version, before=before)
    expected = f"{place} must hold Triton {version}, got {installed}; remove that folder\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_a_kernel_that_is_not_there_is_refused_briefly():
    result = inspect_kernels("--kernel", "nosuch")
    assert result.returncode == 2
    *_, line = result.stderr.splitlines()
    assert "--kernel must be part of a kernel's name, such as attention, " in line
    assert line.endswith("; got 'nosuch'")
    assert len(line) < 200


# A pool that does the work in this process, as if the user ended it after the first kernel.
INTERRUPTED = """
import concurrent.futures, signal, types
class Pool:
    __init__ = __exit__ = lambda *_, **__: None
    __enter__ = lambda self: self
    def map(self, *_):
        yield types.SimpleNamespace(kernel="rope 1", dtype="bf16", arch=90)
        signal.raise_signal(signal.SIGINT)
concurrent.futures.ProcessPoolExecutor = Pool
"""


def test_interrupted_inspection_ends_with_a_line():
    options = ("--kernel", "rope", "--arch", "90", "--dtype", "bf16")
    result = inspect_kernels(*options, before=f"exec({INTERRUPTED!r})")
    assert result.returncode == 130
    progress, end = result.stderr.splitlines()
    total = progress.split()[2].removesuffix(":")
    assert (progress, end) == (f"1 of {total}: rope 1, bf16, sm_90", f"interrupted after 1 of {total}")


# --- the first quarter of an hour on a GPU ---


@pytest.fixture
def first(on_the_path):
    return importlib.import_module("gpu_first")


def python_job(first, name, program, **environment):
    return first.Job(name, ("-S", "-c", program), tuple(environment.items()))


def test_a_stage_goes_on_when_a_job_fails_or_hangs(first, tmp_path):
    write_pid = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    child = f"import os, pathlib, time; {write_pid}; time.sleep(60)"
    begin = "import subprocess, sys; print('begun', flush=True)"
    hangs = f"{begin}; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    stage = first.Stage(
        [
            python_job(first, "fails", "print('one'); print('two'); raise SystemExit(3)"),
            python_job(
                first, "works", "import os; raise SystemExit(os.environ['WORD'] != 'given')", WORD="given"
            ),
            python_job(first, "hangs", hangs),
            python_job(first, "late", ""),
        ],
        workers=1,
        seconds=10,
    )
    outcomes = first.run_stage("stage", stage, tmp_path, time.monotonic() + 60, dict(os.environ))
    assert [outcome.job for outcome in outcomes] == ["fails", "works", "hangs", "late"]
    fails, works, hung, late = outcomes
    assert (fails.problem, fails.last_lines) == ("exit code 3", ["one", "two"])
    assert (works.problem, works.last_lines) == (None, [])
    assert hung.problem.startswith("not done after ")
    assert hung.last_lines == ["begun"]
    assert late.problem == "not begun: no time was left"
    assert (tmp_path / "stage-fails.txt").read_text() == "one\ntwo\n"
    pid = int((tmp_path / "pid").read_text())
    assert wait_for(lambda: not alive(pid))


def test_what_a_job_leaves_behind_is_ended(tmp_path):
    """A program that ends by itself, while one that it started goes on."""
    run_all = importlib.import_module("run_all")
    child = "import time; time.sleep(60)"
    program = (
        "import pathlib, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))"
    )
    assert run_all.run_one([sys.executable, "-S", "-c", program], 60) is None
    pid = int((tmp_path / "pid").read_text())
    assert wait_for(lambda: not alive(pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_job(number, tmp_path):
    """Jobs are sessions of their own, which a signal to the program does not reach."""
    child = (
        f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); "
    )
    job = f"first.Job('sleeps', ('-S', '-c', {child + 'time.sleep(60)'!r}))"
    program = (
        f"import os, sys, time; sys.path.insert(0, {str(FOLDER)!r}); import gpu_first as first; "
        "from pathlib import Path; first.end_with_me(); "
        f"first.run_stage('stage', first.Stage([{job}], 1, 60), Path({str(tmp_path)!r}), "
        "time.monotonic() + 60, dict(os.environ))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))
    finally:
        process.kill()
        process.wait()


def wait_for(condition, seconds=5):
    """Whether it holds within so many seconds."""
    return any(condition() or time.sleep(0.1) for _ in range(10 * seconds))


@pytest.mark.parametrize(
    ("broken", "seconds", "done", "missing"),
    [
        ("", 60, ["build", "smoke"], []),
        ("smoke", 60, ["build", "smoke"], []),
        ("build", 60, ["build"], ["smoke"]),
        ("", 1, [], ["build", "smoke"]),
    ],
)
def test_only_a_build_that_fails_stops_the_stages(broken, seconds, done, missing, first, tmp_path):
    wanted = {
        name: first.Stage(
            [python_job(first, name, f"print('{name} says'); raise SystemExit({name == broken})")], 2, 30
        )
        for name in ("build", "smoke")
    }
    state = first.begin(wanted, tmp_path, "a GPU", rehearse=False)
    first.first(wanted, state, tmp_path, seconds, dict(os.environ))
    assert (list(state["stages"]), state["missing"]) == (done, missing)
    if done:
        assert json.loads((tmp_path / "gpu_first.json").read_text()) == state
        text = (tmp_path / "gpu_first.md").read_text()
        assert f"| {done[-1]} |" in text
        assert (f"{broken} says" in text) == bool(broken)
        assert all(f"| {name} | | | not begun |" in text for name in missing)


def test_figures_of_another_day_are_not_reported(first, results, tmp_path):
    results.claim("fast", 1.3)
    state = first.begin({}, tmp_path, "a GPU", rehearse=False)
    time_of_figures = results.path.stat().st_mtime
    assert "| fast | 1.300 |" in first.write(state | {"began": time_of_figures - 1}, tmp_path)
    assert "fast" not in first.write(state | {"began": time_of_figures + 1}, tmp_path)


def play(first, name, output_dir, program="", rehearse=False):
    """Run a stage of one job."""
    wanted = {name: first.Stage([python_job(first, name, program)], 1, 30)}
    state = first.begin(wanted, output_dir, "gpu", rehearse)
    first.first(wanted, state, output_dir, 60, dict(os.environ))
    return (output_dir / "gpu_first.md").read_text()


def test_another_stage_in_the_same_folder_keeps_the_earlier_ones(first, tmp_path):
    about = {"environment": {"device": "gpu", "date": "a day", "threads": 1, "instructions": []}}
    claim = {"claim": "fast", "measured": 1.3, "at_least": None, "at_most": None, "met": None}
    record = about | {
        "claims": [claim],
        "finished": True,
        "failures": [],
        "left_out": [],
        "subject": "figures",
    }
    path = tmp_path / "figures-gpu.json"
    program = f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(record)!r})"
    assert "| fast | 1.300 |" in play(first, "figures", tmp_path, program)
    text = play(first, "build", tmp_path)
    assert list(json.loads((tmp_path / "gpu_first.json").read_text())["stages"]) == ["figures", "build"]
    assert "| fast | 1.300 |" in text
    assert "fast" not in play(first, "figures", tmp_path)  # done anew, and this time it measured nothing
    (tmp_path / "gpu_first.json").write_text("{")
    with pytest.raises(UserError, match="must be as this version"):
        play(first, "build", tmp_path)


def test_a_rehearsal_says_so_and_judges_nothing(first, results, tmp_path):
    results.claim("fast", 1.3, at_least=2)
    state = first.begin({}, tmp_path, "a CPU", rehearse=True) | {"began": 0}
    text = first.write(state, tmp_path)
    assert text.startswith("# A rehearsal, whose figures mean nothing, on a CPU, ")
    assert "| fast | 1.300 |  |  |" in text
    left = re.findall(r"(\w+): left for make gpu-bench", text)
    assert left == list(importlib.import_module("run_all").GPU_SUBJECTS)
    assert "not measured" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "1"], "--seconds must be at least 10, got 1"),
        (["--seconds", "nan"], "--seconds must be at least 10, got nan"),
        (["--output-dir", "{file}"], "--output-dir must be a folder that can be written to, got {file}"),
        (["--data", "{out}/none"], "--data must be a folder DIR that gpu_first_training.py data"),
        (["--data", "{out}"], "--data must be a folder DIR that gpu_first_training.py data"),
        (
            ["--stages", "training", "figures"],
            "--stages must have smoke and correctness too: training needs what they make, got training",
        ),
        (["--stages", "smoke", "training"], "--stages must have correctness too"),
    ],
)
def test_what_the_first_quarter_of_an_hour_cannot_do_is_said_before(
    arguments, message, first, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(first, "first", lambda *_: pytest.fail("begun"))
    places = {"file": tmp_path / "file", "out": tmp_path / "out"}
    with pytest.raises(UserError) as caught:
        first.main(["--rehearse", *(argument.format(**places) for argument in arguments)])
    assert str(caught.value).startswith(message.format(**places))
    assert list((tmp_path / "out").iterdir()) == []


def test_data_of_another_machine_comes_without_its_figures(first, tmp_path):
    for place in ("there/data", "there/losses_cpu", "here"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "there" / "gpu_first.json").write_text("{}")
    first._bring(tmp_path / "there", tmp_path / "here")
    first._bring(tmp_path / "here", tmp_path / "here")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["data", "losses_cpu"]
    assert list(first.chosen(["training"], tmp_path / "here", rehearse=True)) == ["training"]


def test_correctness_alone_needs_no_text(first, tmp_path):
    names = lambda *stages: {job.name for job in first.chosen(stages, tmp_path, True)["correctness"].jobs}
    assert names("smoke", "correctness") - names("correctness") == {"losses cpu"}


def test_an_interrupted_quarter_of_an_hour_reports_it(tmp_path):
    begun = tmp_path / "begun"
    job = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)"
    program = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import gpu_first as first; "
        f"stage = first.Stage([first.Job('job', ('-c', {job!r}))], 1, 60); "
        "first.stages = lambda *_, **__: {'smoke': stage}; "
        f"first.main(['--rehearse', '--output-dir', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for(begun.exists, 60)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == f"interrupted; wrote {tmp_path / 'gpu_first.md'}\n"
        assert process.returncode == 130
    finally:
        process.kill()
    text = (tmp_path / "gpu_first.md").read_text()
    assert "It was interrupted." in text
    assert "| smoke | | | interrupted |" in text


def test_the_stages_fit_into_twelve_minutes_and_check_every_operator(first, tmp_path, monkeypatch):
    correctness = importlib.import_module("correctness")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = first.stages(tmp_path, rehearse=False)
    assert sum(stage.seconds for stage in stages.values()) <= 720
    assert stages["build"].jobs[0].environment[0] == ("LUMI_CUDA_ARCHES", "90")
    assert set(first.OPERATORS) == set(correctness.OPERATORS)
    for name, stage in stages.items():
        assert name == "build" or all(Path(job.words[0]).exists() for job in stage.jobs)
        assert len({job.name for job in stage.jobs}) == len(stage.jobs)
        if name in ("training_step", "tuning", "training", "figures"):
            assert stage.workers == 1  # what is timed has the GPU to itself


def test_every_operator_has_a_case_of_a_real_models_size(on_the_path):
    correctness = importlib.import_module("correctness")
    for operator, cases in correctness.OPERATORS.items():
        assert any(case.production for case in cases()), operator


def test_a_part_of_the_cases(on_the_path, monkeypatch, device):
    correctness = importlib.import_module("correctness")
    names = []
    monkeypatch.setattr(correctness, "check", lambda case, *_: names.append(case.name))
    for part in range(3):
        dtypes = [torch.float32]
        assert correctness.run("swiglu", dtypes, torch.device(device), part=(part, 3)) == 0
    assert sorted(names) == sorted(case.name for case in correctness.OPERATORS["swiglu"]())


def test_the_nearest_tiles_differ_least(on_the_path):
    tuner = importlib.import_module("tune_attention")
    rows = tuner.candidates(90, 128)
    near = tuner.nearest(rows, rows[7], 6)
    changed = [sum(row[name] != rows[7][name] for name in row) for row in near]
    assert changed == [1] * 6


def test_data_of_another_machine_is_not_made_again(first, tmp_path):
    name_jobs = lambda: {
        job.name for stage in first.stages(tmp_path, rehearse=True).values() for job in stage.jobs
    }
    before = name_jobs()
    for folder, job in (("data", "data"), ("losses_cpu", "losses cpu")):
        assert job in name_jobs()
        (tmp_path / folder).mkdir()
        assert job not in name_jobs()
    assert before - name_jobs() == {"data", "losses cpu"}


def test_without_a_gpu_the_first_quarter_of_an_hour_is_not_begun(first, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_losses_of_the_gpu_and_the_cpu_are_compared(results, tmp_path):
    training = importlib.import_module("gpu_first_training")
    curves = {
        "train_16": [5.0, 4.0],
        "train_128": [5.0, 4.5],
        "losses_cpu": [5.0, 4.0],
        "losses_gpu": [5.0, 4.25],
    }
    for name, losses in curves.items():
        (tmp_path / name).mkdir()
        record = {"kind": "train", "tokens_per_second": 100.0}
        lines = [json.dumps({"step": step, "loss": loss} | record) for step, loss in enumerate(losses, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    training.judge_training(results)
    claims = {claim["claim"]: claim for claim in read(results)["claims"]}
    assert [claim["met"] for claim in claims.values() if "apart" in claim["claim"]] == [False]
    assert claims["train.py, tiny, 128 rows at a time: loss"]["measured"] == 4.5
    assert claims["train.py, tiny, 16 rows at a time: tokens_per_second"]["measured"] == 100.0


@pytest.mark.soak
def test_the_first_quarter_of_an_hour_is_rehearsed(first, tmp_path, monkeypatch):
    code = first.main(["--rehearse", "--output-dir", str(tmp_path)])
    state = json.loads((tmp_path / "gpu_first.json").read_text())
    problems = [job for stage in state["stages"].values() for job in stage["jobs"] if job["problem"]]
    assert (problems, state["missing"], code) == ([], [], 0)
    assert "self_cpu" in (tmp_path / "profile.txt").read_text().lower().replace(" ", "_")


def make(*arguments, **environment):
    """A make of its own, which knows nothing of the one that may have started these tests, nor of its
    flags."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=FOLDER.parent, env=inherited | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def gpu_check():
    """The commands of `make gpu-check`, in order."""
    return make("-n", "gpu-check").stdout


def test_make_gpu_runs_every_test_that_needs_one(gpu_check):
    (line,) = (line for line in gpu_check.splitlines() if " -m pytest tests/" in line)
    root = FOLDER.parent
    paths = [root / word for word in line.split() if word.startswith("tests/")]
    ignored = [root / word.removeprefix("--ignore=") for word in line.split() if word.startswith("--ignore=")]
    assert all(path.exists() for path in paths + ignored)
    marked = [
        path
        for path in (root / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    assert len(marked) >= 8
    within = lambda path, folders: any(path.is_relative_to(folder) for folder in folders)
    assert [path for path in marked if not within(path, paths) or within(path, ignored)] == []
    assert not within(root / "tests" / "test_cuda_code.py", paths)
    assert within(root / "tests" / "kernels" / "test_machine_code.py", ignored)


def test_make_gpu_looks_for_a_gpu_before_it_installs_anything(gpu_check, tmp_path):
    assert "cuda.is_available" in gpu_check.partition("pip")[0]
    python = tmp_path / "python"  # one without torch: it need not be imported to know that there is no GPU
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    rehearse = "; without one: python benchmarks/gpu_first.py --rehearse"
    for target, remedy in (("gpu-bench", ""), ("gpu-first", rehearse)):
        result = make(target, f"PYTHON={python}", CUDA_VISIBLE_DEVICES="")
        assert result.returncode == 2
        assert "pip" not in result.stdout
        need = f"make {target} needs a GPU and a CUDA build of torch; PYTHON is {sys.executable}{remedy}"
        assert result.stderr.splitlines()[0] == need


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ("none", ["gpu-check", "gpu-sanitize", "gpu-bench"]),
        ("gpu-check", ["gpu-check"]),
        ("gpu-sanitize", ["gpu-check", "gpu-sanitize", "gpu-bench"]),
        ("gpu-bench", ["gpu-check", "gpu-sanitize", "gpu-bench"]),
    ],
)
def test_make_gpu_measures_what_is_right_whatever_the_sanitizer_says(failing, expected, tmp_path):
    stand_in = tmp_path / "make"
    stand_in.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/log\n[ $1 != {failing} ]\n")
    stand_in.chmod(0o755)
    result = make("gpu", f"MAKE={stand_in}")
    assert (tmp_path / "log").read_text().split() == expected
    assert (result.returncode == 0) == (failing == "none")


def test_tuning_takes_a_tile_that_runs_and_writes_the_table(measure, device, tmp_path, monkeypatch, capsys):
    """A tile that cannot run is left out, the one in the table is timed as well, and the rest of the table
    stays as it was."""
    tuner, tiles = (
        importlib.import_module("tune_attention"),
        importlib.import_module("lumi.kernels.attention_tiles"),
    )
    shipped = json.loads(tiles.TABLE.read_text())
    table = json.loads(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "table", lambda: table)
    monkeypatch.setattr(tuner, "CHECKED", (1, 20, 1, 1))
    good, bad = (
        {"BLOCK_M": m, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "DESCRIPTORS": False} for m in (16, 24)
    )
    arch = str(tiles.architecture(torch.device(device)))
    best = tuner.tune("dq", 32, [bad, good], torch.device(device), DTYPE, (1, 20, 1, 1), rounds=1)
    printed = capsys.readouterr().out
    assert "dq K=32 24 16 4 2 False: left out" in printed
    assert [
        f"dq K=32 {' '.join(map(str, row.values()))}: backward" in printed
        for row in (shipped[arch]["64"]["dq"], good)
    ] == [True] * 2
    assert best in (shipped[arch]["64"]["dq"], good)
    tuner.write(tmp_path / "table.json")
    expected = {**shipped, arch: {**shipped[arch], "64": {**shipped[arch]["64"], "dq": best}}}
    assert json.loads((tmp_path / "table.json").read_text()) == expected
    table[arch]["64"]["dq"] = bad
    with pytest.raises(RuntimeError, match="dq K=32: no tile runs"):
        tuner.tune("dq", 32, [bad], torch.device(device), DTYPE, (1, 20, 1, 1), rounds=1)


def test_tuning_tries_limits_of_registers_where_another_block_would_fit(on_the_path):
    """65,536 registers for three blocks of 4 warps or two of 8; two stages of forward too."""
    tuner = importlib.import_module("tune_attention")
    limited = [row for row in tuner.candidates(90, 64) if "maxnreg" in row]
    blocks = {4: 3, 8: 2}
    for row in limited:
        block = row["maxnreg"] * 32 * row["num_warps"]
        assert block * blocks[row["num_warps"]] <= 65_536 < block * (blocks[row["num_warps"]] + 1)
    tall = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "DESCRIPTORS": True}
    assert {**tall, "maxnreg": 168} in limited
    assert not [row for row in tuner.candidates(90, 128) if "maxnreg" in row]


def test_the_table_is_written_as_it_was_read(on_the_path, tmp_path):
    tuner = importlib.import_module("tune_attention")
    tuner.write(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == importlib.import_module(
        "lumi.kernels.attention_tiles"
    ).TABLE.read_text()


# --- on a CPU, beside the peers ---


def timed(results, **spans):
    results.data["times"] = [
        {"case": "case", "candidate": name, "low": low, "microseconds": middle, "high": high}
        for name, (low, middle, high) in spans.items()
    ]


def test_the_fastest_peer_counts(results):
    timed(results, lumi=(9, 10, 11), slow=(29, 30, 31), fast=(19, 20, 21))
    results.compare("case", at_least=1.5)
    assert results.data["claims"][-1] == {
        "claim": "case: over fast",
        "measured": 2.0,
        "at_least": 1.5,
        "at_most": None,
        "met": True,
    }
    results.compare("case", at_least=4, peers=("slow",))
    assert (results.data["claims"][-1]["measured"], results.data["claims"][-1]["met"]) == (3.0, False)


def test_a_ratio_that_the_spread_swallows_is_not_claimed(results):
    timed(results, lumi=(9, 10, 11), fast=(11, 12, 13))
    results.compare("case", at_least=1.0)
    claim = results.data["claims"][-1]
    assert (claim["measured"], claim["met"]) == (None, None)
    assert "within the spread" in claim["claim"]


def test_without_a_peer_nothing_is_claimed(results):
    timed(results, lumi=(9, 10, 11))
    results.compare("case")
    assert results.data["claims"][-1]["measured"] is None


@pytest.fixture
def tiny(on_the_path, monkeypatch):
    """The CPU's benchmarks at a tiny shape; peers that are not installed here are left out."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    training = importlib.import_module("cpu_training")
    monkeypatch.setattr(training, "shipped_config", lambda name: MODEL)
    monkeypatch.setattr(training, "TOKENS", 16)
    monkeypatch.setattr(training, "DOCUMENT", 4)
    monkeypatch.setattr(training, "CASES", {"rows of 256": (8, False), "packed": (8, True)})
    return training


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_training_on_a_cpu(tiny, results, monkeypatch):
    monkeypatch.setattr(tiny, "peak_megabytes", lambda case, dtype, name: 1.0)
    tiny.run(results)
    assert results.data["failures"] == []
    timed = {(t["case"], t["candidate"]) for t in results.data["times"]}
    for dtype in dict.fromkeys(("float32", str(tiny.fastest_dtype()).removeprefix("torch."))):
        for candidate in ("lumi", "hf"):
            assert {(f"{dtype}, rows of 256", candidate), (f"{dtype}, packed", candidate)} <= timed
        assert (f"{dtype}, rows of 256", "gpt") in timed
    assert any(name.endswith("compiled") for _, name in timed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_another_loss_than_that_of_transformers_is_an_error(tiny, monkeypatch):
    real = tiny.peers.hf_llama
    monkeypatch.setattr(
        tiny.peers, "hf_llama", lambda model: real(type(model)(model.config, REFERENCE).init_weights(1))
    )
    with pytest.raises(RuntimeError, match=r"Lumi's loss is .*, that of transformers"):
        tiny.check("packed", torch.float32, REFERENCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_operators_on_a_cpu(tiny, results, monkeypatch):
    module = importlib.import_module("cpu_operators")
    monkeypatch.setattr(module, "shipped_config", lambda name: MODEL)
    monkeypatch.setattr(module, "SIZES", ("micro", "tiny"))
    for name, value in {"LENGTH": 16, "ROWS": 2, "LOSS_ROWS": 20, "DOCUMENT": 4}.items():
        monkeypatch.setattr(module, name, value)
    module.run(results)
    assert results.data["failures"] == []
    assert {t["candidate"] for t in results.data["times"]} == {"lumi", "eager", "compiled"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_generation_on_a_cpu(tiny, results, monkeypatch):
    module = importlib.import_module("cpu_generation")
    monkeypatch.setattr(module, "SHAPE", replace(MODEL, max_positions=64, tied_embeddings=True))
    monkeypatch.setattr(module, "NEW", 4)
    module.run(results)
    assert results.data["failures"] == []
    assert {t["candidate"] for t in results.data["times"]} == {"lumi", "hf"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_fine_tuning_on_a_cpu(tiny, results, monkeypatch):
    module = importlib.import_module("cpu_finetuning")
    monkeypatch.setattr(module, "SHAPE", replace(MODEL, tied_embeddings=True, max_positions=1024))
    monkeypatch.setattr(module, "CONVERSATIONS", 12)
    monkeypatch.setattr(module, "ROWS", 1)
    lumi = module.measure_here("lumi", torch.float32)
    assert lumi["rate"] > 0
    figures = {"lumi": {"rate": 3.0, "megabytes": 1.0}, "trl packed": {"rate": 1.0, "megabytes": 4.0}}

    def in_a_process(name, dtype):
        if name not in figures:
            raise RuntimeError("trl is not installed")
        return figures[name]

    monkeypatch.setattr(module, "in_a_process", in_a_process)
    module.run(results)
    assert [claim["measured"] for claim in results.data["claims"]] == [3.0, 0.25]
    assert len(results.data["left_out"]) == 2 * results.rounds
