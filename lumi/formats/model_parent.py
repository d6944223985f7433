"""A model, an adapter or a checkpoint as what something is made from."""

from pathlib import Path

from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.formats.adapter_format import WEIGHTS, is_adapter
from lumi.formats.checkpoint_folder import is_checkpoint
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.gguf_file import GGUF, is_gguf
from lumi.formats.pretrained import Pretrained
from lumi.host.provenance import Parent
from lumi.host.storage import sha256_file


def model_parent(folder: Path, fingerprint: str | None = None) -> Parent:
    """A folder with a model, an adapter or a checkpoint, or a GGUF file.

    Args:
        fingerprint: `weights_fingerprint` of a model, where it is known: it reads all weights.

    Raises:
        UserError: the folder holds no model, or is damaged.
    """
    if is_gguf(folder):
        return Parent(GGUF, folder, sha256_file(folder))
    if is_checkpoint(folder):
        return open_checkpoint(folder).as_parent
    if is_adapter(folder):
        return Parent("adapter", folder, sha256_file(folder / WEIGHTS))
    return Parent("model", folder, fingerprint or weights_fingerprint(folder))


def model_parents(pretrained: Pretrained) -> list[Parent]:
    """Model and adapter that were loaded. Raises UserError as `model_parent`."""
    folders = (pretrained.adapter, pretrained.folder)
    return [model_parent(folder) for folder in folders if folder is not None]
