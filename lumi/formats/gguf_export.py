"""A model as a GGUF file for llama.cpp, with a `Modelfile` for Ollama."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lumi.formats.export_form import Written
from lumi.formats.gguf_file import GGUF, SUFFIX, bytes_of, is_gguf, library, open_gguf, write_gguf
from lumi.formats.gguf_shape import FREQUENCIES, architecture_of, period_factors, to_metadata
from lumi.formats.gguf_tokenizer import read_tokenizer
from lumi.formats.gguf_vocabulary import to_vocabulary
from lumi.formats.gguf_weights import BLOCK, Order, WeightTypes, gguf_name, load_model
from lumi.formats.ollama import MODELFILE, modelfile
from lumi.formats.pretrained import Pretrained
from lumi.host.provenance import Parent, record_files, write_provenance
from lumi.host.storage import DamagedError
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

_LICENCE = re.compile(r"""license: *['"]?([^\s'"]+)""")
_LICENCE_KEY = "general.license"


@dataclass(frozen=True)
class GgufFolder:
    """A folder with one GGUF file and a `Modelfile`.

    Args:
        quantise: a name of `lumi.formats.gguf_weights.QUANTISATIONS`.
        licence: None: the one that the model's README.md or GGUF file names, if any.
    """

    quantise: str = "f32"
    licence: str | None = None
    option = "--quantize"
    wider = "take bf16 or f32"

    @property
    def precision(self) -> str:
        """As in `ExportForm`."""
        return self.quantise

    @property
    def file_name(self) -> str:
        """Of the model in the folder."""
        return f"model-{self.quantise}{SUFFIX}"

    def check(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """As in `ExportForm`."""
        library()
        to_metadata(model.config)
        to_vocabulary(tokenizer, model.config.vocab_size)

    def round(self, model: Transformer, name: str, weight: Tensor) -> Tensor:
        """As in `ExportForm`."""
        return self._types(model).round(name, weight)

    def num_bytes(self, model: Transformer) -> int:
        """As in `ExportForm`."""
        return sum(bytes_of(shape, kind) for shape, kind in self._plan(model).values())

    def save(self, folder: Path, name: str, pretrained: Pretrained, parents: Sequence[Parent]) -> Written:
        """As in `ExportForm`."""
        model, tokenizer = pretrained.model, pretrained.tokenizer
        vocabulary = to_vocabulary(tokenizer, model.config.vocab_size)
        metadata = self._general(name, pretrained.folder) | to_metadata(model.config) | vocabulary.metadata
        names = {gguf_name(ours): ours for ours in model.state_dict()}
        weights, order, factors = model.state_dict(), Order(model.config), period_factors(model.config)

        def tensor(theirs: str) -> Tensor:
            if theirs == FREQUENCIES and factors is not None:
                return factors
            return order.to_theirs(names[theirs], weights[names[theirs]])

        file = folder / self.file_name
        write_gguf(file, architecture_of(model.config), metadata, self._plan(model), tensor)
        (folder / MODELFILE).write_text(modelfile(self.file_name, tokenizer), encoding="utf-8")
        write_provenance(folder, GGUF, parents, record_files(folder))
        notes = [*_describe(self._types(model).fallbacks(weights)), *vocabulary.notes]
        return Written(1, file.stat().st_size, notes)

    def load(self, folder: Path, model: Transformer, tokenizer: Tokenizer) -> Transformer:
        """As in `ExportForm`."""
        file = open_gguf(folder / self.file_name)
        if not read_tokenizer(file).extends(tokenizer):
            raise DamagedError(f"{file.path}: the vocabulary that was read back is not what was written")
        return load_model(file, model.ops)

    def _types(self, model: Transformer) -> WeightTypes:
        return WeightTypes(model.config, self.quantise)

    def _plan(self, model: Transformer) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each tensor, by llama.cpp's names."""
        types, plan = self._types(model), {}
        for name, weight in model.state_dict().items():
            plan[gguf_name(name)] = tuple(weight.shape), types.of(name, tuple(weight.shape))
        if (factors := period_factors(model.config)) is not None:
            plan[FREQUENCIES] = tuple(factors.shape), "F32"
        return plan

    def _general(self, name: str, source: Path) -> dict[str, Any]:
        gguf = library()
        file_type = "ALL_F32" if self.quantise == "f32" else f"MOSTLY_{self.quantise.upper()}"
        metadata: dict[str, Any] = {"general.type": "model", "general.name": name}
        if licence := self.licence or licence_of(source):
            metadata[_LICENCE_KEY] = licence
        metadata["general.file_type"] = int(gguf.LlamaFileType[file_type])
        metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
        return metadata


def licence_of(source: Path) -> str | None:
    """The licence of a model: what stands above the text of its README.md, or in the GGUF file."""
    if is_gguf(source):
        return open_gguf(source).value(_LICENCE_KEY, str, "") or None
    readme = source / "README.md"
    lines = readme.read_text("utf-8", "replace").splitlines() if readme.is_file() else []
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    found = filter(None, map(_LICENCE.match, lines[1 : lines.index("---", 1)]))
    return next((match[1] for match in found), None)


def _describe(fallbacks: list[str]) -> list[str]:
    """One line about matrices of which a quantised type cannot cut the rows into blocks."""
    if not fallbacks:
        return []
    counts = Counter(re.sub(r"blk\.\d+\.", "", name) for name in fallbacks)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    return [f"f16, since their rows are no multiple of {BLOCK}: {listed}"]
