"""Runs pytest on another build of `lumi._csrc`: `python csrc_processes.py LIBRARY PYTEST_ARGUMENTS...`.

If the build has csrc/*.cu for the CPU, these do what csrc/*.cpp would do.
"""

import importlib.util
import sys

import pytest
import torch  # before the library: it must find its own libraries


def load(path):
    """The library at `path`, as `lumi._csrc`."""
    spec = importlib.util.spec_from_file_location("lumi._csrc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lumi._csrc"] = module
    import lumi

    lumi._csrc = module
    return module


def take_cuda(module):
    """Let the operators of csrc/*.cu stand in for those of csrc/*.cpp, on the same tensors. What they leave
    unwritten is NaN."""
    adamw_cuda, global_norm_cuda = module.adamw_cuda, module.global_norm_cuda
    unwritten = lambda size, dtype: torch.full((size,), torch.nan, dtype=dtype)

    class CountedArguments(module.AdamWArguments):
        def __init__(self, **given):
            super().__init__(**given)
            self.count = len(given["sizes"])

    def adamw(arguments, max_threads):
        scales = unwritten(4 * arguments.count, torch.float32)
        adamw_cuda(arguments, scales.data_ptr(), 0, 0)

    def global_norm(pointers, sizes, max_threads):
        partials = unwritten(module.global_norm_num_partials(sizes), torch.float64)
        norm = unwritten(1, torch.float64)
        global_norm_cuda(pointers, sizes, norm.data_ptr(), partials.data_ptr(), 0, 0)
        return norm.item()

    module.AdamWArguments, module.adamw, module.global_norm = CountedArguments, adamw, global_norm


if __name__ == "__main__":
    library = load(sys.argv[1])
    if library.has_cuda:
        take_cuda(library)
    sys.exit(pytest.main(sys.argv[2:]))
