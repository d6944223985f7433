"""A GPU that is none: torch's "meta" tensors say that they are on "cuda:0", and every launch is counted.

Inside of `StandInGpu`, code for CUDA runs as on a GPU, without one and without values: operators find the
shapes of their results, `kernel[grid]` of Triton and the CUDA operators of `lumi._csrc` count themselves, and
what the host reads from the device is 1. It counts for the thread that entered it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import lumi._csrc as _csrc
import lumi.kernels.adamw as adamw
import lumi.kernels.global_norm as global_norm

CUDA, META = torch.device("cuda", 0), torch.device("meta")
NAME, CAPABILITY, MULTIPROCESSORS = "NVIDIA H200", (9, 0), 132
ADAMW_CAPACITY, NORM_CAPACITY = 480, 1024  # tensors of one launch: kCapacity in csrc/adamw.cu, global_norm.cu
# Of one launch of torch's foreach kernels, by the number of lists: tensors, and blocks of 65,536 elements
# (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
FOREACH_TENSORS, FOREACH_BLOCKS, FOREACH_CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65_536
NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh")
IDLE_KERNELS = {"_rescale_kernel"}  # that find nothing to do, and move nothing
READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "nonzero"}


@dataclass
class Tally:
    """What the device was asked for.

    Attributes:
        operators: calls of operators from Python or autograd that do something: `lumi`'s count one each.
        custom: those of `lumi`.
        views: operators that only describe memory or allocate it.
        inner: operators that work inside of `lumi`'s.
        launches: kernels, and copies to the device.
        copies: those from the host; `uploads`: the operators among them.
        waits: reads that the host waits for; `late`: copies to the host that it does not wait for.
        bytes: each tensor of a launch once for reading and once for writing; `weight_bytes`: of those of a
            parameter's shape; `cast_bytes`: of these in casts.
        by_name: operators by their names, and what the host waits for.
    """

    operators: int = 0
    custom: int = 0
    views: int = 0
    inner: int = 0
    launches: int = 0
    copies: int = 0
    uploads: int = 0
    waits: int = 0
    late: int = 0
    bytes: int = 0
    weight_bytes: int = 0
    cast_bytes: int = 0
    by_name: Counter[str] = field(default_factory=Counter)

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def copy(self) -> "Tally":
        """The counts of now."""
        return self - Tally()


class StandInGpu(TorchDispatchMode):
    """Counts into `tally`.

    Args:
        weight_shapes: shapes (rows, columns) of what is a weight, its copy, gradient or state.
        activation_rows: leading dimensions (B, T) of what is none, whatever its last two.
    """

    def __init__(self, weight_shapes: Iterable[tuple[int, ...]], activation_rows: tuple[int, int]):
        super().__init__()
        self.shapes = {
            shape for rows, columns in weight_shapes for shape in ((rows, columns), (columns, rows))
        }
        self.activation_rows, self.tally = activation_rows, Tally()
        self.seen_as_cuda, self.depth = _SeenAsCuda(self), 0

    @contextmanager
    def entered(self) -> Iterator[Tally]:
        """The stand-in, for this thread and with patches of `torch.cuda` for all."""
        with ExitStack() as stack:
            for patch in self._patches():
                stack.enter_context(patch)
            stack.enter_context(self.seen_as_cuda)
            stack.enter_context(self)
            yield self.tally

    def launch(self, read: Iterable[Any], written: Iterable[Any], count: int = 1, cast: bool = False) -> None:
        """Count launches and the bytes of their tensors."""
        self.tally.launches += count
        for group in (read, written):
            for tensor in {id(t): t for t in group if isinstance(t, Tensor)}.values():
                self._count_bytes(_nbytes(tensor), self._is_weight(tensor), cast)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lumi":
            self._name(func)
            self.tally.custom += self.depth == 0
            return self._body(func, args, kwargs)
        if self.depth:  # here nothing above has taken it apart yet
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        returned = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in (*tensors, *returned)):
            return result  # the host's own
        name = func.__name__.split(".")[0]
        if func.is_view or name.startswith(NO_LAUNCH):
            self.tally.views += 1
            return result
        self._name(func)
        uploads = not all(t.is_meta for t in tensors if t.ndim) and name in ("_to_copy", "copy_")
        self.tally.uploads += uploads
        self.tally.copies += uploads
        out = [t for t in tree_leaves(kwargs.get("out")) if isinstance(t, Tensor)]
        changed = _changed(func, args)
        read = [t for t in tensors if t.is_meta and all(t is not o for o in out)]
        read = [
            t for t in read if name not in ("copy_", "zero_", "fill_") or all(t is not c for c in changed)
        ]
        self.launch(read, [*returned, *changed], _num_launches(name, args), name in ("_to_copy", "copy_"))
        return result

    def _body(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator as it runs on a GPU: its own allocations, products and launches."""
        self.depth += 1
        try:
            with self.seen_as_cuda, self:
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        finally:
            self.depth -= 1

    def _name(self, func: Any) -> None:
        if self.depth:
            self.tally.inner += 1
        else:
            self.tally.operators += 1
            self.tally.by_name[func.name().removesuffix(".default")] += 1

    def _is_weight(self, tensor: Tensor) -> bool:
        if tensor.ndim == 1:
            return tensor.numel() > math.prod(self.activation_rows)
        return tuple(tensor.shape[-2:]) in self.shapes and tuple(tensor.shape[:2]) != self.activation_rows

    def _count_bytes(self, num_bytes: int, weight: bool, cast: bool = False) -> None:
        self.tally.bytes += num_bytes
        self.tally.weight_bytes += num_bytes if weight else 0
        self.tally.cast_bytes += num_bytes if weight and cast else 0

    def _patches(self) -> list[Any]:
        def kernel(self_: Any, grid: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> None:
                given = [value.base if isinstance(value, TensorDescriptor) else value for value in args]
                self.launch(() if self_.__name__ in IDLE_KERNELS else given, ())

            return run

        def adamw_cuda(arguments: Any, *_: Any) -> None:
            self.tally.launches += 1 + -(-len(arguments.sizes) // ADAMW_CAPACITY)
            self._count_bytes(sum(arguments.sizes) * (30 if arguments.copies else 28), weight=True)

        def global_norm_cuda(pointers: Any, sizes: Sequence[int], *_: Any) -> None:
            self.tally.launches += 1 + -(-len(sizes) // NORM_CAPACITY)
            self._count_bytes(4 * sum(sizes), weight=True)

        csrc = SimpleNamespace(**{name: getattr(_csrc, name) for name in dir(_csrc)})
        csrc.has_cuda, csrc.adamw_cuda, csrc.global_norm_cuda = True, adamw_cuda, global_norm_cuda
        csrc.AdamWArguments = SimpleNamespace
        csrc.global_norm_num_partials = len
        properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
        cuda = {
            "device": lambda *_: nullcontext(),
            "stream": lambda *_: nullcontext(),
            "current_stream": lambda *_: SimpleNamespace(cuda_stream=0, wait_stream=lambda *_: None),
            "current_device": lambda: 0,
            "synchronize": lambda *_: self.wait("synchronize"),
            "get_device_capability": lambda *_: CAPABILITY,
            "get_device_properties": lambda *_: properties,
            "get_device_name": lambda *_: NAME,
            "manual_seed": lambda *_: None,
            "Event": lambda **_: SimpleNamespace(
                record=lambda *_: None, synchronize=lambda: None, query=lambda: True
            ),
        }
        return [
            *(mock.patch.object(kind, "__getitem__", kernel) for kind in (JITFunction, InterpretedFunction)),
            *(mock.patch.object(module, "_csrc", csrc) for module in (adamw, global_norm)),
            mock.patch.object(_csrc, "has_cuda", True),
            mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
            *(mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()),
            mock.patch.object(torch.distributed, "all_reduce"),
        ]

    def wait(self, what: str) -> None:
        """Count a read that the host waits for."""
        self.tally.waits += 1
        self.tally.by_name[f"wait: {what}"] += 1


class _SeenAsCuda(TorchFunctionMode):
    """To Python, meta tensors are on CUDA: their `device` says so, and what is made there is made of meta."""

    def __init__(self, gpu: StandInGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        on_gpu = isinstance(first, Tensor) and first.is_meta
        if name == "__get__" and func.__self__ is Tensor.device:
            return CUDA if on_gpu else func(*args)
        kwargs.pop("pin_memory", None)
        if func is torch.device:
            return func(*args, **kwargs)
        if on_gpu and name in READS:
            self.gpu.wait(name)
            return _read(first, name)
        to_host = name == "to" and on_gpu and any(_is_host(value) for value in (*args[1:], *kwargs.values()))
        if to_host or (name == "copy_" and not first.is_meta and args[1].is_meta):
            if kwargs.get("non_blocking") or True in args[1:]:
                self.gpu.tally.late += 1
            else:
                self.gpu.wait(name)
            return _ones(first) if to_host else first.fill_(1)
        if name == "backward":
            return self._backward(*args, **kwargs)
        result = func(*map(_moved, args), **{key: _moved(value) for key, value in kwargs.items()})
        if name == "tensor" and result.is_meta:
            self.gpu.tally.copies += 1
            self.gpu.tally.launches += 1
            result.host_values = first  # what the host reads again is what it wrote
        return result

    def _backward(self, root: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
        """`root.backward(gradient)` within this mode: there, too, operators ask where their tensors are."""
        with self:
            gradient = torch.ones_like(root) if gradient is None else gradient
            options = {"allow_unreachable": True, "accumulate_grad": True}
            torch.autograd.graph._engine_run_backward((root,), (gradient,), False, False, (), **options)


def _is_host(value: Any) -> bool:
    return value == "cpu" or (isinstance(value, torch.device) and value.type == "cpu")


def _moved(value: Any) -> Any:
    """A CUDA device is made meta."""
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return META if is_cuda or (isinstance(value, str) and value.startswith("cuda")) else value


def _ones(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")


def _read(tensor: Tensor, name: str) -> Any:
    """What a read by this method finds: what the host wrote, else ones."""
    if name == "tolist" and hasattr(tensor, "host_values"):
        return tensor.host_values
    ones = _ones(tensor)
    return ones if name == "cpu" else getattr(ones, name)()


def _changed(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The tensors that an operator writes to in place."""
    writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    given = [value for value, written in zip(args, writes, strict=False) if written]
    return [t for t in tree_leaves(given) if isinstance(t, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Of its elements in memory: an expanded dimension is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _num_launches(name: str, args: Sequence[Any]) -> int:
    """One for an operator of torch, also where CUDA needs several (a sort); of its foreach kernels one for as
    many tensors and blocks as fit."""
    if not name.startswith("_foreach"):
        return 1
    lists = [
        value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)
    ]
    blocks = sum(-(-t.numel() // FOREACH_CHUNK) for t in lists[0])
    num_lists = min(len(lists) + (not name.endswith("_")), 5)
    return max(-(-len(lists[0]) // FOREACH_TENSORS[num_lists]), -(-blocks // FOREACH_BLOCKS))
