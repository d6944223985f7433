"""A whole training step (forward, backward, clipping, AdamW) of two models, against what people train small
models with.

    python benchmarks/training_step.py [--output-dir benchmarks/results]

Tokens per second, and the share of the device's dense bfloat16 peak that the model's own FLOPs make (MFU;
`ModelConfig.flops_per_token`: recomputation does not count). Random tokens, bfloat16 products, float32
weights; the loss is read every ten steps. "captured" is the step as one CUDA graph; otherwise it is launched
from Python. Peers, of the same parameters, batch and optimizer:

- "gpt": GPT-2 as nanoGPT has it (LayerNorm, GELU, learned positions, SDPA), compiled, bfloat16 autocast,
  `clip_grad_norm_`, AdamW(fused). Its MLP is 3/2 as wide as Lumi's, which has three matrices, so that
  parameters and FLOPs agree within a few percent.
- "llama": the model that Lumi trains, of plain torch (`REFERENCE`) with whole logits, compiled, with the same
  optimizer as "gpt".
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import measure
import optimizer
import torch
import torch.nn.functional as F
from results import Results, main
from torch import Tensor, nn

import lumi.configs
from lumi.host.devices import peak_flops
from lumi.kernels.adamw import adamw
from lumi.kernels.bundle import REFERENCE, TRITON, Ops
from lumi.kernels.global_norm import global_norm
from lumi.model.transformer import ModelConfig, Transformer

OVER_GPT, MFU = 1.6, 0.45  # what is aimed at: of the 23M model, of the 124M model
LR, STEPS_PER_READING = 1e-3, 10


@dataclass(frozen=True)
class Case:
    """A model, its batch, what it is compared with, and how many sequences of the batch are checked."""

    config: ModelConfig
    batch: int
    length: int
    peers: tuple[str, ...]
    checked: int = 2


def shipped_config(name: str) -> ModelConfig:
    """The model of configs/pretrain/<name>.json."""
    text = (Path(lumi.configs.__path__[0]) / "pretrain" / f"{name}.json").read_text(encoding="utf-8")
    return ModelConfig(**json.loads(text)["model"])


# The loss of the 124M model's batch takes several chunks of rows, and so do 12 of its sequences; that of the
# 23M model's takes one.
CASES = {
    "23M": Case(shipped_config("tiny"), 16, 1024, ("gpt", "llama")),
    "124M": Case(optimizer.SMALL_GPT2, 32, 1024, ("gpt",), 12),
}


class Block(nn.Module):
    """Of GPT-2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width = config.model_dim, 3 * config.mlp_dim // 2
        self.heads = config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x_BTD)).chunk(3, dim=-1)
        )
        x_BTD = x_BTD + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        )
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), without biases and dropout; the head is tied where Lumi's is."""

    def __init__(self, config: ModelConfig, length: int):
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(config.vocab_size, config.model_dim),
            nn.Embedding(length, config.model_dim),
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm, self.head = (
            nn.LayerNorm(config.model_dim, bias=False),
            nn.Linear(config.model_dim, config.vocab_size, bias=False),
        )
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        if config.tied_embeddings:
            self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.cross_entropy(self.head(self.norm(x_BTD)).flatten(0, 1), targets_BT.flatten())


