"""A chain as text: a tree of lines and a summary, or JSON."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumi.host.hub_cache import name_of, origin_of
from lumi.provenance.chain import SHORT, Link


def tree(link: Link) -> str:
    """A line for each artefact, what it was made from below it, and the summary."""
    return "\n".join([*_lines(link, "", ""), "", summary(link)])


def summary(link: Link) -> str:
    """How many artefacts there are by what they are, in one line."""
    counts = Counter(each.verdict for each in link.all())
    number = counts.total()
    what = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return f"{number} artefact{'' if number == 1 else 's'}: {what}"


def to_json(link: Link) -> str:
    """The tree as JSON; hashes are whole. A repeated artefact has no parents here either."""
    return json.dumps(_plain(link), indent=2, ensure_ascii=False)


def line(link: Link) -> str:
    """An artefact by itself: what it is, where, its hash, and what is at fault."""
    detail = f": {link.detail}" if link.detail else ""
    above = " (above)" if link.repeated else ""
    return f"{link.kind}  {shown(link.path)}  {link.identity[:SHORT] or '-'}  {link.verdict}{detail}{above}"


def _lines(link: Link, first: str, others: str) -> Iterator[str]:
    """The lines of a part of the tree. `first`, `others`: what its first line and the others begin with."""
    yield first + line(link)
    for index, parent in enumerate(link.parents, start=1):
        last = index == len(link.parents)
        yield from _lines(
            parent, others + ("└── " if last else "├── "), others + ("    " if last else "│   ")
        )


def shown(path: Path) -> str:
    """A path for people: its name on the hub, or relative to the current folder if it lies there."""
    real, here = path.resolve(), Path.cwd()
    if (origin := origin_of(real)) is not None:
        return str(origin)
    return os.path.relpath(real, here) if real.is_relative_to(here) else str(real)


def _plain(link: Link) -> dict[str, Any]:
    return {
        "kind": link.kind,
        "path": name_of(link.path.resolve()),
        "identity": link.identity,
        "verdict": link.verdict,
        "detail": link.detail,
        "repeated": link.repeated,
        "parents": [_plain(parent) for parent in link.parents],
    }
