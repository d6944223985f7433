"""Which files of a model folder go to the hub: those that a model or an adapter is made of."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from lumi.config import UserError
from lumi.formats.adapter_format import WEIGHTS, is_adapter
from lumi.formats.checkpoint_folder import is_checkpoint
from lumi.formats.hf_format import INDEX, weight_files
from lumi.formats.peft_config import CONFIG
from lumi.tokenizer.files import GENERATION_FILE

CARD, PICTURE = "README.md", "loss.png"
_TOKENIZER = """
    tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    chat_template.jinja
""".split()
_LEGAL = ["LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"]
_OURS = re.compile(
    "|".join(map(re.escape, ["config.json", GENERATION_FILE, *_TOKENIZER, CONFIG, WEIGHTS, INDEX]))
    + r"|model(-\d{5}-of-\d{5})?\.safetensors"
)


class Upload(NamedTuple):
    """A file in the repository, and where its bytes are."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


class Files(NamedTuple):
    """What is sent, and the names of what is left out. The card is in neither."""

    uploads: list[Upload]
    left_out: list[str]


def choose_files(folder: Path) -> Files:
    """The files of a model, or of an adapter.

    Raises:
        UserError: the folder is a checkpoint, a file of weights is missing, or a file is a link to elsewhere.
    """
    if is_checkpoint(folder):
        remedy = "`lumi export` makes one of it, with an adapter `lumi merge`"
        got = f"the checkpoint {folder}, which holds states of the optimizer"
        raise UserError("RUN", "must be a run or a model folder", got=got, remedy=remedy)
    if is_adapter(folder):
        needed = [CONFIG, WEIGHTS]
    else:
        weights = [path.name for path in weight_files(folder)]
        needed = ["config.json", *weights, *([INDEX] if "model.safetensors" not in weights else [])]
    optional = [GENERATION_FILE, *_TOKENIZER, *_LEGAL]
    chosen = [*needed, *(name for name in optional if os.path.lexists(folder / name))]
    for name in chosen:
        _check_file(folder, name)
    there = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    left_out = [name for name in there if name not in (*chosen, CARD)]
    return Files([Upload(name, folder / name) for name in chosen], left_out)


def _check_file(folder: Path, name: str) -> None:
    """Raises UserError unless it is a file that lies in the folder itself."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}:", "must be a file", got="none", remedy="copy the whole folder again")
    if path.resolve().parent != folder.resolve():
        got, remedy = (
            f"a link to {path.resolve()}",
            "push a copy, such as `lumi export` writes",
        )
        raise UserError(f"{path}:", "must lie in the folder itself", got=got, remedy=remedy)


def is_stale(name: str, uploads: list[Upload]) -> bool:
    """Whether a file in the repository is of a model that was there before, and would spoil this one."""
    return _OURS.fullmatch(name) is not None and name not in {upload.name for upload in uploads}
