"""The weights of a model as GGUF tensors: their names, their order in memory, and their types."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lumi.config import UserError
from lumi.formats.gguf_file import GgufFile, rounded
from lumi.formats.gguf_shape import FREQUENCIES, architecture_of, read_shape
from lumi.kernels.bundle import Ops
from lumi.kernels.rope_scaling import Llama3Scaling
from lumi.model.model_config import ModelConfig
from lumi.model.transformer import Transformer

QUANTISATIONS = ("f32", "f16", "bf16", "q8_0", "q4_0")
BLOCK = 32  # weights of a row that share a scale
_FALLBACK = "F16"  # of rows that are no whole number of blocks
_NAMES = {  # ours -> theirs, in this order
    "token_embedding.": "token_embd.",
    "final_norm.": "output_norm.",
    "lm_head.": "output.",
    "layers.": "blk.",
    "attention_norm.": "attn_norm.",
    "mlp_norm.": "ffn_norm.",
    "attention.q_norm.": "attn_q_norm.",
    "attention.k_norm.": "attn_k_norm.",
    "attention.q_proj.": "attn_q.",
    "attention.k_proj.": "attn_k.",
    "attention.v_proj.": "attn_v.",
    "attention.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}


def gguf_name(name: str) -> str:
    """Our parameter name in llama.cpp's spelling."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


@dataclass(frozen=True)
class WeightTypes:
    """Which type each weight of a model gets.

    Norms and biases stay f32. Of a q4_0 model, the matrix that makes the logits is q8_0, as llama.cpp keeps
    that one wider.

    Attributes:
        config: of the model.
        quantise: one of `QUANTISATIONS`.
    """

    config: ModelConfig
    quantise: str

    def of(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of a weight, by our name, in GGUF's spelling."""
        kind = self.quantise.upper()
        if len(shape) == 1:
            return "F32"
        if kind == "Q4_0" and name == self._makes_logits:
            kind = "Q8_0"
        return _FALLBACK if self._is_blocked and shape[-1] % BLOCK else kind

    def fallbacks(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The matrices that cannot have the type that was asked for, by llama.cpp's names."""
        matrices = [name for name, weight in weights.items() if weight.ndim > 1] if self._is_blocked else []
        return [gguf_name(name) for name in matrices if weights[name].shape[-1] % BLOCK]

    @property
    def _is_blocked(self) -> bool:
        return self.quantise.startswith("q")

    @property
    def _makes_logits(self) -> str:
        return "token_embedding.weight" if self.config.tied_embeddings else "lm_head.weight"

    def round(self, name: str, weight: Tensor) -> Tensor:
        """A weight, by our name, as it is read back."""
        return rounded(weight, self.of(name, tuple(weight.shape)))


class Order:
    """The order of the rows of q and k.

    We turn a head's first half with its second, as transformers does. llama.cpp's `llama` and `smollm3` turn
    neighbours. The other architectures are as ours.
    """

    def __init__(self, config: ModelConfig) -> None:
        is_permuted = architecture_of(config) in ("llama", "smollm3")
        self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if is_permuted else {}

    def to_theirs(self, name: str, weight: Tensor) -> Tensor:
        """A weight, by our name, as llama.cpp has it."""
        if (heads := self._heads_of(name)) is None:
            return weight
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)

    def to_ours(self, name: str, weight: Tensor) -> Tensor:
        """The inverse of `to_theirs`."""
        if (heads := self._heads_of(name)) is None:
            return weight
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)

    def _heads_of(self, name: str) -> int | None:
        return self._heads.get(name.split(".")[-2])


def load_model(file: GgufFile, ops: Ops, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in a file, its weights in float32.

    Raises:
        UserError: the metadata ask for what our model does not compute; a weight is missing, has another
            shape or type, or has no place in the model.
    """
    config = read_shape(file)
    if (name := f"blk.{config.num_layers - 1}.attn_norm.weight") not in file.tensors:
        raise UserError(f"{file.path}: {name} is missing among the tensors, the last of block_count layers")
    with torch.device("meta"):  # a file may ask for more memory than there is
        expected = Transformer(config, ops).state_dict()
    names = {gguf_name(name): name for name in expected}
    shapes = {theirs: tuple(expected[ours].shape) for theirs, ours in names.items()}
    if isinstance(config.rope_scaling, Llama3Scaling):
        shapes[FREQUENCIES] = (config.head_dim // 2,)  # was read with the shape
    _check_tensors(file, shapes)
    model = Transformer(config, ops, compute_dtype=compute_dtype)
    weights, order = model.state_dict(), Order(config)
    with torch.no_grad():
        for theirs, ours in names.items():
            weights[ours].copy_(order.to_ours(ours, file.tensor(theirs)))
    return model


def _check_tensors(file: GgufFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if a file lacks a tensor, or has one of another shape or one more."""
    for name, shape in expected.items():
        got = file.shape(name) if name in file.tensors else "nothing"
        if got != shape:
            raise UserError(f"{file.path}: {name}", f"must have shape {shape}", got=got)
    if unknown := [name for name in file.tensors if name not in expected]:
        fault = "holds a weight that this model has no place for"
        raise UserError(f"{file.path}: {fault}: {unknown[0]} ({len(unknown)} in all)")
