"""Without Triton: references work, and a kernel says why it cannot be launched."""

import subprocess
import sys

WITHOUT_TRITON = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import torch
from lumi.kernels.bundle import REFERENCE, select
from lumi.kernels.rms_norm import rms_norm
assert select("auto", "cpu", 64, torch.float16) is REFERENCE
REFERENCE.rms_norm(torch.ones(2, 4), torch.ones(4))
by_name = lambda: select("triton", "cpu", 64, torch.float32)
launched = lambda: rms_norm(torch.ones(2, 4), torch.ones(4))
for attempt in (by_name, launched):
    try:
        attempt()
    except ValueError as error:
        print(error)
"""


def test_without_triton_the_references_work_and_kernels_say_so():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "kernels must be 'reference' where Triton is not installed, got 'triton' on cpu"
    assert (
        second
        == "kernels must be 'reference' on a machine without Triton, got a launch of _rms_norm_fwd_kernel"
    )
