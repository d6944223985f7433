import sys

import pytest

from lumi.corpus.docstrings import Walk, _signature

INIT = '''"""About the package."""

from textwrap import dedent

from pkg.inner import Moved


def later(a, b=1):
    """Say it   later.

    Indented.
    """


def earlier():
    """Say it earlier."""


def undocumented():
    pass


def _private():
    """Say nothing."""


class Thing:
    """A thing."""

    __slots__ = ()

    @classmethod
    def make(cls):
        """Make one."""

    def copy(self):
        """Say it earlier."""
'''
INNER = '''
class Moved:
    """It lives here."""

    __slots__ = ()
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    (folder / "inner.py").write_text(INNER)
    (folder / "broken.py").write_text("raise SystemExit(3)")
    (folder / "test_it.py").write_text('"""Not walked."""')
    monkeypatch.syspath_prepend(tmp_path)
    yield "pkg"
    for name in [name for name in sys.modules if name.split(".")[0] == "pkg"]:
        del sys.modules[name]


def test_the_walk_is_sorted_and_gives_each_docstring_once_where_it_lives(package):
    walk = Walk((package,))
    assert [(entry.kind, entry.qualified_name, entry.signature, entry.owner) for entry in walk] == [
        ("module", "pkg", "", "pkg"),
        ("function", "pkg.earlier", "()", "pkg"),
        ("function", "pkg.later", "(a, b=1)", "pkg"),
        ("class", "pkg.Thing", "()", "pkg"),
        ("method", "pkg.Thing.make", "(cls)", "pkg.Thing"),
        ("class", "pkg.inner.Moved", "()", "pkg.inner"),
    ]
    assert walk.skipped == ["pkg.broken"]


def test_docstrings_are_without_their_indentation(package):
    docstrings = {entry.qualified_name: entry.docstring for entry in Walk((package,))}
    assert docstrings["pkg.later"] == "Say it   later.\n\nIndented."


def test_signatures_hide_addresses_and_folders():
    def function(a, b=object(), c=sys.prefix + "/lib", d=3):  # noqa: B008
        pass

    assert _signature(function) == "(a, b=..., c=..., d=3)"
    assert _signature(None) == ""
