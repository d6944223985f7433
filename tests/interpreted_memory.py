"""Triton's interpreter with memory that notices wrong accesses.

A kernel gets addresses that exist nowhere, 16 TiB apart, one for each tensor. So each address says which
tensor it is of. Every access is judged against the elements of that tensor (of a view those of the view), and
then carried out at the real address. That shows all that guard bands around each tensor would, and exactly.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

_SPACING = 44  # bits of an address inside a tensor's share of addresses; the tensor starts in the middle
_PAGE = 4096  # alignment is kept up to this
_NOBODY, _SEVERAL = -1, -2  # instead of a program's number
# Buffers whose rows a kernel may touch up to their stride, past their last column: both the padding and the
# columns are its own.
PADDED_ROWS = {"logits_ptr"}


class WrongAccessError(AssertionError):
    """A kernel touched what it must not. Triton wraps it in an InterpreterError that holds the text."""


@dataclass
class Argument:
    """A tensor that a kernel was given, and what the kernel takes for its address."""

    name: str
    tensor: Tensor
    start: int

    def __post_init__(self) -> None:
        sizes, strides = list(self.tensor.shape), list(self.tensor.stride())
        if self.name in PADDED_ROWS:
            sizes[-1] = strides[-2]
        pairs = sorted(zip(strides, sizes, strict=True), reverse=True)
        self.dims = [(stride, size) for stride, size in pairs if size != 1 and (stride or not size)]
        reach = 0  # of the dims further inside
        for stride, size in reversed(self.dims):
            assert size == 0 or stride > reach, f"{self.name}: rows of a view overlap, {sizes} by {strides}"
            reach += (size - 1) * stride

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        """How far the addresses are from the start, in bytes."""
        return addresses.astype(np.int64) - self.start

    def holds(self, offsets: np.ndarray) -> np.ndarray:
        """Whether an element of the tensor starts at these offsets."""
        rest, left = np.divmod(offsets, self.tensor.element_size())
        inside = left == 0
        for stride, size in self.dims:
            index, rest = np.divmod(rest, stride) if stride else (rest, rest)
            inside &= (index >= 0) & (index < size)
        return inside & (rest == 0)


class Memory:
    """The tensors of one launch, and which program touched what."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.arguments: list[Argument] = []
        self.touched: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, name: str, tensor: Tensor) -> int:
        """An address for the tensor, aligned as its own is."""
        start = (len(self.arguments) << _SPACING) + (1 << _SPACING - 1) + tensor.data_ptr() % _PAGE
        self.arguments.append(Argument(name, tensor, start))
        return start

    def find(
        self, what: str, pointers: np.ndarray, mask: np.ndarray
    ) -> Iterator[tuple[Argument, np.ndarray]]:
        """Each tensor that the mask's pointers are of, and the pointers' offsets in it, all good."""
        addresses = pointers[mask]
        numbers = addresses >> np.uint64(_SPACING)
        for number in np.unique(numbers):
            argument = self.arguments[min(int(number), len(self.arguments) - 1)]
            offsets = argument.offsets(addresses[numbers == number])
            wrong = offsets[~argument.holds(offsets)]
            if len(wrong):
                self.refuse(what, argument, f"at byte {wrong[0]} from its start (and {len(wrong) - 1} more)")
            yield argument, offsets

    def refuse(self, what: str, argument: Argument, where: str) -> None:
        """Raises WrongAccessError."""
        shape, strides = tuple(argument.tensor.shape), argument.tensor.stride()
        raise WrongAccessError(
            f"{self.kernel}, program {interpreter.interpreter_builder.grid_idx}: {what} {argument.name} "
            f"{where}; it is {argument.tensor.dtype} {shape} by {strides}"
        )

    def load(self, pointers: np.ndarray, mask: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """What stands at the mask's pointers, and elsewhere `rest`."""
        return interpreter._interpreter.load(self._real("reads", pointers, mask), mask, rest, rest.dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        """Writes the mask's values."""
        interpreter._interpreter.store(self._real("writes to", pointers, mask), values, mask)

    def _real(self, what: str, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The real addresses behind the mask's pointers, after all checks."""
        addresses = np.zeros(pointers.shape, np.uint64)
        found = list(self.find(what, pointers, mask))
        if len(found) > 1:
            raise WrongAccessError(f"{self.kernel}: {what} several tensors at once")
        for argument, offsets in found:
            self.note(what, argument, offsets)
            addresses[mask] = (argument.tensor.data_ptr() + offsets).astype(np.uint64)
        return addresses

    def note(self, what: str, argument: Argument, offsets: np.ndarray) -> None:
        """Refuses what another program of the launch wrote, or read and is now overwritten: programs have no
        order. Refuses two values for one element at once, too."""
        storage = argument.tensor.untyped_storage()
        nothing = lambda: np.full(storage.nbytes(), _NOBODY, np.int32)
        if storage.data_ptr() not in self.touched:
            self.touched[storage.data_ptr()] = nothing(), nothing()
        readers, writers = self.touched[storage.data_ptr()]
        where, program = argument.tensor.data_ptr() - storage.data_ptr() + offsets, self.program()
        others = lambda by: (by[where] != _NOBODY) & (by[where] != program)
        if others(writers).any():
            self.refuse(what, argument, f"after program {writers[where][others(writers)][0]} wrote to it")
        if what == "reads":
            readers[where] = np.where(others(readers), _SEVERAL, program)
            return
        if others(readers).any():
            self.refuse(what, argument, f"after program {readers[where][others(readers)][0]} read it")
        if len(np.unique(where)) < len(where):
            self.refuse(what, argument, "twice in one store")
        writers[where] = program

    def program(self) -> int:
        """The number of the program that runs."""
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, height, depth = interpreter.interpreter_builder.grid_dim
        return (x * height + y) * depth + z


def install_checks(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Until `monkeypatch` is undone: launches run on checked memory, their programs in an order drawn from
    `seed`, and what a load without `other` leaves out is poison."""
    memory = Memory("")
    names: Iterator[str] = iter(())
    call, convert = GridExecutor.__call__, interpreter._implicit_cvt

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        nonlocal memory, names
        memory = Memory(self.fn.__name__)
        named = bound_arguments(self.fn, args, kwargs)
        names = iter([name for name, value in named.items() for _ in tensors_in(value)])
        call(self, *args, **kwargs)

    def convert_checked(value: Any) -> Any:
        result = convert(value)
        if isinstance(value, Tensor):
            pointer = memory.add(next(names), value)
            result.handle.data = np.array([pointer], np.uint64)
        return result

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_checked)
    replace_accesses(monkeypatch, lambda: memory)
    _shuffle_programs(monkeypatch, seed)


def bound_arguments(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a kernel's parameters are bound to, in Triton's order."""
    known = inspect.getfullargspec(function).args
    return inspect.getcallargs(function, *args, **{k: v for k, v in kwargs.items() if k in known})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument: itself, a descriptor's, or a tuple's."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)


def poison(dtype: np.dtype) -> Any:
    """A number that spoils what it touches."""
    return np.iinfo(dtype).max // 3 if np.issubdtype(dtype, np.integer) else dtype.type(float("nan"))


def replace_accesses(monkeypatch: pytest.MonkeyPatch, current: Callable[[], Memory]) -> None:
    """Until `monkeypatch` is undone, kernels read and write the `current` memory."""

    def load(self, pointers, mask, other, *_, **__):
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        rest = np.full(pointers.data.shape, poison(dtype), dtype) if other is None else other.data
        return TensorHandle(current().load(pointers.data, mask.data, rest), kind)

    def store(self, pointers, value, mask, *_, **__):
        current().store(pointers.data, value.data, mask.data)

    def atomic(self, *_):
        raise NotImplementedError("atomic operations are not checked: no kernel has one")

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    for name in ("create_atomic_cas", "create_atomic_rmw"):
        monkeypatch.setattr(InterpreterBuilder, name, atomic)


def _shuffle_programs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The interpreter counts through the grid; each count stands for another program."""
    generator, set_grid_dim = np.random.default_rng(seed), InterpreterBuilder.set_grid_dim
    order = np.zeros(0, int)

    def start(self, *grid):
        nonlocal order
        set_grid_dim(self, *grid)
        order = generator.permutation(int(np.prod(grid)))

    def select(self, *index):
        number = order[np.ravel_multi_index(index, self.grid_dim)]
        self.grid_idx = tuple(int(part) for part in np.unravel_index(number, self.grid_dim))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", start)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", select)
