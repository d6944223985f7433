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


OLDER = "3.6.0"  # what machines with GPUs have beside torch 2.11

# By default what training uses, on the two architectures whose code differs most. float16 differs from
# bfloat16 by names of instructions only.
CHOICES = {
    "largest sizes in bf16 on sm_80 and sm_90": (("bf16",), (80, 90), ["--largest"]),
    "all": (("fp32", "bf16"), (80, 89, 90, 100), []),
    f"all, Triton {OLDER}": (("fp32", "bf16"), (80, 89, 90, 100), ["--triton", OLDER]),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.soak] if "all" in name else []) for name in CHOICES],
)
def choice(request):
    return CHOICES[request.param]


@pytest.fixture(scope="module")
def reports(choice):
    dtypes, arches, options = choice
    command = [sys.executable, SCRIPT, "--json", "--dtype", *dtypes, "--arch", *map(str, arches), *options]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "must be a version that pip can install" in result.stderr:
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def names(reports):
    return [f"{r['kernel']} {r['dtype']} sm_{r['arch']}" for r in reports]


def test_every_dtype_and_architecture_is_there(reports, choice):
    dtypes, arches, options = choice
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
    if OLDER in options:
        assert {r["triton"] for r in reports} == {OLDER}
    assert len(reports) == len(set(names(reports))) == len(dtypes) * len(arches) * len(kernels)


def test_nothing_spills(reports):
    """But for float32 under the older version, whose products are for checks and not for speed: there ptxas
    takes few registers, and sets aside some bytes whatever the tile."""
    strict = [r for r in reports if (r["dtype"], r["triton"]) != ("fp32", OLDER)]
    assert names(r for r in strict if r["stack_bytes"] or r["spill_instructions"]) == []
    assert names(r for r in reports if r["stack_bytes"] > 32) == []


def test_shared_memory_fits(reports):
    assert names(r for r in reports if r["shared_bytes"] > r["shared_limit"]) == []


def test_memory_is_read_and_written_16_bytes_at_a_time(reports):
    assert names(r for r in reports if r["missing"]) == []


def test_no_float64_instructions(reports):
    assert names(r for r in reports if r["fp64_instructions"]) == []


def test_blocks_can_be_resident(reports):
    assert names(r for r in reports if not 0 < r["occupancy"] <= 1) == []


def test_products_of_attention_and_loss_are_wide(reports):
    """An HGMMA narrower than 32 columns takes as long as one of 32."""
    judged = [
        r for r in reports if r["kernel"].startswith(("attention", "linear_cross_entropy", "token_losses"))
    ]
    assert len({r["kernel"] for r in judged}) >= 6
    assert names(r for r in judged if r["narrow_products"]) == []


def test_copies_wait_for_the_products_that_read_what_they_overwrite(reports):
    """A wait for the products, then a barrier among the warps, then the copy."""
    assert [line for r in reports for line in r["unordered_copies"]] == []


def test_no_operand_is_overwritten_while_a_product_reads_it(reports):
    assert [line for r in reports for line in r["overwritten_operands"]] == []


def test_main_loops_are_found(reports):
    """The gates and the estimate look at loops: a parser that finds none would pass everything."""
    attention = [r for r in reports if r["arch"] == 90 and r["dtype"] == "bf16" and r["hgmma"]]
    kernels = {r["kernel"].split()[0] for r in attention}
    assert kernels >= {"attention_fwd", "attention_dkdv", "attention_dq", "decode_attention_prompt"}
    for r in attention:
        assert r["ldgsts"] + r["utmaldg"] > 0, r["kernel"]
        assert r["mufu"] > 0, r["kernel"]
        assert r["instructions"] in r["loops"], r["kernel"]


def test_every_kernel_for_sm_90_has_an_estimate(reports):
    for r in reports:
        if r["arch"] != 90 or r["dtype"] == "fp32":
            assert r["estimate"] is None
        else:
            shares = [r["estimate"][share] for share in ("of_products", "of_memory")]
            assert 0 < max(shares) <= 1, r["kernel"]
            assert (shares[0] > 0) == (r["mma_instructions"] > 0), r["kernel"]


def test_a_version_that_pip_does_not_have_is_refused(tmp_path):
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nowhere"}
    program = (
        f"import pathlib, triton_wheels as t; t.BUILD = pathlib.Path({str(tmp_path)!r}); t.folder('0.0.1')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "--triton must be a version that pip can install, got '0.0.1'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_refuses_to_run_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "TRITON_INTERPRET must be unset or 0" in result.stderr
