"""What a process needs to train, in bytes, by arithmetic."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lumi.data.batches import BatchConfig
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.chunked_cross_entropy import chunk_rows
from lumi.kernels.linear_cross_entropy import native_workspace_bytes, workspace_bytes
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout
from lumi.training.run_config import TrainConfig


class Frozen(NamedTuple):
    """Training of adapters: their parameters, the bytes of a frozen weight, are rows of tokens trained?"""

    num_adapter_parameters: int
    weight_bytes: int
    rows: bool


def compute_and_reduce_bytes(config: TrainConfig) -> tuple[int, int]:
    """Bytes of a number in the compute dtype, and of one that processes send each other to be summed."""
    reduces_narrow = config.dtype == "bfloat16" and config.parallel.reduce_dtype == "bfloat16"
    return torch.finfo(getattr(torch, config.dtype)).bits // 8, 2 if reduces_narrow else 4


def memory_of(
    config: TrainConfig, layout: Layout, device_type: str, kernels: str, num_trained: int | None = None
) -> dict[str, int]:
    """The `MemoryEstimate` of a config, by part.

    Args:
        kernels: the name of the operators in use.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.
    """
    compute_bytes, reduce_bytes = compute_and_reduce_bytes(config)
    frozen = None
    if num_trained is not None and config.lora is not None:
        weight_bytes = 2 if config.lora.base_dtype == "bfloat16" else 4
        frozen = Frozen(num_trained, weight_bytes, rows=bool(config.lora.tokens))
    assert config.model is not None
    estimate = MemoryEstimate(
        model=config.model,
        batches=config.batches,
        optimizer=config.optimizer.kind,
        has_average=config.final == "ema",
        has_row_means=config.optimizer.muon_beta2 is not None,
        compute_bytes=compute_bytes,
        reduce_bytes=reduce_bytes,
        checkpointing=config.gradient_checkpointing,
        device_type=device_type,
        kernels=kernels,
        frozen=frozen,
        layout=layout,
    )
    return estimate.by_part()


def parameters_held(model: ModelConfig, shard: int = 1, tensor: int = 1) -> tuple[int, int]:
    """Parameters of one layer, and of everything outside the layers, on the process that holds the most.

    Tensor parallelism gives each process rows or columns of a matrix, as `lumi.parallel.tensor_parallel` cuts
    it, the same rows of its bias, and every norm whole. FSDP2 then cuts what is there by rows.
    """
    layer, root = _held(model, shard, tensor)
    return sum(layer.values()), sum(root.values())


def matrices_of_layers(model: ModelConfig) -> Counter[tuple[int, int]]:
    """How many matrices of each shape the layers hold: what Muon trains."""
    with torch.device("meta"):
        layer = Transformer(model.one_layer, REFERENCE).layers
    shapes = Counter((len(p), p.shape[1]) for p in layer.parameters() if p.ndim == 2)
    return Counter({shape: model.num_layers * count for shape, count in shapes.items()})


def rows_of_matrices(model: ModelConfig) -> int:
    """Rows of all matrices of the layers."""
    return sum(rows * count for (rows, _), count in matrices_of_layers(model).items())


def _held(model: ModelConfig, shard: int, tensor: int) -> tuple[dict[str, int], dict[str, int]]:
    """What `parameters_held` adds up, by the parameters' names."""
    with torch.device("meta"):
        parameters = dict(Transformer(model.one_layer, REFERENCE).named_parameters())
    layer: dict[str, int] = {}
    root: dict[str, int] = {}
    for name, parameter in parameters.items():
        rows, columns = len(parameter), parameter.numel() // len(parameter)
        in_layer = name.startswith("layers.")
        by_columns = not in_layer or name.endswith(("o_proj.weight", "down_proj.weight"))
        if name.endswith(".bias") or (parameter.ndim == 2 and not by_columns):
            rows //= tensor
        elif parameter.ndim == 2:
            columns //= tensor
        (layer if in_layer else root)[name] = math.ceil(rows / shard) * columns
    return layer, root


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that the fullest process needs to train, by arithmetic; without what torch itself takes.

    Weights, gradients and optimizer state are float32. In a narrower compute dtype the matrices of products
    have a copy; of frozen ones, backward keeps it. For backward, a layer of the reference operators keeps
    about 4D + 2(H+G)K + 3F values per token in the compute dtype, and 6D + 2(H+G)K + 3F in float32 (norms,
    rotation, SwiGLU). A layer of the Triton operators keeps the former, and H + 2 in float32 (one sum per
    head and norm). With gradient checkpointing a layer keeps only its input, D.

    The reference loss holds the logits of one chunk of rows three times (the logits, their float32
    log-softmax and their gradient), and the float32 gradient of its matrix twice. The two others state
    what they take. With adapters, only they have gradients and states. A token matrix whose rows are trained
    is put together anew, and has a gradient.

    On several processes:
    - DDP holds all gradients once more in its buckets.
    - FSDP2 holds float32 shards of weights, gradients and states. `gathered` are the weights in the compute
      dtype: two layers at a time (one at work, one on its way) and everything outside the layers. Of their
      gradients there is one layer in the compute dtype, and one on its way in the reduce dtype. In a step of
      several micro-steps the `whole gradients` of all parameters wait for the last one, in the reduce dtype.
      With replicas, the shards of gradients that they summed in a narrower reduce dtype stay until backward
      ends, as `reduced`.
    - Tensor parallelism by t divides all of this except the norms. It divides a token's values except 2D, the
      gathered inputs of attention and MLP. Embedding and lm_head are gathered whole, in the compute dtype.

    Args:
        optimizer: "adamw" or "muon".
        has_average: whether the run keeps a moving average of the weights.
        has_row_means: whether Muon keeps a number for each row of its matrices, whole on every process.
        compute_bytes: of a number in the compute dtype.
        reduce_bytes: of a number that processes send each other to be summed.
        kernels: the name of the operators in use.
        frozen: None: every parameter is trained.
    """

    model: ModelConfig
    batches: BatchConfig
    optimizer: str
    compute_bytes: int
    device_type: str
    has_average: bool = False
    has_row_means: bool = False
    checkpointing: bool = False
    reduce_bytes: int = 4
    kernels: str = "reference"
    frozen: Frozen | None = None
    layout: Layout = Layout(1, 1, 1)  # noqa: RUF009 (a tuple)

    def by_part(self) -> dict[str, int]:
        """Bytes by part, and their sum as "total"."""
        parts = self._weights_and_states()
        tokens = self.batches.micro_batch_rows * self.batches.sequence_length
        parts["activations"] = tokens * self._kept_per_token()
        parts["loss"] = self._loss(tokens // self.layout.tensor)
        return {**parts, "total": sum(parts.values())}

    @property
    def _is_sharded(self) -> bool:
        return self.layout.shard > 1 or self.layout.tensor > 1

    @property
    def _copies_weights(self) -> bool:
        return self.compute_bytes < 4 and self.frozen is None and not self._is_sharded

    def _weights_and_states(self) -> dict[str, int]:
        """Weights, gradients and states, and the copies of them that exist for a time."""
        adapters, weight_bytes, rows_trained = self.frozen or Frozen(0, 4, True)
        model, layout = self.model, self.layout
        layer, root = parameters_held(model, layout.shard, layout.tensor)
        held, own_adapters = model.num_layers * layer + root, math.ceil(adapters / layout.shard)
        trained = own_adapters if self.frozen else held
        parts = {
            "weights": weight_bytes * held + 4 * own_adapters,
            "gradients": 4 * trained,
            "optimizer": 4 * self._states(trained),
        }
        if self.has_average:
            parts["average"] = 4 * trained
        embeddings = model.vocab_size * model.model_dim * (1 if model.tied_embeddings else 2)
        if self.frozen and rows_trained:
            parts["weights"] += weight_bytes * embeddings
        if self._is_sharded:
            return parts | self._gathered(adapters, trained, embeddings)
        if self.compute_bytes < weight_bytes:
            output = model.vocab_size * model.model_dim if self._copies_weights else 0
            parts["weights"] += self.compute_bytes * (held - embeddings + output)
        if layout.replicate > 1:
            parts["buckets"] = 4 * trained
        return parts

    def _states(self, trained: int) -> int:
        """Numbers of the optimizer's state: two per parameter, one where Muon trains it."""
        if self.optimizer == "adamw":
            return 2 * trained
        if self.frozen:
            return trained
        layer, _ = _held(self.model, self.layout.shard, self.layout.tensor)
        matrices = sum(held for name, held in layer.items() if name.endswith("proj.weight"))
        rows = rows_of_matrices(self.model) if self.has_row_means else 0
        return 2 * trained - self.model.num_layers * matrices + rows

    def _gathered(self, adapters: int, trained: int, embeddings: int) -> dict[str, int]:
        """What FSDP2 and tensor parallelism gather, and what waits to be summed."""
        model, layout, parts = self.model, self.layout, {}
        layer, root = parameters_held(model, 1, layout.tensor)
        if self.batches.micro_steps(layout.data) > 1:
            waiting = adapters if self.frozen else model.num_layers * layer + root
            parts["whole gradients"] = self.reduce_bytes * waiting
        if layout.replicate > 1 and self.reduce_bytes < 4:
            parts["reduced"] = self.reduce_bytes * trained
        weights = 2 * layer + root + (embeddings if layout.tensor > 1 else 0)
        gradients = 0 if self.frozen else (self.compute_bytes + self.reduce_bytes) * layer
        parts["gathered"] = self.compute_bytes * weights + gradients
        return parts

    def _kept_per_token(self) -> int:
        """Bytes that backward finds of one token of a micro-batch on this process."""
        model, tensor = self.model, self.layout.tensor
        dim, mlp = model.model_dim, model.mlp_dim
        heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
        wide = model.num_heads + 2 if self.kernels != "reference" else 6 * dim + heads + 3 * mlp
        whole = 2 * dim if tensor > 1 else 0
        shared = self.compute_bytes * (4 * dim - whole + heads + 3 * mlp) + 4 * wide
        per_layer = self.compute_bytes * whole + shared // tensor
        if self.checkpointing:
            return self.compute_bytes * model.num_layers * dim // tensor + per_layer
        return model.num_layers * per_layer

    def _loss(self, tokens: int) -> int:
        """What the loss of `tokens` tokens takes."""
        vocab, dim = self.model.vocab_size, self.model.model_dim
        rows_trained = self.frozen is None or self.frozen.rows
        if self.kernels == "triton":
            weight_bytes = self.frozen.weight_bytes if self.frozen else 4
            if self._is_sharded:
                weight_bytes = self.compute_bytes
            dtype, weight_dtype = (
                torch.float32 if size == 4 else torch.bfloat16 for size in (self.compute_bytes, weight_bytes)
            )
            return workspace_bytes(
                tokens,
                dim,
                vocab,
                dtype,
                weight_dtype,
                needs_dweight=rows_trained,
                device_type=self.device_type,
                has_copy=self._copies_weights,
            )
        if self.kernels == "native":
            dtype = torch.float32 if self.compute_bytes == 4 else torch.bfloat16
            return native_workspace_bytes(tokens, dim, vocab, dtype, rows_trained, self._copies_weights)
        rows = min(tokens, chunk_rows(vocab, self.device_type))
        matrix_gradients = 8 * vocab * dim if rows_trained else 0
        return (4 + 2 * self.compute_bytes) * rows * vocab + matrix_gradients
