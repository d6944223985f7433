"""A folder or file -> the tokenizer in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lumi.config import UserError, read_json
from lumi.tokenizer.files import (
    FINGERPRINT_KEY,
    JSON_FILE,
    MAKE_ONE,
    MODEL_FILE,
    Surroundings,
    read_surroundings,
)
from lumi.tokenizer.sentencepiece_bpe import SentencePieceTokenizer, is_of_the_recipe
from lumi.tokenizer.sentencepiece_import import convert
from lumi.tokenizer.tokenizer import Tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's file."""
    return any((Path(folder) / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer folder, or its `tokenizer.model` or `tokenizer.json`.

    A model of Lumi's is read from `tokenizer.model`. Others are read from `tokenizer.json`, as transformers
    does, or from `tokenizer.model` where that is all there is.

    Raises:
        UserError: nothing there, a corrupt model, or one that cannot be imported. It names the command
            that makes one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not (path.is_file() or (path.is_dir() and has_tokenizer(path))):
        what = f"the folder holds no {MODEL_FILE} and no {JSON_FILE}"
        what = what if path.is_dir() else "there is no such file or folder"
        expectation = f"must be a tokenizer folder or its {MODEL_FILE} or {JSON_FILE}, but {what}"
        raise UserError(f"{path}:", expectation, remedy=MAKE_ONE)
    tokenizer = _load(path, folder)
    tokenizer.folder = folder
    return tokenizer


def _load(path: Path, folder: Path) -> Tokenizer:
    surroundings = read_surroundings(folder)
    model_file = folder / MODEL_FILE if path.is_dir() else path
    json_file = folder / JSON_FILE if path.is_dir() else path
    if model_file.is_file() and model_file.suffix != ".json":
        model = model_file.read_bytes()
        _check_hash(model, surroundings, model_file)
        if is_of_the_recipe(model, surroundings, str(model_file)):
            return SentencePieceTokenizer(model, surroundings)
        if json_file == model_file or not json_file.is_file():
            return _converted(model, surroundings, str(model_file))
    return _from_json(json_file, surroundings)


def _from_json(file: Path, surroundings: Surroundings) -> Tokenizer:
    from lumi.tokenizer.hugging_face import HuggingFaceTokenizer  # Lumi's own need no further library

    data: Any = read_json(file)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        expectation = "must be a tokenizer of the `tokenizers` library, an object with a model"
        raise UserError(f"{file}:", expectation, got=json.dumps(data)[:60], remedy="copy the file again")
    files = {JSON_FILE: file.read_bytes()}
    if (model_file := file.parent / MODEL_FILE).is_file():
        files[MODEL_FILE] = model_file.read_bytes()
    return HuggingFaceTokenizer(data, surroundings, files, str(file))


def _converted(model: bytes, surroundings: Surroundings, where: str) -> Tokenizer:
    from lumi.tokenizer.hugging_face import HuggingFaceTokenizer

    data, surroundings = convert(model, where, surroundings)
    files = {MODEL_FILE: model, JSON_FILE: json.dumps(data, ensure_ascii=False).encode()}
    return HuggingFaceTokenizer(data, surroundings, files, where)


def _check_hash(model: bytes, surroundings: Surroundings, file: Path) -> None:
    """Raises UserError where a model is not the one that Lumi wrote."""
    expected, got = surroundings.config.get(FINGERPRINT_KEY), hashlib.sha256(model).hexdigest()
    if expected not in (None, got):
        raise UserError(
            f"{file}: SHA-256",
            f"must be {expected} (see tokenizer_config.json)",
            got=f"{got}: the file is corrupt or was replaced",
            remedy=f"copy it again, or {MAKE_ONE}",
        )
