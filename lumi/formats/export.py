"""Models for others: `lumi export` writes one in another precision or in several files, `lumi merge` one of a base and its adapter.

Nothing is called done before it was read back from disk and compared with the model in memory.
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
from lumi.formats.pretrained import load_pretrained, locate
from lumi.host.storage import atomic_folder
from lumi.model.lora import merge_lora
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Exported(NamedTuple):
    """What was written, and the largest differences of the logits over a batch of tokens.

    num_files, num_bytes: of the weights. difference: from the logits in float32, of which the largest is `logit`.
    merging: of a merge, how far it is from base and adapter, both in float64, and the bound: what float32 costs base and adapter.
    """

    num_files: int
    num_bytes: int
    difference: float
    logit: float
    merging: tuple[float, float] | None = None

    def __str__(self) -> str:
        files = (
            f"{self.num_files} file{'s' * (self.num_files > 1)} of weights, {self.num_bytes / 1e6:,.1f} MB"
        )
        difference = (
            f"differ by at most {self.difference:.3g} from float32's (up to {self.logit:.3g})"
            if self.difference
            else "are equal"
        )
        lines = [f"{files}; read back and compared: the logits {difference}"]
        if self.merging is not None:
            lines.append(
                "merged in float64: the logits differ by at most {:.3g} from base and adapter's, allowed {:.3g}".format(
                    *self.merging
                )
            )
        return "\n".join(lines)


def export(
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
        dtype, max_shard_bytes: as for `save_model`.
        tokenizer_path: None: the one in the model's folder.

    Raises:
        UserError: `model_path` holds an adapter, `output_dir` is not empty, the disk too small, or `dtype` too narrow for a weight.
    """
    _check_output(output_dir)
    if is_adapter(folder := locate(model_path)):
        raise UserError(
            f"--model-path must be a whole model, got the adapter {folder}; `lumi merge` makes one of it and its base"
        )
    model, tokenizer, *_ = load_pretrained(folder, tokenizer_path=tokenizer_path, device="cpu")
    return _write(Path(output_dir), model, tokenizer, dtype, max_shard_bytes)


def merge(
    model_path: str | Path,
    output_dir: str | Path,
    *,
    base_path: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> Exported:
    """Write the model that an adapter and its base make together, computed in float64 and rounded once.

    Args:
        model_path: an adapter's folder, or the run that made it.
        base_path: None: the base that the adapter names.
        dtype, max_shard_bytes: as for `save_model`.

    Raises:
        UserError: `model_path` holds no adapter; and as `export`.
    """
    _check_output(output_dir)
    if not is_adapter(adapter := locate(model_path)):
        raise UserError(
            f"--model-path must hold an adapter, got the whole model {adapter}; nothing is to be merged"
        )
    if base_path is None:
        model, tokenizer, *_ = load_pretrained(adapter, device="cpu")
    else:
        model, tokenizer, *_ = load_pretrained(base_path, adapter_path=adapter, device="cpu")
    merging = _merge_and_compare(model)
    return _write(Path(output_dir), model, tokenizer, dtype, max_shard_bytes)._replace(merging=merging)


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB" (10**9, as transformers reads it), "500MiB" or "1000". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise UserError(f"--max-shard-size must be a size such as 2GB, 500MB or 1GiB, got {text!r}")
    return size


def _check_output(output_dir: str | Path) -> None:
    path = Path(output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output-dir must be new or empty, got {path}; choose another")


def _write(
    output_dir: Path, model: Transformer, tokenizer: Tokenizer, dtype: str, max_shard_bytes: int | None
) -> Exported:
    """Write, read back and compare; `output_dir` appears when all is well."""
    exact = _logits(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
        if not parameter.isfinite().all():
            raise UserError(
                f"--dtype must be able to hold every weight, got {dtype}, in which {name} is not finite; take bfloat16 or float32"
            )
    expected = _logits(model)
    with atomic_folder(output_dir) as temporary:
        _check_space(temporary, model.config.num_parameters * DTYPES[dtype].itemsize)
        try:
            save_model(temporary, model, tokenizer, dtype, max_shard_bytes)
        except OSError as error:
            raise UserError(
                f"{output_dir}: cannot be written: {error.strerror}; nothing was left there"
            ) from error
        reread = load_model(temporary, model.ops, tokenizer=tokenizer)
        weights, rewritten = model.state_dict(), reread.state_dict()
        if not all(torch.equal(weights[name], rewritten[name]) for name in weights) or not torch.equal(
            _logits(reread), expected
        ):
            raise UserError(
                f"{output_dir}: what was read back is not what was written; nothing was left there, check the disk"
            )
        files = [path.stat().st_size for path in temporary.glob("*.safetensors")]
    return Exported(len(files), sum(files), (expected - exact).abs().max().item(), exact.abs().max().item())


def _check_space(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"--output-dir must have {needed / 1e9:.2f} GB of space for the weights, got {free / 1e9:.2f} GB; free some"
        )


def _merge_and_compare(model: Transformer) -> tuple[float, float]:
    """Merge in place, in float64, and round to float32. Returns how far the logits moved in float64, and the bound.

    The bound is what rounding to float32 alone changes in the logits of base and adapter. The merged model in float32 could not be
    held to it: an adapter of low rank and large scale computes more precisely than any matrix that replaces it.
    """
    rounded = _logits(model)
    model.double().compute_dtype = torch.float64
    exact = _logits(model)
    merge_lora(model)
    error, bound = ((other - exact).abs().max().item() for other in (_logits(model), rounded))
    model.float().compute_dtype = torch.float32
    if not error <= bound:
        raise UserError(
            f"the merged model must compute what base and adapter compute to {bound:.3g}, got {error:.3g}; report this"
        )
    return error, bound


@torch.inference_mode()
def _logits(model: Transformer) -> Tensor:
    """(2, T, V) in the model's own precision, for a fixed batch of tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(64, model.config.max_positions))
    hidden = model.hidden(torch.randint(model.config.vocab_size, shape, generator=generator))
    return F.linear(hidden, model.output_weight.to(hidden.dtype))
