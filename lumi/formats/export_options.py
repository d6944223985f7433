"""The options of `lumi export` and `lumi merge` -> what they write."""

import re

from lumi.config import UserError
from lumi.formats.export_form import ExportForm, HuggingFaceFolder
from lumi.formats.gguf_export import GgufFolder

FORMATS = ("hf", "gguf")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB" (2 * 10**9, as in transformers), "500MiB" or "1000". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise UserError("--max-shard-size", "must be a size such as 2GB, 500MB or 1GiB", got=repr(text))
    return size


def form_of(
    file_format: str,
    *,
    dtype: str | None,
    max_shard_size: str | None,
    quantize: str | None,
    licence: str | None,
) -> ExportForm:
    """The form that options of the command line ask for. None: not given.

    Raises:
        UserError: an option has no effect in the format.
    """
    of_folders = {"--dtype": dtype, "--max-shard-size": max_shard_size}
    of_gguf = {"--quantize": quantize, "--license": licence}
    foreign, instead = (of_folders, "hf") if file_format == "gguf" else (of_gguf, "gguf")
    for option, value in foreign.items():
        if value is not None:
            expectation = f"must come with --format {instead}"
            remedy = "--quantize is its precision" if option == "--dtype" else "leave it out"
            raise UserError(option, expectation, got=f"--format {file_format}", remedy=remedy)
    if file_format == "gguf":
        return GgufFolder(quantize or "f32", licence)
    return HuggingFaceFolder(dtype or "float32", parse_size(max_shard_size) if max_shard_size else None)
