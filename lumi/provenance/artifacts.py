"""The kinds of artefact: how one is recognised and identified, and what it records of itself.

A further kind is one more entry of `KINDS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lumi.checkpoint.manifest import MANIFEST, STATE, read_manifest
from lumi.config import UserError, read_json
from lumi.corpus.evaluation_sets import names_against
from lumi.corpus.folder import CorpusReader, is_corpus
from lumi.corpus.folder import read_manifest as read_corpus_manifest
from lumi.data.store_manifest import STORE, is_token_store, read_store_manifest
from lumi.evaluation.evaluate import RESULTS_FILE
from lumi.formats.adapter_format import WEIGHTS
from lumi.formats.checkpoint_folder import is_checkpoint
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.gguf_file import GGUF, SUFFIX, check_whole, is_gguf
from lumi.formats.hf_format import open_tensors
from lumi.formats.peft_config import CONFIG, read_config
from lumi.host.provenance import Files, Parent, from_plain, read_provenance
from lumi.host.storage import sha256_file
from lumi.tokenizer.loading import has_tokenizer, load_tokenizer


class Record(NamedTuple):
    """What an artefact says of itself.

    Attributes:
        files: size and SHA-256 of its files, by their paths.
        parents: what it was made from; None: that is not recorded.
        note: what else is worth knowing, in words.
    """

    files: Mapping[Path, Mapping[str, Any]]
    parents: tuple[Parent, ...] | None
    note: str = ""


class Artifact(NamedTuple):
    """A kind of artefact. Each function takes its path and raises UserError where what it reads is damaged.

    `is_one`: whether it has the file that makes it one of this kind. `identity`: a SHA-256 of its content, as
    `Parent` has it; it may read every byte.
    """

    kind: str
    is_one: Callable[[Path], bool]
    identity: Callable[[Path], str]
    record: Callable[[Path], Record]


def _holds(name: str) -> Callable[[Path], bool]:
    return lambda folder: (folder / name).is_file()


def _is_model(folder: Path) -> bool:
    """Whether there is a trace of weights, also a link that leads nowhere: a model without them is a damaged
    one. A tokenizer from the hub may come with a model's config alone."""
    return any(folder.glob("model*.safetensors*"))


def _hash_of(name: str, check: Callable[[Path], object]) -> Callable[[Path], str]:
    """The hash of a file. `check` raises UserError where the folder is damaged: there may be no record."""

    def identity(folder: Path) -> str:
        digest = sha256_file(folder / name)
        check(folder)
        return digest

    return identity


def _check_adapter(folder: Path) -> None:
    read_config(folder)
    with open_tensors(folder / WEIGHTS):
        pass


def _record(folder: Path, files: Files, parents: tuple[Parent, ...] | None) -> Record:
    return Record({folder / name: record for name, record in files.items()}, parents)


def _recorded(kind: str) -> Callable[[Path], Record]:
    """What `provenance.json` says. Beside a model's, a tokenizer has nothing to add to its fingerprint."""

    def read(folder: Path) -> Record:
        found = read_provenance(folder)
        if found is None:
            return Record({}, None)
        return _record(folder, found.files, found.parents) if found.kind == kind else Record({}, ())

    return read


def _read_corpus(folder: Path) -> CorpusReader:
    manifest = read_corpus_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}:", "must be a corpus folder", got="another")
    return CorpusReader(folder, manifest)


def _corpus_record(folder: Path) -> Record:
    manifest = _read_corpus(folder).manifest
    shards, names = manifest["shards"], names_against(manifest)
    files = {shard["file"]: {"size": shard["bytes"], "sha256": shard["sha256"]} for shard in shards}
    note = f"decontaminated against {', '.join(names)}" if names else ""
    return _record(folder, files, ())._replace(note=note)


def _store_record(folder: Path) -> Record:
    if read_provenance(folder) is None:  # of an earlier version
        return _record(folder, read_store_manifest(folder).files, None)
    return _recorded(STORE)(folder)


def _checkpoint_record(folder: Path) -> Record:
    """What manifest and state say. The state counts for nothing where the manifest has another hash of it."""
    files = read_manifest(folder / MANIFEST)
    state = folder / STATE
    parents = None
    if state.is_file() and STATE in files and sha256_file(state) == files[STATE]["sha256"]:
        parents = from_plain(read_json(state).get("parents"), folder)
    return _record(folder, files, parents)


def _gguf_file(path: Path) -> Path:
    """The file itself, or the one in the folder that `lumi export` wrote."""
    if not path.is_dir():
        return path
    return next(path.glob(f"*{SUFFIX}"), path / f"model{SUFFIX}")


def _gguf_identity(path: Path) -> str:
    file = _gguf_file(path)
    check_whole(file)
    return sha256_file(file)


def _gguf_record(path: Path) -> Record:
    """That of the file's folder, if it is the file's own."""
    folder = path if path.is_dir() else path.parent
    found = read_provenance(folder)
    if found is None or found.kind != GGUF:
        return Record({}, None)
    return _record(folder, found.files, found.parents)


_ARTIFACTS = (
    Artifact(
        "evaluation",
        _holds(RESULTS_FILE),
        _hash_of(RESULTS_FILE, lambda folder: read_json(folder / RESULTS_FILE)),
        _recorded("evaluation"),
    ),
    Artifact("checkpoint", is_checkpoint, lambda folder: sha256_file(folder / MANIFEST), _checkpoint_record),
    Artifact("corpus", is_corpus, lambda folder: _read_corpus(folder).fingerprint, _corpus_record),
    Artifact(STORE, is_token_store, lambda folder: read_store_manifest(folder).fingerprint, _store_record),
    Artifact("adapter", _holds(CONFIG), _hash_of(WEIGHTS, _check_adapter), _recorded("adapter")),
    Artifact(
        GGUF,
        lambda path: is_gguf(path) and path.is_file(),
        _gguf_identity,
        _gguf_record,
    ),
    Artifact("model", _is_model, weights_fingerprint, _recorded("model")),
    # The last: models bring their tokenizers.
    Artifact(
        "tokenizer", has_tokenizer, lambda folder: load_tokenizer(folder).fingerprint, _recorded("tokenizer")
    ),
)
KINDS = {artifact.kind: artifact for artifact in _ARTIFACTS}  # in the order in which a folder is tried


def is_artifact(path: Path, kind: str) -> bool:
    """Whether something of a kind is there, by the file that makes it one or by what its record says.

    Raises:
        UserError: one of the two is damaged.
    """
    found = read_provenance(path)
    return (found is not None and found.kind == kind) or KINDS[kind].is_one(path)


def kind_of(path: Path) -> str | None:
    """The kind of artefact in a folder, None where there is none. Raises UserError as `is_artifact`."""
    found = read_provenance(path)
    if found is not None and found.kind in KINDS:
        return found.kind
    return next((artifact.kind for artifact in KINDS.values() if artifact.is_one(path)), None)
