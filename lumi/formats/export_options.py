"""The options of `lumi export` and `lumi merge` -> what they write."""

from lumi.command_line import parse_size
from lumi.config import UserError
from lumi.formats.export_form import ExportForm, HuggingFaceFolder
from lumi.formats.gguf_export import GgufFolder

FORMATS = ("hf", "gguf")


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
    size = parse_size("--max-shard-size", max_shard_size) if max_shard_size is not None else None
    return HuggingFaceFolder(dtype or "float32", size)
