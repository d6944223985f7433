"""The kernels of csrc/*.cu on the CPU, one fiber per thread, pass the tests of csrc/*.cpp under sanitizers.

AddressSanitizer and UndefinedBehaviorSanitizer find accesses out of bounds and at wrong addresses,
ThreadSanitizer finds races.
"""

import functools
import os
import subprocess

import pytest
from cuda_on_cpu import CSRC, DEVICE, compile_host, compile_kernels, link
from sanitizers import ADDRESS, OPTIONS, ROOT, THREAD, need, run_tests

TESTS = [ROOT / "tests" / "kernels" / name for name in ("test_adamw.py", "test_global_norm.py")]
ALL = "not number_of_threads"  # of the CPU's
QUICK = {
    # torch.testing, which some use, takes seconds to import under a sanitizer.
    ADDRESS: f"{ALL} and not test_many and not papers_algorithm and not weight_decay",
    THREAD: "test_parity or exact_sum",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Objects without a sanitizer, by their names."""
    need(ADDRESS)
    return {path.stem: path for path in compile_host(tmp_path_factory.mktemp("host"))}


@pytest.fixture(scope="module")
def run_fault(host, tmp_path_factory):
    """run_fault(sanitizer, name) -> exit code and output of faults.cu."""

    @functools.cache
    def program(sanitizer):
        need(sanitizer)
        folder = tmp_path_factory.mktemp("faults")
        objects = compile_kernels(folder, sanitizer, [DEVICE / "faults.cu"])
        return link(folder / "faults", sanitizer, [*objects, host["threads"]])

    def run(sanitizer, name):
        command = [program(sanitizer), name]
        done = subprocess.run(command, env=os.environ | OPTIONS, capture_output=True, text=True)
        output = done.stdout + done.stderr
        if "unexpected memory mapping" in output:
            pytest.skip("this system spreads addresses too far for ThreadSanitizer")
        return done.returncode, output

    return run


@pytest.fixture(scope="module")
def build(host, run_fault, tmp_path_factory):
    """build(sanitizer) -> `lumi._csrc` with its CUDA files for the CPU."""

    @functools.cache
    def build(sanitizer, change=str):
        code, output = run_fault(sanitizer, "none")
        assert code == 0, output
        folder = tmp_path_factory.mktemp("library")
        kernels = compile_kernels(folder, sanitizer, sorted(CSRC.glob("*.cu")), change)
        return link(folder / "_csrc.so", sanitizer, [*kernels, *host.values()])

    return build


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernels_without_a_fault(run_fault, sanitizer):
    code, output = run_fault(sanitizer, "none")
    assert code == 0
    assert "no error, right" in output


@pytest.mark.parametrize(
    ("name", "sanitizer", "message"),
    [
        ("read beyond", ADDRESS, "heap-buffer-overflow"),
        ("write beyond", ADDRESS, "heap-buffer-overflow"),
        ("shared beyond", ADDRESS, "out of bounds for type 'float [64]'"),
        ("misaligned", ADDRESS, "misaligned address"),
        ("barrier of some", ADDRESS, "threads wait for others that never come"),
        ("shuffle of some", ADDRESS, "threads wait for others that never come"),
        ("no barrier", ADDRESS, "no error, wrong"),
        ("no barrier", THREAD, "data race"),
        ("shuffle as barrier", THREAD, "data race"),
        ("blocks collide", THREAD, "data race"),
        ("block too large", ADDRESS, "invalid configuration argument"),
    ],
)
def test_faults_are_found(run_fault, name, sanitizer, message):
    code, output = run_fault(sanitizer, name)
    assert code != 0
    assert message in output


def check(library, sanitizer, selected):
    result = run_tests(library, sanitizer, *TESTS, "-k", selected)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernels_pass_the_tests_of_the_cpus_operators(build, sanitizer):
    check(build(sanitizer), sanitizer, QUICK[sanitizer])


@pytest.mark.soak
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_all_of_them(build, sanitizer):
    check(build(sanitizer), sanitizer, ALL)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("old", "new", "sanitizer", "message"),
    [
        ("__syncthreads();", "", THREAD, "data race"),
        ("partials[blockIdx.x] = sum", "partials[0] = sum", THREAD, "data race"),
        ("aligned && i + 4 <= count", "aligned", ADDRESS, "heap-buffer-overflow"),
        ("aligned && i + 4 <= count", "i + 4 <= count", ADDRESS, "misaligned address"),
    ],
)
def test_faults_in_the_norms_kernels_are_found(build, old, new, sanitizer, message):
    assert old in (CSRC / "global_norm.cu").read_text()
    library = build(sanitizer, lambda source: source.replace(old, new))
    result = run_tests(library, sanitizer, TESTS[1], "-k", "exact_sum or where_the_tensors_lie")
    assert result.returncode != 0
    assert message in result.stdout
