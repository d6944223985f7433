import hashlib
import re
import sys

import pytest

from lumi.config import UserError
from lumi.corpus import read_entries
from lumi.corpus.docstrings import Entry
from lumi.corpus.python_docs import LONG_CHARS, _collect, group_documents, read_python_docs, render_entry

PACKAGES = ("topics", "stdlib")


@pytest.fixture(scope="module")
def entries():
    return list(read_entries(PACKAGES))


@pytest.fixture(scope="module")
def collected():
    header, documents = read_python_docs(PACKAGES)
    return header, list(documents)


def test_the_same_for_another_hash_seed(collected, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "textwrap.py").write_text('"""Not the module of the standard library."""')
    header, documents = read_python_docs(PACKAGES)
    assert (header, list(documents)) == collected


def test_what_is_found(entries, collected):
    by_name = {entry.qualified_name: entry for entry in entries}
    dedent = by_name["textwrap.dedent"]
    assert (dedent.kind, dedent.signature, dedent.owner) == ("function", "(text)", "textwrap")
    assert dedent.docstring.startswith("Remove any common leading whitespace from every line in `text`.")
    assert by_name["textwrap.TextWrapper.fill"].kind == "method"
    assert by_name["builtins.len"].docstring.startswith("Return the number of items in a container.")
    assert by_name["assert"].kind == "topic"
    assert by_name["collections.OrderedDict"].kind == "class"
    # Written in C, in _io and _functools, and imported by modules that come earlier in the alphabet.
    assert by_name["io.BytesIO"].kind == "class"
    assert by_name["functools.reduce"].kind == "function"
    header, documents = collected
    assert header["documents"] == len(documents) > 500
    assert sum(map(len, documents)) > 1_500_000
    assert len(header["sha256"]) == 64


def test_every_docstring_once_and_nothing_of_this_machine(entries):
    assert len({entry.docstring for entry in entries}) == len(entries) > 5000
    assert len({(entry.kind, entry.qualified_name) for entry in entries}) == len(entries)
    for entry in entries:
        assert not re.search(r" at 0x[0-9a-f]", entry.signature + entry.docstring), entry
        assert sys.prefix not in entry.signature
        assert entry.docstring == entry.docstring.strip("\n")
    names = {entry.qualified_name.split(".")[0] for entry in entries if entry.kind == "module"}
    assert not names & {"antigravity", "this", "idlelib", "turtledemo", "tkinter", "test"}


def test_documents_hold_every_entry_and_are_of_moderate_size(entries, collected):
    _, documents = collected
    text = "\n\n".join(documents)
    assert all(render_entry(entry) in text for entry in entries[:300])
    longest_entry = max(len(render_entry(entry)) for entry in entries)
    assert max(map(len, documents)) <= max(longest_entry, LONG_CHARS + 2)
    assert sum(map(len, text.split("\n\n"))) <= sum(len(render_entry(entry)) + 2 for entry in entries)


def entry(kind, name, docstring, owner):
    return Entry(
        kind=kind,
        qualified_name=name,
        signature="(x)" if kind != "module" else "",
        docstring=docstring,
        owner=owner,
    )


def test_grouping():
    items = [
        entry("module", "m", "About m.", "m"),
        entry("function", "m.f", "F.", "m"),
        entry("class", "m.C", "C.", "m"),
        entry("method", "m.C.g", "G." * 4000, "m.C"),
        entry("method", "m.D.h", "H.", "m.D"),
        entry("module", "n", "About n.", "n"),
        entry("topic", "if", 'The "if" statement', "pydoc_data.topics"),
    ]
    assert list(group_documents(items)) == [
        "m\n\nAbout m.\n\nm.f(x)\n\nF.\n\nclass m.C(x)\n\nC.",
        "m.C.g(x)\n\n" + "G." * 4000,
        "m.D.h(x)\n\nH.",
        "n\n\nAbout n.",
        'The "if" statement',
    ]


def test_modules_that_cannot_be_imported_are_counted(collected):
    header, _ = collected
    assert "asyncio.windows_events" in header["skipped_modules"] or sys.platform == "win32"


def test_the_header_names_the_hash_of_the_lines():
    header, lines = _collect(("topics",), "documents")
    assert hashlib.sha256(b"".join(lines)).hexdigest() == header["sha256"]


def test_stopping_early_ends_the_process_and_a_missing_package_is_an_error():
    _, documents = read_python_docs(("topics",))
    next(documents)
    documents.close()
    with pytest.raises(UserError, match="packages must name installed packages, got 'nothing_here'"):
        read_python_docs(("nothing_here",))
