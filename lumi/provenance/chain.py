"""From an artefact back to the texts: what it was made from is found and compared with recorded hashes."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lumi.checkpoint.checkpoint import list_checkpoints
from lumi.config import UserError
from lumi.host.provenance import Parent
from lumi.host.storage import TEMPORARY_PREFIX, MissingError, sha256_file
from lumi.provenance.artifacts import KINDS, is_artifact, kind_of

Verdict = Literal["ok", "missing", "changed", "from another chain", "not recorded"]
FAULTS: tuple[Verdict, ...] = ("missing", "changed", "from another chain")
SHORT = 12  # digits of a hash in a line


@dataclass
class Link:
    """An artefact and what it was made from.

    Attributes:
        identity: the SHA-256 that was recorded of it; of the artefact asked about its own, "" if damaged.
        detail: what is at fault, in words; where nothing is, what else is worth knowing.
        repeated: it stands elsewhere in the tree with all that it was made from, which is not repeated here.
    """

    kind: str
    path: Path
    identity: str
    verdict: Verdict
    detail: str = ""
    repeated: bool = False
    parents: list["Link"] = field(default_factory=list)

    @property
    def is_fault(self) -> bool:
        """Whether it is missing, changed or from another chain."""
        return self.verdict in FAULTS

    @property
    def is_broken(self) -> bool:
        """Whether something in the tree is at fault."""
        return any(link.is_fault for link in self.all())

    def all(self) -> Iterator["Link"]:
        """The link and all behind it, without those that are repeated."""
        if not self.repeated:
            yield self
        for parent in self.parents:
            yield from parent.all()


@dataclass(frozen=True)
class Finding:
    """What an artefact is by its own record. `identity`: None where it is damaged or missing."""

    verdict: Verdict
    detail: str = ""
    identity: str | None = None
    parents: tuple[Parent, ...] = ()


def verify(path: str | Path, search: Sequence[str | Path] = (), *, all_bytes: bool = True) -> Link:
    """Follow an artefact back to all that it was made from. Nothing is changed.

    Args:
        path: the folder of a corpus, tokenizer, token store, checkpoint, model, adapter or evaluation; or a
            run, which means what it made, as `made_by` says.
        search: folders in and below which to look for what is not where it was.
        all_bytes: False: of what is behind the artefact only the identity is compared. Manifests give that of
            data, so it is soon done.

    Raises:
        UserError: there is no such artefact; a folder to search is none.
    """
    for folder in search:
        if not Path(folder).is_dir():
            raise UserError("--search", "must be a folder", got=folder)
    found = made_by(Path(path))
    kind = kind_of(found)
    if kind is None:
        expectation = f"must be the folder of one of {', '.join(sorted(KINDS))}, or a run"
        got = "another folder" if found.is_dir() else "a file" if found.exists() else "nothing"
        remedy = "a folder of several stages holds them one by one: pass one of those"
        raise UserError(f"{path}", expectation, got=got, remedy=remedy if found.is_dir() else "")
    return _Walk(search, all_bytes).follow(kind, found, None)


def made_by(path: Path) -> Path:
    """What a run made: `final/`, or its newest checkpoint before there is one. Other paths stay."""
    if (path / "final").is_dir():
        return path / "final"
    checkpoints = path / "checkpoints"
    return next(reversed(list_checkpoints(checkpoints)), path) if checkpoints.is_dir() else path


class _Walk:
    def __init__(self, search: Sequence[str | Path], all_bytes: bool) -> None:
        self._search, self._all_bytes = search, all_bytes
        self._shown: set[tuple[str, Path, Verdict]] = set()
        self._examine = functools.cache(examine)  # a base is under several adapters

    def follow(self, kind: str, path: Path, wanted: str | None) -> Link:
        """The link for an artefact of a kind. `wanted`: the identity that was recorded of it."""
        finding, moved = self._examine(kind, path, self._all_bytes or wanted is None), ""
        lost = finding.verdict == "missing" or _is_another(finding, wanted)
        if lost and (elsewhere := self._find(kind, wanted)) is not None:
            path, finding, moved = elsewhere, self._examine(kind, elsewhere, self._all_bytes), "it has moved"
        link = Link(kind, path, wanted or finding.identity or "", finding.verdict)
        link.detail = "; ".join(filter(None, (moved, finding.detail)))
        if wanted and _is_another(finding, wanted):
            link.verdict = "from another chain"
            link.detail = f"recorded {wanted[:SHORT]}, found {str(finding.identity)[:SHORT]}"
        key = (kind, path.resolve(), link.verdict)
        link.repeated = key in self._shown
        self._shown.add(key)
        if not link.repeated and link.verdict != "from another chain":
            link.parents = [self.follow(*parent) for parent in finding.parents]
        return link

    def _find(self, kind: str, identity: str | None) -> Path | None:
        """Where something that has moved is now."""
        for found, path in self._elsewhere:
            with contextlib.suppress(UserError, FileNotFoundError):  # damaged
                if found == kind and KINDS[kind].identity(path) == identity:
                    return path
        return None

    @functools.cached_property
    def _elsewhere(self) -> list[tuple[str, Path]]:
        """Kind and path of all artefacts in the folders to search."""
        found = []
        for top in self._search:
            for name, folders, _ in os.walk(top):
                folders[:] = sorted(each for each in folders if not each.startswith(TEMPORARY_PREFIX))
                with contextlib.suppress(UserError):  # something else, or damaged
                    if (kind := kind_of(Path(name))) is not None:
                        found.append((kind, Path(name)))
        return found


def _is_another(finding: Finding, wanted: str | None) -> bool:
    return wanted is not None and finding.identity not in (None, wanted)


def examine(kind: str, path: Path, all_bytes: bool = True) -> Finding:
    """Compare an artefact with its own record. `all_bytes`: each of its files, too, not only what it is by
    its identity."""
    if kind not in KINDS:
        return Finding("not recorded", "this version of lumi does not know the kind")
    try:
        if not is_artifact(path, kind):
            return Finding("missing", "something else is there" if path.exists() else "")
        record = KINDS[kind].record(path)
        parents = record.parents or ()
        if all_bytes and (fault := _fault(record.files)) is not None:
            return Finding(*fault, parents=parents)
        identity = KINDS[kind].identity(path)
    except FileNotFoundError as error:
        return Finding("missing", Path(error.filename).name)
    except MissingError as error:
        return Finding("missing", str(error.replace(remedy="")))
    except UserError as error:
        return Finding("changed", str(error.replace(remedy="")))
    return Finding("not recorded" if record.parents is None else "ok", record.note, identity, parents)


def _fault(files: Mapping[Path, Mapping[str, Any]]) -> tuple[Verdict, str] | None:
    """What is wrong with files, by their records; None: nothing."""
    faults: list[tuple[Verdict, str]] = []
    for path, record in files.items():
        expected = record["sha256"]
        if not path.is_file():
            faults.append(("missing", f"{path.name}, {expected[:SHORT]}"))
        elif (found := sha256_file(path)) != expected:
            faults.append(("changed", f"{path.name}, recorded {expected[:SHORT]}, found {found[:SHORT]}"))
    if not faults:
        return None
    (verdict, detail), *others = faults
    return verdict, f"{detail}, and {len(others)} more files" if others else detail
