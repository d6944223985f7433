"""The corpora behind a model, by the records that `lumi verify` follows."""

from pathlib import Path

from lumi.config import UserError
from lumi.corpus.folder import Manifest, read_manifest
from lumi.formats.gguf_file import GGUF
from lumi.formats.pretrained import Pretrained
from lumi.provenance.artifacts import KINDS, Record, is_artifact, kind_of

# What identifies them is in all of their bytes, which may take minutes to read. `lumi verify` does it.
LARGE = ("model", GGUF)


def training_corpora(pretrained: Pretrained) -> dict[Path, Manifest | None]:
    """The corpora that the weights of a model and its adapter were trained on, by their folders.

    Data must be what was recorded; of weights only the place is compared. Where a chain ends without a
    corpus, because nothing is recorded or something is missing, damaged or another one now, that place has
    None.
    """
    found: dict[Path, Manifest | None] = {}
    for folder in (pretrained.adapter, pretrained.folder):
        if folder is not None:
            _follow(_kind_of(folder), folder, None, found)
    return found


def _kind_of(folder: Path) -> str:
    try:
        return kind_of(folder) or "unknown"
    except UserError:  # damaged
        return "unknown"


def _follow(kind: str, path: Path, wanted: str | None, found: dict[Path, Manifest | None]) -> None:
    """Add the corpora behind an artefact. `wanted`: the identity that was recorded of it."""
    if kind == "tokenizer":  # the weights have learned nothing of what it was made from
        return
    record = _record(kind, path, wanted)
    if record is not None and kind == "corpus":
        found[path] = read_manifest(path)
    elif record is None or not record.parents:
        found[path] = None
    else:
        for parent in record.parents:
            _follow(*parent, found)


def _record(kind: str, path: Path, wanted: str | None) -> Record | None:
    """What an artefact says of itself; None: it is not there, damaged or another one."""
    try:
        if kind not in KINDS or not is_artifact(path, kind):
            return None
        if wanted is not None and kind not in LARGE and KINDS[kind].identity(path) != wanted:
            return None
        return KINDS[kind].record(path)
    except (UserError, FileNotFoundError):
        return None
