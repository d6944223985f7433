"""Paths and glob patterns in a config -> files."""

import glob
import os
from collections.abc import Sequence

from lumi.config import UserError


def check_patterns(paths: Sequence[str]) -> None:
    """Check a config's field `paths`: at least one path or glob pattern, none empty. Raises UserError."""
    if not paths or "" in paths:
        raise UserError("paths", "must hold at least one path or glob pattern", got=list(paths))


def matching_files(paths: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns match, in their order; one pattern's are sorted, none repeats.

    The path of a folder means all files in it and in its folders that are not hidden.

    Raises:
        UserError: a path or pattern matches no file, or a link to a file that is gone.
    """
    found: dict[str, None] = {}
    for pattern in paths:
        path = os.path.expanduser(pattern)
        folder = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else None
        found_here = glob.glob(folder or path, recursive=True)
        if gone := sorted(path for path in found_here if not os.path.exists(path)):
            raise UserError("paths", "must match files that exist", got=f"{gone[0]}, a broken link")
        matches = sorted(filter(os.path.isfile, found_here))
        if not matches:
            raise UserError(
                "paths",
                "must match at least one file",
                got=f"{pattern!r} (looked from {os.getcwd()})",
                remedy="mend the path, or take it out",
            )
        found |= dict.fromkeys(matches)
    return list(found)
