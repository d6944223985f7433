"""What `lumi export` and `lumi merge` write: in which format, and how precisely."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from lumi.formats.hf_format import DTYPES, load_model, save_model
from lumi.formats.pretrained import Pretrained
from lumi.host.provenance import Parent
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer


class Written(NamedTuple):
    """What lies in the folder."""

    num_files: int  # of weights
    num_bytes: int
    notes: Sequence[str] = ()  # what the user should know, a line each


class ExportForm(Protocol):
    """A format and a precision.

    Attributes:
        option: of the command line, which chose the precision.
        precision: its value.
        wider: what to do where a weight does not fit.
    """

    option: str
    wider: str

    @property
    def precision(self) -> str: ...

    def check(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Raises UserError if the format cannot hold a model or its tokenizer."""

    def round(self, model: Transformer, name: str, weight: Tensor) -> Tensor:
        """A weight in float32, as it is read back; not finite where the precision is too narrow."""

    def num_bytes(self, model: Transformer) -> int:
        """The bytes of the weights on disk."""

    def save(self, folder: Path, name: str, pretrained: Pretrained, parents: Sequence[Parent]) -> Written:
        """Write all files into an empty folder, which will be called `name`, and what they were made from.

        Raises:
            OSError: they cannot be written.
        """

    def load(self, folder: Path, model: Transformer, tokenizer: Tokenizer) -> Transformer:
        """Read the folder back. `model` gives the operators."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder for transformers.

    Args:
        dtype, max_shard_bytes: as for `save_model_tensors`.
    """

    dtype: str = "float32"
    max_shard_bytes: int | None = None
    option = "--dtype"
    wider = "take bfloat16 or float32"

    @property
    def precision(self) -> str:
        """As in `ExportForm`."""
        return self.dtype

    def check(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """As in `ExportForm`: it holds everything."""

    def round(self, model: Transformer, name: str, weight: Tensor) -> Tensor:
        """As in `ExportForm`."""
        return weight.to(DTYPES[self.dtype]).float()

    def num_bytes(self, model: Transformer) -> int:
        """As in `ExportForm`."""
        return model.config.num_parameters * DTYPES[self.dtype].itemsize

    def save(self, folder: Path, name: str, pretrained: Pretrained, parents: Sequence[Parent]) -> Written:
        """As in `ExportForm`."""
        model, tokenizer = pretrained.model, pretrained.tokenizer
        save_model(folder, model, tokenizer, self.dtype, self.max_shard_bytes, parents)
        files = [path.stat().st_size for path in folder.glob("*.safetensors")]
        return Written(len(files), sum(files))

    def load(self, folder: Path, model: Transformer, tokenizer: Tokenizer) -> Transformer:
        """As in `ExportForm`."""
        return load_model(folder, model.ops, tokenizer=tokenizer)
