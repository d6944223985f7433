"""Models for others: `lumi export` changes precision and format, `lumi merge` joins an adapter and its base.

Both read what was written back from disk and compare it with the model in memory before they report success.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.config import UserError
from lumi.formats.adapter_format import is_adapter
from lumi.formats.export_form import ExportForm, HuggingFaceFolder, Written
from lumi.formats.gguf_file import is_gguf
from lumi.formats.model_parent import model_parents
from lumi.formats.pretrained import Pretrained, load_pretrained, locate
from lumi.host.storage import atomic_folder, check_output
from lumi.model.lora import merge_lora
from lumi.model.transformer import Transformer

FLOAT32_FOLDER = HuggingFaceFolder()


class MergeError(NamedTuple):
    """How well a merged model computes what base and adapter compute, by their logits in float64."""

    error: float  # the largest difference
    bound: float  # what float32 alone changes in the logits of base and adapter


class Exported(NamedTuple):
    """What was written, and how much the logits of a batch of tokens changed."""

    written: Written
    difference: float  # the largest, from the logits of the float32 weights
    logit: float  # the largest of those logits, by size
    merging: MergeError | None = None

    def __str__(self) -> str:
        num_files = self.written.num_files
        files = "1 file" if num_files == 1 else f"{num_files} files"
        compared = "are equal"
        if self.difference:
            compared = f"differ by at most {self.difference:.3g} from float32's (up to {self.logit:.3g})"
        size = f"{files} of weights, {self.written.num_bytes / 1e6:,.1f} MB"
        lines = [f"{size}; read back and compared: the logits {compared}", *self.written.notes]
        if self.merging is not None:
            error, bound = self.merging
            merged = f"differ by at most {error:.3g} from base and adapter's, allowed {bound:.3g}"
            lines.append(f"merged in float64: the logits {merged}")
        return "\n".join(lines)


def export_model(
    model_path: str | Path,
    output_dir: str | Path,
    *,
    form: ExportForm = FLOAT32_FOLDER,
    tokenizer_path: str | Path | None = None,
) -> Exported:
    """Write a whole model for other programs.

    Args:
        model_path: a run folder, its `final/`, any folder that can be imported, or a GGUF file.
        tokenizer_path: None: the one in the model's folder or file.

    Raises:
        UserError: `model_path` holds an adapter, `output_dir` is not empty, the disk is too small, or `form`
            cannot hold the model, its tokenizer or a weight.
    """
    _check_output(output_dir)
    folder = Path(model_path) if is_gguf(model_path) else locate(model_path)
    if is_adapter(folder):
        raise UserError(
            "--model-path",
            "must be a whole model",
            got=f"the adapter {folder}",
            remedy="`lumi merge` makes one of it and its base",
        )
    pretrained = load_pretrained(folder, tokenizer_path=tokenizer_path, device="cpu", kernels="reference")
    return _write(Path(output_dir), pretrained, form)


def merge_adapter(
    model_path: str | Path,
    output_dir: str | Path,
    *,
    base_path: str | Path | None = None,
    form: ExportForm = FLOAT32_FOLDER,
) -> Exported:
    """Write an adapter and its base as one model, computed in float64 and rounded once.

    Args:
        model_path: an adapter's folder, or the run that made it.
        base_path: None: the base that the adapter names.

    Raises:
        UserError: `model_path` holds no adapter; and as `export_model`.
    """
    _check_output(output_dir)
    if not is_adapter(adapter := locate(model_path)):
        got = f"the whole model {adapter}"
        raise UserError("--model-path", "must hold an adapter", got=got, remedy="there is nothing to merge")
    if base_path is None:
        pretrained = load_pretrained(adapter, device="cpu", kernels="reference")
    else:
        pretrained = load_pretrained(base_path, adapter_path=adapter, device="cpu", kernels="reference")
    merging = _merge_and_compare(pretrained.model)
    return _write(Path(output_dir), pretrained, form)._replace(merging=merging)


def _check_output(output_dir: str | Path) -> None:
    path = Path(output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("--output-dir", "must be new or empty", got=path, remedy="choose another")
    check_output(path, renamed=True)


def _write(output_dir: Path, pretrained: Pretrained, form: ExportForm) -> Exported:
    """Write, read back and compare. `output_dir` appears only when all is well."""
    model, tokenizer = pretrained.model, pretrained.tokenizer
    form.check(model, tokenizer)
    exact, parents = _logits(model), model_parents(pretrained)
    for name, parameter in model.named_parameters():
        parameter.data = form.round(model, name, parameter.data)
        if not parameter.isfinite().all():
            got = f"{form.precision}, in which {name} is not finite"
            expectation, remedy = "must be able to hold every weight", form.wider
            raise UserError(form.option, expectation, got=got, remedy=remedy)
    expected = _logits(model.join_weights())
    with atomic_folder(output_dir) as temporary:
        _check_space(temporary, form.num_bytes(model))
        try:
            written = form.save(temporary, output_dir.name, pretrained, parents)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{output_dir}: cannot be written: {reason}; nothing was left there") from error
        reread = form.load(temporary, model, tokenizer).join_weights()  # the same sums, in the same order
        if not (_same_weights(model, reread) and torch.equal(_logits(reread), expected)):
            fault = "what was read back is not what was written; nothing was left there"
            raise UserError(f"{output_dir}: {fault}", remedy="check the disk")
    return Exported(written, (expected - exact).abs().max().item(), exact.abs().max().item())


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
