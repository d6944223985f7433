"""What the compiler makes of each kernel, for GPUs that need not be here.

A child process without the interpreter compiles.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inspect_kernels.py"


# By default what training uses, on the two architectures whose code differs most. float16 differs from
# bfloat16 by names of instructions only.
CHOICES = {
    "largest sizes in bf16 on sm_80 and sm_90": (("bf16",), (80, 90), ["--largest"]),
    "all": (("fp32", "bf16"), (80, 89, 90, 100), []),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.soak] if name == "all" else []) for name in CHOICES],
)
def choice(request):
    return CHOICES[request.param]


@pytest.fixture(scope="module")
def reports(choice):
    dtypes, arches, options = choice
    command = [sys.executable, SCRIPT, "--json", "--dtype", *dtypes, "--arch", *map(str, arches), *options]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def names(reports):
    return [f"{r['kernel']} {r['dtype']} sm_{r['arch']}" for r in reports]


def test_every_dtype_and_architecture_is_there(reports, choice):
    dtypes, arches, _ = choice
    assert {r["arch"] for r in reports} == set(arches)
    assert {r["dtype"] for r in reports} == set(dtypes)
    kernels = {r["kernel"] for r in reports}
    expected = {"rms_norm_fwd", "rms_norm_bwd", "rms_norm_bwd_wide", "rope", "swiglu_fwd", "swiglu_bwd"}
    expected |= {"add_rms_norm_fwd", "add_rms_norm_bwd", "add_rms_norm_bwd_wide"}
    expected |= {"linear_cross_entropy", "linear_cross_entropy_rescale", "token_losses"}
    expected |= {"decode_attention", "decode_attention_paged", "decode_attention_prompt"}
    expected |= {"decode_attention_combine", "decode_window", "decode_window_prompt"}
    expected |= {"attention_fwd", "attention_delta", "attention_dkdv", "attention_dq"}
    assert {name.split()[0] for name in kernels} == expected
    assert len(reports) == len(set(names(reports))) == len(dtypes) * len(arches) * len(kernels)


def test_nothing_spills(reports):
    assert names(r for r in reports if r["stack_bytes"] or r["spill_instructions"]) == []


def test_shared_memory_fits(reports):
    assert names(r for r in reports if r["shared_bytes"] > r["shared_limit"]) == []


def test_memory_is_read_and_written_16_bytes_at_a_time(reports):
    assert names(r for r in reports if r["missing"]) == []


def test_no_float64_instructions(reports):
    assert names(r for r in reports if r["fp64_instructions"]) == []


def test_blocks_can_be_resident(reports):
    assert names(r for r in reports if not 0 < r["occupancy"] <= 1) == []


def test_refuses_to_run_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "TRITON_INTERPRET must be unset or 0" in result.stderr
