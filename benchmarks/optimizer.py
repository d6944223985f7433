"""One optimizer step of a whole model: clipping, AdamW and the bfloat16 copy, against torch's fused path.

    python benchmarks/optimizer.py [--output-dir benchmarks/results]

torch: `clip_grad_norm_` (foreach), `AdamW(fused=True)`, a foreach copy. The floor reads gradients twice (for
the norm and for the update), reads weights and both states once, and writes weights, states and copy once: 34
bytes for each parameter.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import measure
import torch
from results import Results, main
from torch import Tensor

from lumi.kernels.adamw import adamw, adamw_reference
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.global_norm import global_norm, global_norm_reference
from lumi.model.transformer import ModelConfig, Transformer

TINY = ModelConfig(vocab_size=32_768, num_layers=6, model_dim=256, num_heads=4, mlp_dim=1024)
SMALL_GPT2 = ModelConfig(
    vocab_size=50_304, num_layers=12, model_dim=768, num_heads=12, mlp_dim=2048, tied_embeddings=True
)
MODELS = {"23M": TINY, "124M": SMALL_GPT2}
OVER_TORCH = 1.5  # what is aimed at
BYTES = 34
NUMBERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "max_norm": 1.0}
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class State:
    """What an optimizer owns from its first step on, with gradients whose norm exceeds the limit."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor]
    steps: list[Tensor]

    def to(self, dtype: torch.dtype) -> "State":
        """Everything copied in `dtype`; the bfloat16 copies are new and empty, and no step was made."""
        lists = ([t.detach().to(dtype, copy=True) for t in tensors] for tensors in self.lists()[:4])
        return State(*lists, [torch.empty_like(t) for t in self.copies], _no_steps(self.params))

    def lists(self) -> list[list[Tensor]]:
        """The first five lists, in the order of the fields."""
        return [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies]

    def decays(self) -> list[float]:
        """Weight decay of matrices, none of vectors."""
        return [WEIGHT_DECAY if p.ndim > 1 else 0.0 for p in self.params]


def _no_steps(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros((), device=p.device) for p in params]


def fresh_state(shapes: Sequence[torch.Size], device: torch.device) -> State:
    """Random weights and gradients, states of zero."""
    draw = lambda: [torch.randn(shape, device=device) for shape in shapes]
    zeros = lambda dtype: [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
    params = draw()
    states = zeros(torch.float32), zeros(torch.float32), zeros(torch.bfloat16)
    return State(params, draw(), *states, _no_steps(params))


def lumi_step(state: State, norm: Callable = global_norm, update: Callable = adamw) -> None:
    """The operators of Lumi, or their references."""
    params, grads, exp_avgs, exp_avg_sqs, copies = state.lists()
    total = norm(grads)
    update(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        state.steps,
        weight_decays=state.decays(),
        norm=total,
        copies=copies,
        **NUMBERS,
    )


def torch_step(state: State, device: torch.device) -> Callable[[], None]:
    """torch's own step, on parameters that share the memory of `state`."""
    parameters = [torch.nn.Parameter(p) for p in state.params]
    for parameter, grad in zip(parameters, state.grads, strict=True):
        parameter.grad = grad
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=NUMBERS["lr"],
        betas=(NUMBERS["beta1"], NUMBERS["beta2"]),
        eps=NUMBERS["eps"],
        fused=True,
        capturable=device.type == "cuda",
    )

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, NUMBERS["max_norm"], foreach=True)
        optimizer.step()
        torch._foreach_copy_(state.copies, parameters)

    return step


def measure_model(results: Results, name: str, config: ModelConfig, *, graph: bool) -> dict[str, float]:
    """Check one step against float64, then time many; seconds by name."""
    device = results.device
    with torch.device("meta"):
        shapes = [p.shape for p in Transformer(config, REFERENCE).parameters()]
    start = fresh_state(shapes, device)
    num_parameters = sum(p.numel() for p in start.params)
    exact, same_dtype = start.to(torch.float64), start.to(torch.float32)
    for state in (exact, same_dtype):
        lumi_step(state, global_norm_reference, adamw_reference)

    def candidate(
        make: Callable[[State], Callable[[], None]], slack: float, num_lists: Sequence[int]
    ) -> Callable[[], list[Callable]]:
        def prepare() -> list[Callable]:
            state = start.to(torch.float32)
            step = make(state)
            step()
            for index in num_lists:
                flat = (
                    [torch.cat([t.flatten() for t in s.lists()[index]])] for s in (state, same_dtype, exact)
                )
                measure.check(f"optimizer {name}, list {index}", *flat, slack=slack)
            return [step]

        return prepare

    candidates = {
        "lumi": candidate(lambda state: lambda: lumi_step(state), 2.0, (0, 2, 3, 4)),
        "torch fused": candidate(
            lambda state: torch_step(state, device), 10.0, (0, 4)
        ),  # keeps its states to itself
    }
    text = f"clip + AdamW + copy, {name}, {len(shapes)} tensors"
    return results.time(text, candidates, graph=graph, num_bytes=BYTES * num_parameters)


def run(results: Results, models: dict[str, ModelConfig] = MODELS) -> None:
    """Measure every model, in a CUDA graph and launched from Python."""
    for name, config in models.items():
        for graph in (True, False):
            launch = "in a graph" if graph else "from Python"
            with results.case(f"optimizer {name} {launch}"):
                times = measure_model(results, name, config, graph=graph)
                text = f"clip + AdamW + bfloat16 copy, {name}, {launch}: times as fast as torch's fused path"
                results.claim(text, measure.ratio(times, "torch fused"), at_least=OVER_TORCH)


if __name__ == "__main__":
    sys.exit(main("optimizer", __doc__, run))
