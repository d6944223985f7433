"""`provenance.json`: what a folder was made from, and the hashes of its files. `lumi verify` reads it.

Paths are relative to the folder that holds the file. So equal work gives equal files, and folders that move
together keep their links. Nothing in it depends on the time.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lumi.config import UserError, read_json, write_json
from lumi.host.storage import file_record

PROVENANCE_FILE = "provenance.json"
FORMAT = 1
CARD = "README.md"  # for people, who may change it
Files = Mapping[str, Mapping[str, Any]]  # size and SHA-256 by file name


class Parent(NamedTuple):
    """What something was made from.

    Attributes:
        kind: such as "corpus"; a name in `lumi.provenance.artifacts`.
        path: its folder.
        identity: a SHA-256 of its content. Paths, dates and versions do not enter it.
    """

    kind: str
    path: Path
    identity: str


class Provenance(NamedTuple):
    """What a `provenance.json` says; the paths of the parents are those where they were."""

    kind: str
    parents: tuple[Parent, ...]
    files: Files


def write_provenance(folder: Path, kind: str, parents: Sequence[Parent], files: Files) -> None:
    """Write `provenance.json` into a folder, or into the `atomic_folder` that becomes it."""
    parts = {"parents": to_plain(parents, folder), "files": dict(sorted(files.items()))}
    write_json(folder / PROVENANCE_FILE, {"format": FORMAT, "kind": kind, **parts})


def record_files(folder: Path, known: Files | None = None) -> Files:
    """The records of all files in a folder, except the card; `known`: those that need not be hashed again."""
    known = known or {}
    names = {path.name for path in folder.iterdir() if path.is_file()} - {PROVENANCE_FILE, CARD}
    return {name: known.get(name) or file_record(folder / name) for name in names}


def read_provenance(folder: Path) -> Provenance | None:
    """What a folder's `provenance.json` says; None: it has none. Raises UserError where it is damaged."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    data = read_json(path)
    if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
        remedy = "verify with the version of Lumi that wrote it"
        raise UserError(f"{path}: format", f"must be {FORMAT}", got=data["format"], remedy=remedy)
    try:
        files = data["files"]
        if not all(Path(name).name == name and _is_record(files[name]) for name in files):
            raise TypeError  # a name with a folder in it could point anywhere
        return Provenance(str(data["kind"]), from_plain(data["parents"], folder), files)
    except (KeyError, TypeError) as error:
        expectation = "must give kind, parents and files, and does not: it is damaged"
        raise UserError(f"{path}:", expectation, remedy="copy it again") from error


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("sha256"), str)


def to_plain(parents: Sequence[Parent], folder: Path) -> list[dict[str, str]]:
    """Parents as JSON values, their paths relative to a folder, which need not exist yet."""
    return [
        {"kind": parent.kind, "path": _relative(parent.path, folder), "identity": parent.identity}
        for parent in parents
    ]


def from_plain(values: Any, folder: Path) -> tuple[Parent, ...]:
    """What `to_plain` was given. Raises KeyError or TypeError for other values."""
    return tuple(
        Parent(str(each["kind"]), folder.resolve() / each["path"], str(each["identity"])) for each in values
    )


def _relative(path: Path, folder: Path) -> str:
    real = path.resolve()
    try:
        return Path(os.path.relpath(real, folder.resolve())).as_posix()
    except ValueError:  # on another drive of Windows
        return real.as_posix()
