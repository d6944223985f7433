"""The same run in every shape: trainings on 1, 2 and 4 processes, started by torchrun; `parallel_processes.py` is what runs in them.

How near is near: all arithmetic here is float32 (but where a test says otherwise), and the shapes differ in the order of its sums alone.
Measured, 20 steps move no loss of any shape by more than 2e-7, no gradient norm by 6e-8 and no gradient by 4e-7 of its largest value:
what float32's own resolution is, and what 1 process with other micro-batches has too. The bounds are some five times that.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ENVIRONMENT, merged

from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.config import UserError
from lumi.data.batches import BatchConfig, Batches, validation_batches
from lumi.data.token_store import TokenStore
from lumi.formats.hf_format import load_model, save_model
from lumi.host.tensor_files import load_tensors
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout, ParallelConfig
from lumi.training.metrics import read_metrics

LOSS, NORM, GRADIENT = 1e-6, 5e-7, 2e-6  # relative; of a gradient to its largest value
SHAPES = ["ddp", "fsdp", "tensor", "hybrid", "fsdp and tensor", "copies of tensor", "four"]
MODEL = {  # 385 rows and 33 do not divide by 2
    "vocab_size": 385,
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 66,
    "max_positions": 64,
    "qk_norm": True,
}
CONFIG = {
    "model": MODEL,
    "batches": {"sequence_length": 32, "batch_tokens": 512, "micro_batch_size": 2},
    # An eps far above the smallest gradients, whose rounding AdamW would otherwise blow up; a clip that is always at work.
    "optimizer": {
        "peak_lr": 0.003,
        "eps": 1e-5,
        "max_grad_norm": 0.5,
        "schedule": {"kind": "cosine", "warmup_steps": 4},
    },
    "num_steps": 20,
    "dtype": "float32",
    "validate_every": 10,
    "validation_tokens": 288,  # nine rows, which no number of processes shares evenly
    "save_every": 10,
    "preflight": False,
}
MUON = {"optimizer": {"kind": "muon", "peak_lr": 0.01}, "num_steps": 6}
LORA = {"model": None, "lora": {"rank": 4, "tokens": ["<s>"]}, "num_steps": 8}
NARROW = {"dtype": "bfloat16", "num_steps": 8}
FSDP, TENSOR = {"parallel": {"shard": 2}}, {"parallel": {"tensor": 2}}
CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def runs(store_dir, tokenizer, tokenizer_dir, tmp_path_factory):
    """The folder of all trainings, a subfolder each."""
    folder = tmp_path_factory.mktemp("runs")
    save_model(folder / "base", Transformer(ModelConfig(**MODEL), REFERENCE).init_weights(0), tokenizer)

    def job(name, *changes, resume=None, expect=0):
        config = CONFIG
        for change in changes:
            config = merged(change, config)
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config))
        arguments = [
            "--config",
            file,
            "--data-dirs",
            store_dir,
            "--tokenizer-dir",
            tokenizer_dir,
            "--device",
            "cpu",
        ]
        arguments += ["--model-path", folder / "base"] if config["model"] is None else []
        arguments += (
            ["--resume-from-checkpoint", folder / resume / "checkpoints" / "step-00000010"] if resume else []
        )
        return {
            "folder": str(folder / name),
            "arguments": [str(argument) for argument in arguments],
            "exit": expect,
        }

    _launch(
        folder,
        2,
        job("ddp"),
        job("fsdp", FSDP, CHECKPOINTING),
        job("fsdp from fsdp", FSDP, CHECKPOINTING, resume="fsdp"),
        job("tensor", TENSOR),
        job("ddp from tensor", resume="tensor"),
        job("muon ddp", MUON),
        job("muon fsdp", MUON, FSDP),
        job("muon tensor", MUON, TENSOR, CHECKPOINTING),
        job("lora fsdp", LORA, FSDP),
        job("lora tensor", LORA, TENSOR),
        job("bfloat16 ddp", NARROW),
        job("bfloat16 fsdp", NARROW, FSDP),
        job("bfloat16 fsdp wide", NARROW, {"parallel": {"shard": 2, "reduce_dtype": "float32"}}),
        job("bfloat16 tensor", NARROW, TENSOR),
        *(job(name, changes, expect=2) for name, (changes, _) in REFUSED.items()),
    )
    _launch(
        folder,
        1,
        job("alone"),
        job("alone from fsdp", resume="fsdp"),
        job("muon alone", MUON),
        job("lora alone", LORA),
        job("bfloat16 alone", NARROW),
    )
    _launch(
        folder,
        4,
        job("hybrid", FSDP),
        job("fsdp and tensor", {"parallel": {"shard": 2, "tensor": 2}}, CHECKPOINTING),
        job("hybrid from alone", FSDP, resume="alone"),
        job("copies of tensor", {"parallel": {"replicate": 2, "tensor": 2}}),
        job("four"),
        job("four from four", resume="four"),
    )
    return folder


def _launch(folder, size, *jobs):
    """Do trainings one after the other on `size` processes."""
    file = folder / f"jobs of {size}.json"
    file.write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    script = Path(__file__).parents[1] / "processes" / "parallel_processes.py"
    command = [sys.executable, *launcher, str(script), str(file)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


def records(folder, kind, *names):
    found = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]
    return [tuple(record[name] for name in names) if len(names) > 1 else record[names[0]] for record in found]


def observed(folder):
    """What each process saw, by rank."""
    files = sorted(folder.glob("observed-*.json"))
    return [SimpleNamespace(**json.loads(file.read_text())) for file in files]


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_those_of_one_process(shape, runs):
    one, other = runs / "alone", runs / shape
    losses = records(one, "train", "loss")
    assert losses[-1] < losses[0] - 1
    assert records(other, "train", "loss") == pytest.approx(losses, rel=LOSS)
    assert records(other, "train", "gradient_norm") == pytest.approx(
        records(one, "train", "gradient_norm"), rel=NORM
    )
    assert records(other, "train", "step", "targets", "lr") == records(one, "train", "step", "targets", "lr")
    assert len(losses) == 20
    expected, got = (load_tensors(folder / "gradients.safetensors") for folder in (one, other))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= GRADIENT * gradient.abs().max(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_validation_figures_are_those_of_one_process(shape, runs):
    one, other = runs / "alone", runs / shape
    assert records(other, "validation", "step", "tokens", "bytes") == records(
        one, "validation", "step", "tokens", "bytes"
    )
    for figure in ("loss", "bits_per_byte"):
        assert records(other, "validation", figure) == pytest.approx(
            records(one, "validation", figure), rel=LOSS
        )


def test_the_processes_shares_are_uneven(store_dir):
    """What the tests above depend on: targets, in nearly all steps, and the rows of validation, differ between processes."""
    store, config = TokenStore.open(store_dir), BatchConfig(**CONFIG["batches"])
    batches = Batches([store.split("train")], None, config, 0)
    for size in (2, 4):
        rows = config.rows // size
        counts = [
            {batches.rows(step, rank * rows, (rank + 1) * rows).num_targets for rank in range(size)}
            for step in range(1, 21)
        ]
        assert sum(len(different) > 1 for different in counts) >= 15
        last = [
            list(validation_batches(store.split("validation"), config, rank, size, 288))[-1]
            for rank in range(size)
        ]
        assert [batch.num_targets > 0 for batch in last] == [True] + [False] * (size - 1)


@pytest.mark.parametrize(
    "shape", ["alone", *SHAPES, "muon fsdp", "muon tensor", "lora fsdp", "lora tensor", "bfloat16 fsdp"]
)
def test_the_norm_is_that_of_all_gradients_put_together(shape, runs):
    """In float64, before clipping, in three steps; and every process has the same."""
    seen = observed(runs / shape)
    assert all(process.norms == seen[0].norms for process in seen)
    assert len(seen[0].norms) == 3
    for norm, exact in seen[0].norms:
        assert norm == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "micro_steps", "gradients"),
    [
        ("ddp", 4, {"c10d.allreduce_": 1}),
        ("fsdp", 4, {"c10d._reduce_scatter_base_": 3}),  # two layers and the rest
        ("hybrid", 2, {"c10d._reduce_scatter_base_": 3, "c10d.allreduce_": 3}),
        ("fsdp and tensor", 4, {"c10d._reduce_scatter_base_": 3}),
    ],
)
def test_gradients_are_reduced_in_the_last_micro_step_only(shape, micro_steps, gradients, runs):
    for process in observed(runs / shape):
        *inner, last = process.collectives
        assert len(inner) == micro_steps - 1
        assert {name: last.get(name, 0) for name in gradients} == gradients
        assert not any(name in micro_step for micro_step in inner for name in gradients)


def test_what_a_process_holds_is_its_share(runs):
    for name, sharers in (
        ("alone", 1),
        ("ddp", 1),
        ("fsdp", 2),
        ("tensor", 2),
        ("hybrid", 2),
        ("fsdp and tensor", 4),
    ):
        for process in observed(runs / name):
            assert process.all_states == 2 * process.all_parameters == 2 * ModelConfig(**MODEL).num_parameters
            for own, whole in (
                (process.own_parameters, process.all_parameters),
                (process.own_states, process.all_states),
            ):
                assert own == pytest.approx(
                    whole / sharers, rel=0.03
                )  # odd rows; and norms, which tensor parallelism does not cut


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor"])
def test_muon(kind, runs):
    """Newton-Schulz in bfloat16 answers a gradient's last bit with its own, and losses part faster. Measured, after six steps 2 x DDP, with
    torch's own Muon, is 1.4e-5 from one process, FSDP2 as far, tensor parallelism 8e-6. That the update is the same is test_muon.py's."""
    one, other = (records(runs / name, "train", "loss") for name in ("muon alone", f"muon {kind}"))
    assert one[-1] < one[0] - 0.5
    assert other == pytest.approx(one, rel=1e-4)
    assert other[:3] == pytest.approx(one[:3], rel=LOSS)


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_lora_with_rows_of_tokens(kind, runs):
    one, other = runs / "lora alone", runs / f"lora {kind}"
    losses = records(one, "train", "loss")
    assert losses[-1] < losses[0] - 0.03
    assert records(other, "train", "loss") == pytest.approx(losses, rel=LOSS)
    assert records(other, "train", "gradient_norm") == pytest.approx(
        records(one, "train", "gradient_norm"), rel=NORM
    )
    expected, got = (load_tensors(folder / "final" / "adapter_model.safetensors") for folder in (one, other))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 5e-5 * tensor.abs().max(), name  # measured: 8e-6
    rows = [name for name in got if "lora" not in name]
    assert len(rows) == 2  # of the embedding and of lm_head
    assert all(got[name].any() for name in rows)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp wide", "tensor"])
def test_bfloat16_computes_on_float32_masters(kind, runs):
    seen = observed(runs / f"bfloat16 {kind}")
    tensor = "Tensor" if kind == "ddp" else "DTensor"
    for process in seen:
        assert process.parameters == process.states == [f"{tensor} float32"]
    one, other, wide = (
        records(runs / name, "train", "loss") for name in ("bfloat16 alone", f"bfloat16 {kind}", "alone")
    )
    assert other == pytest.approx(one, rel=5e-4)  # measured: 1e-4
    assert other[:4] != pytest.approx(
        wide[:4], rel=2 * LOSS
    )  # as long as both warm up, that is bfloat16's doing


def test_reduce_dtype_is_that_of_the_sums_between_processes(runs):
    """A sum of two that went through bfloat16 is a bfloat16 number; one made in float32 seldom is."""
    kinds = {
        "bfloat16 alone": False,
        "bfloat16 ddp": True,
        "bfloat16 fsdp": True,
        "bfloat16 fsdp wide": False,
        "fsdp": False,
    }
    assert {name: observed(runs / name)[0].bfloat16_gradients for name in kinds} == kinds


@pytest.mark.parametrize(
    ("resumed", "origin", "uninterrupted"),
    [
        ("fsdp from fsdp", "fsdp", "fsdp"),
        (
            "four from four",
            "four",
            "four",
        ),  # more than two gradients have an order of sums, which DDP settles by its first backward
        ("alone from fsdp", "fsdp", "alone"),
        ("hybrid from alone", "alone", "alone"),
        ("ddp from tensor", "tensor", "tensor"),
    ],
)
def test_resumed_in_another_shape(resumed, origin, uninterrupted, runs):
    figures = "step", "loss", "gradient_norm", "lr"
    expected, got = (
        records(runs / uninterrupted, "train", *figures)[10:],
        records(runs / resumed, "train", *figures),
    )
    assert [step for step, *_ in got] == list(range(11, 21))
    assert (
        f"resumed from {runs / origin / 'checkpoints' / 'step-00000010'} at step 10"
        in (runs / f"{resumed}.out-0").read_text()
    )
    if origin == uninterrupted == resumed.split()[0]:
        assert got == expected  # bit for bit
        assert (runs / resumed / "final" / "model.safetensors").read_bytes() == (
            runs / origin / "final" / "model.safetensors"
        ).read_bytes()
    else:
        assert [value for record in got for value in record] == pytest.approx(
            [value for record in expected for value in record], rel=LOSS
        )


@pytest.mark.parametrize("shape", ["alone", *SHAPES])
def test_final_is_the_last_checkpoint_bit_for_bit(shape, runs):
    saved = open_checkpoint(runs / shape / "checkpoints" / "step-00000020").tensors("model")
    final = load_model(runs / shape / "final", REFERENCE).state_dict()
    assert final.keys() == saved.keys()
    assert all(torch.equal(final[name], saved[name]) for name in final)
    start, last = (
        open_checkpoint(runs / shape / "checkpoints" / f"step-000000{step}").tensors("model")
        for step in (10, 20)
    )
    assert not any(torch.equal(start[name], last[name]) for name in last)


def test_final_of_four_processes_loads_in_transformers(runs):
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        runs / "fsdp and tensor" / "final", output_loading_info=True
    )
    assert not any(loading.values())
    tokens = torch.arange(40)[None]
    ours = load_model(runs / "fsdp and tensor" / "final", REFERENCE)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, ours.logits(ours.hidden(tokens)), rtol=1e-4, atol=1e-4
        )


REFUSED = {
    "sides": (
        {"parallel": {"replicate": 1, "shard": 3}},
        "parallel: replicate 1 x shard 3 x tensor 1 = 3 must be the 2 processes of this run; mend the config, or torchrun --nproc-per-node",
    ),
    "heads": (
        {**TENSOR, "model": {"num_kv_heads": 1}},
        "parallel.tensor must divide model.num_kv_heads = 1, got 2",
    ),
    "length": (
        {**TENSOR, "batches": {"sequence_length": 33, "batch_tokens": 66}},
        "parallel.tensor must divide batches.sequence_length = 33, got 2",
    ),
    "rows": (
        {**FSDP, "batches": {"batch_tokens": 192}},
        "batches.batch_tokens must be a multiple of sequence_length x micro_batch_size x processes = 32 x 2 x 2, got 192",
    ),
    "dora": (
        {**TENSOR, **LORA, "lora": {"dora": True}},
        "parallel.tensor must be 1 with lora.dora (lengths of rows that no process has whole), got 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_once_with_the_numbers(name, runs):
    """Each process has left with exit code 2, which `parallel_processes.py` has seen to."""
    assert (runs / f"{name}.err-0").read_text() == f"error: {REFUSED[name][1]}\n"
    assert (runs / f"{name}.err-1").read_text() == ""
    assert not (runs / name).exists()


@pytest.mark.parametrize(
    ("sides", "processes", "layout"),
    [
        ({}, 8, (8, 1, 1)),
        ({"shard": 4}, 8, (2, 4, 1)),
        ({"replicate": 1, "shard": -1}, 8, (1, 8, 1)),
        ({"replicate": 2, "shard": -1, "tensor": 2}, 16, (2, 4, 2)),
        ({"replicate": 3, "shard": 2, "tensor": -1}, 12, (3, 2, 2)),
        ({"replicate": 2, "shard": 3, "tensor": 2}, 12, (2, 3, 2)),
        ({"shard": 1}, 1, (1, 1, 1)),
    ],
)
def test_layouts(sides, processes, layout):
    assert ParallelConfig(**sides).layout(processes) == layout == Layout(*layout)
    assert Layout(*layout).data == layout[0] * layout[1]


@pytest.mark.parametrize(
    ("sides", "processes", "message"),
    [
        ({"shard": 3}, 8, r"replicate -1 x shard 3 x tensor 1 = 3 must divide the 8 processes"),
        (
            {"replicate": 2, "shard": 2, "tensor": 1},
            8,
            r"replicate 2 x shard 2 x tensor 1 = 4 must be the 8 processes",
        ),
        ({"shard": 16}, 8, r"= 16 must divide the 8 processes"),
    ],
)
def test_layouts_that_do_not_come_out_even(sides, processes, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**sides).layout(processes)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"shard": 0}, "shard must be at least 1, or -1 for the rest, got 0"),
        ({"tensor": -2}, "tensor must be at least 1, or -1 for the rest, got -2"),
        ({"shard": -1}, "must leave the rest to one side at most, got replicate, shard, tensor = -1, -1, 1"),
    ],
)
def test_sides_that_mean_nothing(sides, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**sides)