def llama_loss(model: Transformer, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The mean loss with whole logits."""
    return F.cross_entropy(model.logits(model.hidden(tokens_BT)).flatten(0, 1), targets_BT.flatten())


def step_of(
    model: nn.Module, loss: Callable[[], Tensor], update: Callable[[], None], targets: int = 1
) -> Callable[[], Tensor]:
    """Forward, backward and update; returns loss / targets. Gradients are new in every step, so that a graph
    writes where it will read."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        update()
        return value.detach() / targets

    return step


def lumi_step(model: Transformer, tokens_BT: Tensor, targets_BT: Tensor) -> Callable[[], Tensor]:
    """As Lumi trains: the summed loss, whose factor 1 / targets is taken out of the gradients as a loss scale
    is, while they are read."""
    params = [p for p in model.parameters() if p.requires_grad]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    decays = [0.1 if p.ndim > 1 else 0.0 for p in params]
    steps = [torch.zeros((), device=p.device) for p in params]
    numbers = {
        "lr": LR,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "max_norm": 1.0,
        "loss_scale": float(targets_BT.numel()),
    }

    def update() -> None:
        grads = [p.grad for p in params]
        adamw(params, grads, *states, steps, weight_decays=decays, norm=global_norm(grads), **numbers)

    return step_of(model, lambda: model(tokens_BT, targets_BT), update, targets_BT.numel())


def torch_step(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """torch's optimizer on a loss that is a mean."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if (p.ndim > 1) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda")

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        adam.step()

    return step_of(model, loss, update)


def captured(model: nn.Module, step: Callable[[], Tensor], pool: tuple[int, int]) -> Callable[[], Tensor]:
    """`step`, which has run before, as a CUDA graph; returns the tensor that every replay fills. Graphs of
    one pool share their memory: every replay writes what it reads."""
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def check_gradients(name: str, config: ModelConfig, ops: Ops, tokens_BT: Tensor, targets_BT: Tensor) -> None:
    """Gradients of bfloat16 products under `ops`, at most twice as far from float64 as those of the
    reference. The loss is one number, in which errors cancel by luck: how near the reference comes is no
    measure of it, and it is compared as a bfloat16."""

    def results(ops: Ops, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
        recompute = ops is REFERENCE  # whole attention scores of one layer at a time
        model = Transformer(config, ops, compute_dtype=dtype, gradient_checkpointing=recompute).init_weights(
            0
        )
        model = model.to(tokens_BT.device, weights)
        loss = model(tokens_BT, targets_BT)
        loss.backward()
        return [loss.detach().to(dtype), torch.cat([p.grad.flatten() for p in model.parameters()])]

    exact = results(REFERENCE, torch.float64, torch.float64)
    actual, same_dtype = (results(each, torch.bfloat16, torch.float32) for each in (ops, REFERENCE))
    measure.check(f"training step {name}", actual, same_dtype, exact)


def measure_case(results: Results, name: str, case: Case, ops: Ops, rounds: int) -> dict[str, float]:
    """Check, then time every model, launched and captured; seconds of a step by name."""
    device, config = results.device, case.config
    tokens_BT, targets_BT = (
        torch.randint(0, config.vocab_size, (case.batch, case.length), device=device) for _ in range(2)
    )
    check_gradients(name, config, ops, tokens_BT[: case.checked], targets_BT[: case.checked])
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else (0, 0)

    def lumi(whole_layers: bool) -> tuple[nn.Module, Callable]:
        model = Transformer(config, ops, compute_dtype=torch.bfloat16).init_weights(0).to(device)
        if whole_layers and device.type == "cuda":
            for layer in model.layers:
                layer.compile()
        return model, lumi_step(model, tokens_BT, targets_BT)

    def llama() -> tuple[nn.Module, Callable]:
        model = Transformer(config, REFERENCE, compute_dtype=torch.bfloat16).init_weights(0).to(device)
        loss = measure.compiled(llama_loss, device)
        return model, torch_step(model, lambda: loss(model, tokens_BT, targets_BT), device)

    def gpt() -> tuple[nn.Module, Callable]:
        model = GPT(config, case.length).to(device)
        results.note(
            **{
                f"parameters {name}": {
                    "lumi": config.num_parameters,
                    "gpt": sum(p.numel() for p in model.parameters()),
                }
            }
        )
        compiled = measure.compiled(model, device)

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return compiled(tokens_BT, targets_BT)

        return model, torch_step(model, loss, device)

    first_losses: dict[str, float] = {}

    def candidate(key: str, capture: bool) -> Callable[[], list[Callable]]:
        def prepare() -> list[Callable]:
            model, step = makers[key]()
            first = first_losses.setdefault(key, step().item())
            for _ in range(2):
                step()
            if capture and device.type == "cuda":
                step = captured(model, step, pool)
            for _ in range(20):
                loss = step()
            if not loss.item() < first:  # also where it is not a number
                raise RuntimeError(
                    f"{name}: the loss of a batch seen again and again must fall below {first:.3f}, "
                    f"got {loss.item():.3f}"
                )
            return [step] * (STEPS_PER_READING - 1) + [lambda: step().item()]

        return prepare

    makers = {
        "lumi": lambda: lumi(False),
        "lumi layers compiled": lambda: lumi(True),
        "gpt": gpt,
        "llama": llama,
    }
    # torch's compiler is a peer, too: without any, nothing waits for it.
    wanted = {"lumi", *case.peers, *(["lumi layers compiled"] if case.peers else [])}
    makers = {key: cache(make) for key, make in makers.items() if key in wanted}
    candidates = {
        f"{key}{', captured' * capture}": candidate(key, capture)
        for key in makers
        for capture in (False, True)
    }
    replays = [text for text in candidates if text.endswith(", captured")]
    flops = config.flops_per_token(case.length) * case.batch * case.length
    text = f"training step {name}, {case.batch} x {case.length} tokens"
    return results.time(text, candidates, graph=False, replays=replays, flops=flops, rounds=rounds)


def run(results: Results, cases: dict[str, Case] = CASES, ops: Ops = TRITON, rounds: int = 7) -> None:
    """Both models. Lumi's figure is that of its captured step, with or without compiled layers, whichever is
    faster."""
    for name, case in cases.items():
        torch.compiler.reset()
        with results.case(f"training step {name}"):
            times = measure_case(results, name, case, ops, rounds)
            tokens = case.batch * case.length
            ours = min(
                seconds
                for key, seconds in times.items()
                if key in ("lumi, captured", "lumi layers compiled, captured")
            )
            results.note(
                **{
                    f"tokens per second {name}": {
                        key: round(tokens / seconds) for key, seconds in times.items()
                    }
                }
            )
            for peer in (f"{key}{how}" for key in case.peers for how in ("", ", captured")):
                target = OVER_GPT if (name, peer) == ("23M", "gpt") else None
                results.claim(
                    f"training step {name}: times as fast as {peer}",
                    times[peer] / ours if peer in times else None,
                    at_least=target,
                )
            if peak := peak_flops(results.device):
                mfu = case.config.flops_per_token(case.length) * tokens / ours / peak
                results.claim(f"training step {name}: MFU", mfu, at_least=MFU if name == "124M" else None)


if __name__ == "__main__":
    sys.exit(main("training_step", __doc__, run))
