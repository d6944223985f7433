"""Names of models on the Hugging Face hub, and their folders in the hub's cache. No network.

A folder's own path says which commit it is. So whoever records where something came from records
`org/name@commit`, which says the same on every machine.
"""

import re
from pathlib import Path
from typing import NamedTuple

_REFERENCE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_PREFIX, _SNAPSHOTS = "models--", "snapshots"


class HubModel(NamedTuple):
    """A model on the hub. `revision`: a commit, branch or tag; None: the newest commit."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_name(text: str) -> HubModel | None:
    """`org/name` or `org/name@revision`, whatever is here; None: a text is neither."""
    match = _REFERENCE.fullmatch(text)
    if match is None or "--" in match["repo"] or ".." in match["repo"]:
        return None
    return HubModel(match["repo"], match["revision"])


def origin_of(folder: str | Path) -> HubModel | None:
    """The model and the commit whose files a folder of the hub's cache holds; None: it is another folder."""
    folder = Path(folder).resolve()
    holder = folder.parent.parent
    in_cache = holder.parent == _cache().resolve()
    if not in_cache or folder.parent.name != _SNAPSHOTS or not holder.name.startswith(_PREFIX):
        return None
    return HubModel("/".join(holder.name.split("--")[1:]), folder.name)


def name_of(folder: str | Path) -> str:
    """By what a folder is found again: `org/name@commit` if it came from the hub, else its path."""
    return str(origin_of(folder) or folder)


def folder_of(name: str) -> Path | None:
    """Where `org/name@commit` lies if it is in the cache; None: that is no such name."""
    model = parse_name(name)
    if model is None or not _COMMIT.fullmatch(model.revision or ""):
        return None
    return _cache() / (_PREFIX + model.repo.replace("/", "--")) / _SNAPSHOTS / str(model.revision)


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE  # here: few commands need it

    return Path(HF_HUB_CACHE).expanduser()
