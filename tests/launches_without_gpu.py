"""Launchers as on a GPU without one: they run on fake tensors of any size, and every launch is judged.

The tensors are of the CPU: torch without CUDA cannot run backward on fake tensors of CUDA. What launchers ask
about their device is answered as for an H200.

- Triton's own binder takes the arguments, so what a GPU would refuse is refused here.
- CUDA's limits of grids, and the rules of `cuTensorMapEncodeTiled` that `TensorDescriptor` does not check.
- Programs from the corners of the grid run in the interpreter: each address must lie in its tensor, and no
  integer may overflow. There is no data: floats read as zero, integers as the most that they may be.
"""

import importlib
import inspect
import operator
import pkgutil
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import interpreted_memory
import numpy as np
import pytest
import torch
import triton.language as tl
from interpreted_memory import Memory, bound_arguments, tensors_in
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterOptions, TensorHandle
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

import lumi.kernels

# What a launcher asks about its tensors' device.
ASK_THE_DEVICE = (
    ("rms_norm", "_max_programs"),
    ("linear_cross_entropy", "_max_programs"),
    ("decode_attention", "_wanted_programs"),
    ("attention", "architecture"),
)
H200 = SimpleNamespace(multi_processor_count=132)
REACH = 300
_LIMITS = (2**31 - 1, 65_535, 65_535)  # of a grid, by dimension


