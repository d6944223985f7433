"""Python's own documentation as documents.

`python -m lumi.corpus.python_docs documents PACKAGE...` writes them as JSON lines, `... entries PACKAGE...`
the entries.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lumi.config import UserError
from lumi.corpus.docstrings import Entry, Walk

LONG_CHARS = 8_000  # a document is closed before it grows past this, unless one entry alone is longer
SHORT_CHARS = 1_500  # sections of one module are joined until a document has this length
LAYOUT_VERSION = 2  # part of the cache key: raise it when the same Python would give other documents


def read_entries(packages: tuple[str, ...]) -> Iterator[Entry]:
    """The entries of packages, collected in another process.

    Args:
        packages: "topics", "stdlib" and names of importable packages; the entries come in this order.

    Raises:
        UserError: a package cannot be imported.
    """
    yield from open_entries(packages)[1]


def open_entries(packages: tuple[str, ...]) -> tuple[dict[str, Any], Iterator[Entry]]:
    """What was found (sha256, documents, skipped modules), and the entries as `read_entries` gives them.

    Raises:
        UserError: a package cannot be imported.
    """
    header, lines = _collect(packages, "entries")
    return header, (Entry(**json.loads(line)) for line in lines)


def read_python_docs(packages: tuple[str, ...]) -> tuple[dict[str, Any], Iterator[str]]:
    """What was found (sha256, documents, skipped modules), and the documents.

    The same Python with the same packages gives the same documents.

    Raises:
        UserError: a package cannot be imported.
    """
    header, lines = _collect(packages, "documents")
    return header, (json.loads(line) for line in lines)


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions that decide what the documentation says: of Python, then of the packages."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        if package not in ("topics", "stdlib"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError as error:
                raise UserError(
                    "packages",
                    "must name installed packages",
                    got=repr(package),
                    remedy="pip install it, or leave it out",
                ) from error
    return versions


def group_documents(entries: Iterable[Entry]) -> Iterator[str]:
    """Documents of moderate size: a topic, a class with methods, functions and small classes of a module."""
    document, module = "", ""
    for kind, owner, section in _sections(entries):
        apart = (
            kind == "topic"
            or owner != module
            or len(document) + len(section) > LONG_CHARS
            or len(document) >= SHORT_CHARS
        )
        if apart and document:
            yield document
            document = ""
        document, module = f"{document}\n\n{section}" if document else section, owner
    if document:
        yield document


def render_entry(entry: Entry) -> str:
    """`name(signature)`, an empty line and the docstring; a topic is its own text."""
    if entry.kind == "topic":
        return entry.docstring
    prefix = "class " if entry.kind == "class" else ""
    return f"{prefix}{entry.qualified_name}{entry.signature}\n\n{entry.docstring}"


def _sections(entries: Iterable[Entry]) -> Iterator[tuple[str, str, str]]:
    """(kind, module, text) of what stays together: a class with its methods, or one function."""
    section: list[str] = []
    kind, module, owner = "", "", ""
    for entry in entries:
        text = render_entry(entry)
        belongs = entry.kind == "method" and entry.owner == owner
        if section and (not belongs or sum(map(len, section)) + len(text) > LONG_CHARS):
            yield kind, module, "\n\n".join(section)
            section = []
        if not belongs:  # a method whose class has no docstring of its own opens a section like a class
            kind, owner = entry.kind, entry.owner if entry.kind == "method" else entry.qualified_name
            module = entry.owner.rpartition(".")[0] if entry.kind == "method" else entry.owner
        section.append(text)
    if section:
        yield kind, module, "\n\n".join(section)


def _collect(packages: tuple[str, ...], what: str) -> tuple[dict[str, Any], Iterator[bytes]]:
    installed_versions(packages)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root])),
        "PYTHONHASHSEED": "0",  # a set among the defaults of a function prints in the same order every time
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("DISPLAY", None)
    # -P: a file random.py of the user must not be imported instead of the standard library's
    module = __spec__.name if __spec__ else "lumi.corpus.python_docs"
    command = [sys.executable, "-P", *("-W", "ignore"), *("-m", module), what, *packages]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=tempfile.gettempdir(),
    )
    assert child.stdout is not None
    first = child.stdout.readline()
    if not first:
        raise UserError(
            f"the documentation of {', '.join(packages)} cannot be collected:"
            f" the process that imports them ended with exit code {child.wait()}",
            remedy=f"try with fewer packages, or run: {' '.join(command)}",
        )
    header = json.loads(first)
    unknown = sorted(set(packages) & set(header["skipped_modules"]))
    if unknown:
        child.kill()
        child.wait()
        child.stdout.close()
        raise UserError(
            "packages",
            "must name importable packages",
            got=", ".join(unknown),
            remedy="pip install them, or leave them out",
        )
    return header, _lines_of(child, header["documents"])


def _lines_of(child: "subprocess.Popen[bytes]", expected: int) -> Iterator[bytes]:
    assert child.stdout is not None
    num_lines = 0
    try:
        for line in child.stdout:
            num_lines += 1
            yield line
    finally:  # also when the reader stops early, because a budget is reached
        child.stdout.close()
        child.terminate()
        child.wait()
    if num_lines != expected:
        raise UserError(
            "the documentation",
            f"must have {expected} documents",
            got=f"{num_lines}: the process that collects it died",
            remedy="run again",
        )


def _main(what: str, packages: tuple[str, ...]) -> None:
    # Modules print and warn when they are imported. Only our own lines may reach the pipe.
    pipe = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    walk = Walk(packages)
    items: list[Any] = [vars(entry) for entry in walk] if what == "entries" else list(group_documents(walk))
    lines = [json.dumps(item).encode() + b"\n" for item in items]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    header = {"sha256": digest, "documents": len(lines), "skipped_modules": walk.skipped}
    pipe.write(json.dumps(header).encode() + b"\n")
    pipe.writelines(lines)
    pipe.flush()
    # Imported packages may have left threads and exit hooks behind that wait for something.
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], tuple(sys.argv[2:]))
