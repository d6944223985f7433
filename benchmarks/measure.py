"""How every benchmark here measures and checks.

Candidates are timed in turn, round by round, so that a drift of the clocks meets all of them alike; a figure
is the median of the rounds with its quartiles. On a GPU the time is taken by device events; "graph" is a
replayed CUDA graph, the device's own time, and "eager" is a call from Python, with what the host needs for
it. The calls of a round walk over several sets of buffers, together larger than the L2 cache, so that no
input is still there from the call before. The clocks are left as they are found.

Before a candidate is timed it is checked on the very tensors: at most twice as far from float64 as the plain
formula in the same dtype.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

ROUNDS = 20
_SAMPLE_SECONDS = 5e-3  # calls are repeated to about this long: beside it, the start of a graph is nothing


@dataclass(frozen=True)
class Operands:
    """One set of buffers of an operator: its differentiable inputs, and a gradient for each output."""

    inputs: tuple[Tensor, ...]
    incoming: tuple[Tensor, ...]

    def to(self, *args: Any) -> "Operands":
        """In another dtype or on another device, in memory of its own."""
        convert = lambda tensors: tuple(
            t.detach().to(*args, copy=True).requires_grad_(t.requires_grad) for t in tensors
        )
        return Operands(convert(self.inputs), convert(self.incoming))


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: the median of the rounds and its quartiles."""

    seconds: float
    low: float
    high: float


def buffer_sets(make: Callable[[], Any], num_bytes: int, device: torch.device) -> list[Any]:
    """So many sets that `num_bytes` each make four times the L2 cache (at most 64); on the CPU, two."""
    if device.type != "cuda":
        return [make() for _ in range(2)]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [make() for _ in range(min(max(-(-4 * cache // num_bytes), 2), 64))]


def results_and_gradients(function: Callable, operands: Operands) -> list[Tensor]:
    """Every output, then the gradient of every input that requires one."""
    outputs = _as_tuple(function(*operands.inputs))
    leaves = [t for t in operands.inputs if t.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, operands.incoming) if leaves else ()
    return [*(y.detach() for y in outputs), *gradients]


def forward_calls(function: Callable, sets: Sequence[Operands]) -> list[Callable]:
    """The forward as training runs it: what backward needs is kept."""
    return [lambda operands=operands: function(*operands.inputs) for operands in sets]


def backward_calls(function: Callable, sets: Sequence[Operands]) -> list[Callable]:
    """The backward alone, of forwards that are run here."""
    calls = []
    for operands in sets:
        outputs, leaves = (
            _as_tuple(function(*operands.inputs)),
            [t for t in operands.inputs if t.requires_grad],
        )
        calls.append(
            lambda y=outputs, x=leaves, dy=operands.incoming: torch.autograd.grad(y, x, dy, retain_graph=True)
        )
    return calls


DIRECTIONS = {"forward": forward_calls, "backward": backward_calls}


def step_calls(function: Callable, sets: Sequence[Operands]) -> list[Callable]:
    """Forward and backward together."""
    return [lambda operands=operands: results_and_gradients(function, operands) for operands in sets]


def compiled(function: Callable, device: torch.device) -> Callable:
    """`torch.compile` on a GPU. Elsewhere the function itself: a test does not wait for a C++ compiler."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def ratio(times: dict[str, float], peer: str, candidate: str = "lumi") -> float | None:
    """How many times faster `candidate` is than `peer`; None where the peer was left out."""
    return times[peer] / times[candidate] if peer in times else None


def check(
    name: str,
    actual: Sequence[Tensor],
    same_dtype: Sequence[Tensor],
    exact: Sequence[Tensor],
    slack: float = 2.0,
    terms: int = 1,
) -> None:
    """|actual - exact| <= slack |same_dtype - exact| + one ulp of |exact|, for each tensor.

    Norms are Euclidean, in float64. A float32 result that is a sum of `terms` values gets sqrt(terms) ulps:
    so much is lost at random by rounding in any order of summation. torch's pairwise sums lose less.

    Raises:
        RuntimeError: where that does not hold (NaN never passes), or shapes or dtypes differ.
    """
    for index, (a, s, e) in enumerate(zip(actual, same_dtype, exact, strict=True)):
        if a.shape != e.shape or a.dtype != s.dtype:
            raise RuntimeError(
                f"{name}, tensor {index}: got {a.dtype} {tuple(a.shape)}, expected {s.dtype} {tuple(e.shape)}"
            )
        ulps = torch.finfo(a.dtype).eps * (terms**0.5 if a.dtype == torch.float32 else 1)
        a, s, e = (t.to(e.device, torch.float64) for t in (a, s, e))
        error, norm = (a - e).norm().item(), e.norm().item()
        budget = slack * (s - e).norm().item() + ulps * norm
        if not error <= budget:
            raise RuntimeError(
                f"{name}, tensor {index}: error {error:.3e} exceeds {budget:.3e} (norm {norm:.3e})"
            )


def prepared(calls: list[Callable], device: torch.device, *, graph: bool) -> tuple[Callable, int]:
    """Something to time, warmed up, and how many calls it makes; `graph` has no meaning on the CPU."""
    once = _in_turn(calls)
    for _ in range(2 if device.type == "cuda" else 1):  # whatever is compiled or tuned at the first call
        once()
    arrange = _captured if graph and device.type == "cuda" else _in_turn
    run = arrange(calls)
    repeats = _repeats(run, device)
    return (run if repeats == 1 else arrange(calls * repeats)), len(calls) * repeats


def interleaved(
    candidates: dict[str, tuple[Callable, int]], device: torch.device, rounds: int = ROUNDS
) -> dict[str, Sample]:
    """Seconds per call of every candidate, each from `prepared`."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    warming = 2 if device.type == "cuda" else 1
    for index in range(rounds + warming):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            run, num_calls = candidates[name]
            seconds = _seconds(run, device) / num_calls
            if index >= warming:  # in the first rounds the clocks are still rising
                times[name].append(seconds)
    return {name: _sample(values) for name, values in times.items()}


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _repeats(run: Callable, device: torch.device) -> int:
    """How many times `run` makes a sample. `run` is what will be launched: a graph takes far less time than
    the calls that it was captured from."""
    return min(max(round(_SAMPLE_SECONDS / _seconds(run, device)), 1), 100)


def _in_turn(calls: list[Callable]) -> Callable:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: list[Callable]) -> Callable:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream()
    ):  # the stream of the forwards: backward runs on it
        _in_turn(calls)()
    graph.replay()
    return graph.replay


def _seconds(run: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _sample(values: list[float]) -> Sample:
    if len(values) == 1:
        return Sample(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Sample(middle, low, high)


def peak_bytes(call: Callable, device: torch.device) -> int | None:
    """What one call has allocated at most, beyond what was there; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def ready(device: torch.device) -> Iterator[None]:
    """Sets up measuring: a seed, a compiled backward that may run twice, and a stream that can be
    captured."""
    torch.manual_seed(0)
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with torch._functorch.config.patch(donated_buffer=False), stream:
        yield