class Unbacked(Memory):
    """Addresses without memory. `values` has what some integer tensors hold, repeated."""

    def __init__(self, kernel: str, values: dict[str, np.ndarray]):
        super().__init__(kernel)
        self.values = values

    def load(self, pointers: np.ndarray, mask: np.ndarray, rest: np.ndarray) -> np.ndarray:
        result = np.array(np.broadcast_to(rest, pointers.shape))
        for argument, offsets in self.find("reads", pointers, mask):
            contents = self.values.get(argument.name, np.zeros(1))
            result[mask] = contents[offsets // argument.tensor.element_size() % len(contents)]
        return result

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        for _ in self.find("writes to", pointers, mask):
            pass


class Launches:
    """Every launch since `install`: its kernel and grid."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[int, ...]]] = []
        self.memory = Unbacked("", {})

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Until `monkeypatch` is undone, operators on fake tensors launch here."""
        monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H200)
        monkeypatch.setattr("lumi.kernels.native._capability", lambda _: (9, 0))
        for module, name in ASK_THE_DEVICE:
            ask = inspect.unwrap(getattr(importlib.import_module(f"lumi.kernels.{module}"), name))
            answer = lambda _, *rest, ask=ask: ask(torch.device("cuda", 0), *rest)
            monkeypatch.setattr(f"lumi.kernels.{module}.{name}", answer)
        monkeypatch.setattr(FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.element_size())
        for op in custom_operators():  # their fakes allocate, their launchers also launch
            monkeypatch.setattr(op, "_abstract_fn", op._init_fn)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", InterpreterOptions(debug=True))
        monkeypatch.setattr(
            InterpretedFunction, "run", lambda kernel, *args, **kwargs: self.launch(kernel, args, **kwargs)
        )
        interpreted_memory.replace_accesses(monkeypatch, lambda: self.memory)

    def launch(
        self, kernel: InterpretedFunction, args: tuple, grid: tuple[int, ...], warmup: bool, **kwargs: Any
    ) -> None:
        name, grid = kernel.__name__, (*grid, *(1,) * (3 - len(grid)))
        self.made.append((name, grid))
        check_grid(name, grid)
        arguments = bound_arguments(kernel.fn, args, kwargs)
        bind(kernel, args, kwargs)
        for parameter, value in arguments.items():
            if isinstance(value, TensorDescriptor):
                check_descriptor(f"{name}: {parameter}", value)
        self._run(kernel, arguments, grid)

    def _run(self, kernel: InterpretedFunction, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        """The programs at the corners of the grid, and one inside."""
        self.memory = Unbacked(kernel.__name__, most(arguments))
        builder, scope = interpreter.interpreter_builder, interpreter._patch_lang(kernel.fn)
        try:
            constant = interpreter.GridExecutor(kernel.fn, kernel.arg_names, grid).constexprs
            converted = {
                name: value if name in constant else self._convert(name, value)
                for name, value in arguments.items()
            }
            builder.set_grid_dim(*grid)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(kernel.fn.__globals__, "range", typed_range)
                for index in {(0, 0, 0), tuple(n - 1 for n in grid), tuple(n * 2 // 3 for n in grid)}:
                    builder.set_grid_idx(*index)
                    kernel.rewrite()(**converted)
        finally:
            scope.restore()

    def _convert(self, name: str, value: Any) -> Any:
        """What the interpreter makes of an argument, at an address of this memory."""
        with pytest.MonkeyPatch.context() as patch:
            convert = interpreter._implicit_cvt

            def with_address(value: Any) -> Any:
                result = convert(value)
                if isinstance(value, Tensor):
                    result.handle.data = np.array([self.memory.add(name, value)], np.uint64)
                return result

            patch.setattr(interpreter, "_implicit_cvt", with_address)
            return with_address(value)


def typed_range(*bounds: Any) -> Iterable[Any]:
    """`range` as the compiler reads it: the counter has the widest type of the bounds.

    The interpreter counts in Python's numbers, and an int64 counter would look like one of 32 bits.
    """
    numbers = range(*map(operator.index, bounds))
    types = {bound.dtype for bound in bounds if isinstance(bound, tl.tensor)}
    if not types:
        return numbers
    kind = tl.int64 if tl.int64 in types else tl.int32
    dtype = interpreter._get_np_dtype(kind)
    return (tl.tensor(TensorHandle(np.array([n], dtype), kind), kind) for n in numbers)


def custom_operators() -> list[CustomOpDef]:
    """All that are registered in `lumi.kernels`."""
    modules = [
        importlib.import_module(f"lumi.kernels.{found.name}")
        for found in pkgutil.iter_modules(lumi.kernels.__path__)
    ]
    values = (getattr(value, "opaque", value) for module in modules for value in vars(module).values())
    return [value for value in values if isinstance(value, CustomOpDef)]


def check_grid(kernel: str, grid: tuple[int, ...]) -> None:
    """CUDA's limits. The product has one too: Triton's launcher multiplies the dimensions as 32-bit integers
    and launches nothing, without a word, unless that is positive."""
    assert all(1 <= n <= most for n, most in zip(grid, _LIMITS, strict=True)), f"{kernel}: grid {grid}"
    assert np.prod(grid, dtype=object) <= _LIMITS[0], f"{kernel}: grid {grid} has too many programs"


def bind(kernel: InterpretedFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Triton's own binding for sm_90; returns the options and the signature that it would compile for."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    names = ("do_not_specialize", "do_not_specialize_on_alignment")
    function = JITFunction(kernel.fn, **{name: kernel.kwargs[name] for name in names})
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = binder(*args, **kwargs, debug=False)
    options, signature, _, _ = function._pack_args(backend, kwargs, bound, specialization, None)
    return options, signature


def check_descriptor(name: str, descriptor: TensorDescriptor) -> None:
    """The rules of cuTensorMapEncodeTiled that `TensorDescriptor` leaves to the driver.

    It checks a base's alignment itself, but not that of a fake tensor.
    """
    size = descriptor.base.dtype.itemsize
    assert descriptor.base.data_ptr() % 16 == 0, f"{name}: the base is not aligned"
    assert all(0 < n <= 2**32 for n in descriptor.shape), f"{name}: shape {descriptor.shape}"
    assert all(0 < n * size < 2**40 for n in descriptor.strides), f"{name}: strides {descriptor.strides}"
    assert all(1 <= n <= 256 for n in descriptor.block_shape), f"{name}: box {descriptor.block_shape}"
    assert descriptor.block_shape[-1] * size % 16 == 0, f"{name}: inner box {descriptor.block_shape}"


def most(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The integers that lead a kernel furthest: the last page, a full cache, the last logit.

    A token sees REACH others: more lead a program over more tiles, but no further.
    """
    tensors = {name: tensor for name, value in arguments.items() for tensor in tensors_in(value)}
    values = {"positions_ptr": np.array([2**31 - 1])}
    if "order_ptr" in tensors:
        tokens = np.arange(arguments["N"])
        values |= {
            "order_ptr": np.arange(len(tensors["order_ptr"])),
            "first_key_ptr": np.maximum(tokens - REACH, 0),
            "last_query_ptr": np.minimum(tokens + REACH, len(tokens) - 1),
        }
    if "page_table_ptr" in tensors:
        values["page_table_ptr"] = np.array([len(tensors["k_ptr"]) - 1])
    if "targets_ptr" in tensors:
        values["targets_ptr"] = np.array([arguments["V"] - 1])
    return values
