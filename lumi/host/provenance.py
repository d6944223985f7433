"""`provenance.json`: what a folder was made from, and the hashes of its files. `lumi verify` reads it.

Paths are relative to the folder that holds the file; what came from the hub has its name, `org/name@commit`,
and what came from a URL has that.
So equal work gives equal files, and folders that move together keep their links. Nothing in it depends on the
time.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lumi.config import UserError, read_json, write_json
from lumi.host.hub_cache import folder_of, origin_of
from lumi.host.storage import file_record
from lumi.host.user_cache import home_of, is_url, url_of

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
    """What a `provenance.json` says. Parents have the paths where they were; None: they are not recorded."""

    kind: str
    parents: tuple[Parent, ...] | None
    files: Files


def write_provenance(folder: Path, kind: str, parents: Sequence[Parent] | None, files: Files) -> None:
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
        kind, parents, files = (data[key] for key in ("kind", "parents", "files"))
        whole = all(Path(name).name == name and isinstance(files[name]["sha256"], str) for name in files)
    except (KeyError, TypeError):
        whole = False
    if not whole:  # a name with a folder in it could point anywhere
        expectation = "must give a kind, parents and the SHA-256 of files, and does not: it is damaged"
        raise UserError(f"{path}:", expectation, remedy="copy it again")
    return Provenance(str(kind), from_plain(parents, folder), files)


def to_plain(parents: Sequence[Parent] | None, folder: Path) -> list[dict[str, str]] | None:
    """Parents as JSON values, their paths relative to a folder, which need not exist yet."""
    if parents is None:
        return None
    return [
        {"kind": parent.kind, "path": _place(parent.path, folder), "identity": parent.identity}
        for parent in parents
    ]


def from_plain(values: Any, folder: Path) -> tuple[Parent, ...] | None:
    """What `to_plain` was given. Raises UserError for other values."""
    if values is None:
        return None
    try:
        fields = [tuple(str(each[field]) for field in Parent._fields) for each in values]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: parents", "must each have kind, path and identity", got=repr(values)[:60]
        ) from error
    return tuple(
        Parent(kind, folder_of(path) or _folder_at(path, folder), identity) for kind, path, identity in fields
    )


def _folder_at(place: str, folder: Path) -> Path:
    return home_of(place) if is_url(place) else Path(os.path.normpath(folder.resolve() / place))


def _place(path: Path, folder: Path) -> str:
    """By what a folder is found again: relative to another one, by its name on the hub, or by its URL."""
    if (url := url_of(path)) is not None:
        return url
    if (origin := origin_of(path)) is not None:
        return str(origin)
    real = path.resolve()
    try:
        return Path(os.path.relpath(real, folder.resolve())).as_posix()
    except ValueError:  # on another drive of Windows
        return real.as_posix()
