"""Models for others: `lumi export` changes dtype and files, `lumi merge` joins an adapter and its base.

Both read the written folder back from disk and compare it with the model in memory before they report
success.
"""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.config import UserError
from lumi.formats.adapter_format import is_adapter
from lumi.formats.hf_format import DTYPES, load_model, save_model
from lumi.formats.model_parent import model_parents
from lumi.formats.pretrained import Pretrained, load_pretrained, locate
from lumi.host.storage import atomic_folder, check_output
from lumi.model.lora import merge_lora
from lumi.model.transformer import Transformer

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class MergeError(NamedTuple):
    """How well a merged model computes what base and adapter compute, by their logits in float64."""

    error: float  # the largest difference
    bound: float  # what float32 alone changes in the logits of base and adapter


class Exported(NamedTuple):
    """What was written, and how much the logits of a batch of tokens changed."""

    num_files: int  # of weights
    num_bytes: int
    difference: float  # the largest, from the logits of the float32 weights
    logit: float  # the largest of those logits, by size
    merging: MergeError | None = None

    def __str__(self) -> str:
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        compared = "are equal"
        if self.difference:
            compared = f"differ by at most {self.difference:.3g} from float32's (up to {self.logit:.3g})"
        size = f"{files} of weights, {self.num_bytes / 1e6:,.1f} MB"
        text = f"{size}; read back and compared: the logits {compared}"
        if self.merging is None:
            return text
        error, bound = self.merging
        merged = f"differ by at most {error:.3g} from base and adapter's, allowed {bound:.3g}"
        return f"{text}\nmerged in float64: the logits {merged}"


def export_model(
    model_path: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
    tokenizer_path: str | Path | None = None,
) -> Exported:
    """Write a whole model as a Hugging Face folder.

    Args:
        model_path: a run folder, its `final/`, or any folder that can be imported.
        dtype, max_shard_bytes: as for `save_model_tensors`.
        tokenizer_path: None: the one in the model's folder.

    Raises:
        UserError: `model_path` holds an adapter, `output_dir` is not empty, the disk is too small, or `dtype`
            is too narrow for a weight.
    """
    _check_output(output_dir)
    if is_adapter(folder := locate(model_path)):
        raise UserError(
            "--model-path",
            "must be a whole model",
            got=f"the adapter {folder}",
            remedy="`lumi merge` makes one of it and its base",
        )
    loaded = load_pretrained(folder, tokenizer_path=tokenizer_path, device="cpu", kernels="reference")
    return _write(Path(output_dir), loaded, dtype, max_shard_bytes)


def merge_adapter(
    model_path: str | Path,
    output_dir: str | Path,
    *,
    base_path: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> Exported:
    """Write an adapter and its base as one model, computed in float64 and rounded once.

    Args:
        model_path: an adapter's folder, or the run that made it.
        base_path: None: the base that the adapter names.
        dtype, max_shard_bytes: as for `save_model_tensors`.

    Raises:
        UserError: `model_path` holds no adapter; and as `export_model`.
    """
    _check_output(output_dir)
    if not is_adapter(adapter := locate(model_path)):
        got = f"the whole model {adapter}"
        raise UserError("--model-path", "must hold an adapter", got=got, remedy="there is nothing to merge")
    if base_path is None:
        loaded = load_pretrained(adapter, device="cpu", kernels="reference")
    else:
        loaded = load_pretrained(base_path, adapter_path=adapter, device="cpu", kernels="reference")
    merging = _merge_and_compare(loaded.model)
    return _write(Path(output_dir), loaded, dtype, max_shard_bytes)._replace(merging=merging)


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB" (2 * 10**9, as in transformers), "500MiB" or "1000". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise UserError("--max-shard-size", "must be a size such as 2GB, 500MB or 1GiB", got=repr(text))
    return size


def _check_output(output_dir: str | Path) -> None:
    path = Path(output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("--output-dir", "must be new or empty", got=path, remedy="choose another")
    check_output(path, renamed=True)


def _write(output_dir: Path, loaded: Pretrained, dtype: str, max_shard_bytes: int | None) -> Exported:
    """Write, read back and compare. `output_dir` appears only when all is well."""
    model, tokenizer = loaded.model, loaded.tokenizer
    exact, parents = _logits(model), model_parents(loaded)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
        if not parameter.isfinite().all():
            raise UserError(
                "--dtype",
                "must be able to hold every weight",
                got=f"{dtype}, in which {name} is not finite",
                remedy="take bfloat16 or float32",
            )
    expected = _logits(model)
    with atomic_folder(output_dir) as temporary:
        _check_space(temporary, model.config.num_parameters * DTYPES[dtype].itemsize)
        try:
            save_model(temporary, model, tokenizer, dtype, max_shard_bytes, parents)
        except OSError as error:
            raise UserError(
                f"{output_dir}: cannot be written: {error.strerror}; nothing was left there"
            ) from error
        reread = load_model(temporary, model.ops, tokenizer=tokenizer)
        if not (_same_weights(model, reread) and torch.equal(_logits(reread), expected)):
            fault = "what was read back is not what was written; nothing was left there"
            raise UserError(f"{output_dir}: {fault}", remedy="check the disk")
        files = [path.stat().st_size for path in temporary.glob("*.safetensors")]
    return Exported(len(files), sum(files), (expected - exact).abs().max().item(), exact.abs().max().item())


def _same_weights(one: Transformer, other: Transformer) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return all(torch.equal(weights[name], others[name]) for name in weights)


def _check_space(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        space = f"must have {needed / 1e9:.2f} GB of space for the weights"
        raise UserError("--output-dir", space, got=f"{free / 1e9:.2f} GB", remedy="free some")


def _merge_and_compare(model: Transformer) -> MergeError:
    """Merge in place, in float64, compare with base and adapter there, and round to float32.

    The comparison is in float64, because the merged model in float32 cannot meet the bound: an adapter of low
        rank
    and large scale computes more precisely than any float32 matrix that replaces it.
    """
    rounded = _logits(model)
    model.double().compute_dtype = torch.float64
    exact = _logits(model)
    merge_lora(model)
    error, bound = ((other - exact).abs().max().item() for other in (_logits(model), rounded))
    model.float().compute_dtype = torch.float32
    if not error <= bound:
        expectation = f"must compute what base and adapter compute to {bound:.3g}"
        raise UserError("the merged model", expectation, got=f"{error:.3g}", remedy="report this")
    return MergeError(error, bound)


@torch.inference_mode()
def _logits(model: Transformer) -> Tensor:
    """The logits of a fixed batch of tokens, (2, T, V), in the model's own precision."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(64, model.config.max_positions))
    hidden = model.hidden(torch.randint(model.config.vocab_size, shape, generator=generator))
    return F.linear(hidden, model.output_weight.to(hidden.dtype))
