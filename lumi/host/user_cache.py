"""Lumi's folder in the user's cache folder, and the places in it of what came from a URL. No network.

The folder of what came from a URL names it in the file `.url`. So whoever records where something came from
records the URL, which says the same on every machine.
"""

import hashlib
import os
from pathlib import Path

URL_FILE = ".url"


def user_cache() -> Path:
    """Lumi's folder in the user's cache folder, as freedesktop.org's base directories say."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "lumi"


def is_url(place: str | Path) -> bool:
    """Whether a text is a URL, such as s3://bucket/folder, and no path of this machine."""
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme.isascii() and scheme.replace("+", "").replace("-", "").isalnum()


def home_of(url: str, cache_dir: str | Path | None = None) -> Path:
    """The folder for what comes from a URL. `cache_dir`: the cache folder; None: the user's."""
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()
    return Path(user_cache() if cache_dir is None else cache_dir) / "remote" / digest[:16]


def url_of(folder: Path) -> str | None:
    """The URL that the content of a `home_of` came from; None: it is another folder."""
    path = folder / URL_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
