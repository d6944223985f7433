"""The documentation inside this Python: a deterministic walk over modules, classes and functions.

The walk imports every module of the standard library, which has side effects: `python_docs` runs it in
another process.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Importing these opens a browser, prints a poem, needs a display or runs a program. None documents much.
SKIPPED_MODULES = frozenset({"antigravity", "this", "idlelib", "turtledemo", "tkinter", "turtle", "test"})
SKIPPED_PARTS = frozenset(
    {"test", "tests", "testing", "conftest", "setup", "distutils", "idlelib", "pyinstaller_smoke"}
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One documented thing. `signature`: "" if Python knows none. `owner`: its module; a method's class."""

    kind: Literal["topic", "module", "class", "function", "method"]
    qualified_name: str
    signature: str
    docstring: str
    owner: str


@dataclass
class Walk:
    """The entries of packages, each docstring once. `skipped`: the modules that could not be imported."""

    packages: tuple[str, ...]
    skipped: list[str] = field(default_factory=list)
    _docstrings: set[str] = field(default_factory=set)
    _objects: dict[int, Any] = field(default_factory=dict)  # holds the objects, so that no id is used twice

    def __iter__(self) -> Iterator[Entry]:
        for package in self.packages:
            if package == "topics":
                yield from self._topics()
            elif package == "stdlib":
                yield from self._builtins()
                for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES - {"builtins"}):
                    if not name.startswith("_") or name == "__future__":
                        yield from self._package(name)
            else:
                yield from self._package(package)

    def _topics(self) -> Iterator[Entry]:
        topics = importlib.import_module("pydoc_data.topics").topics
        for name in sorted(topics):
            entry = self._entry("topic", name, None, topics[name], "pydoc_data.topics")
            if entry:
                yield entry

    def _builtins(self) -> Iterator[Entry]:
        yield from self._module(importlib.import_module("builtins"))

    def _package(self, name: str) -> Iterator[Entry]:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit):  # a foreign module may do anything on import; the walk goes on
            self.skipped.append(name)
            return
        yield from self._module(module)
        for child in sorted(info.name for info in pkgutil.iter_modules(getattr(module, "__path__", ()))):
            if not child.startswith(("_", "test_")) and child not in SKIPPED_PARTS:
                yield from self._package(f"{name}.{child}")

    def _module(self, module: types.ModuleType) -> Iterator[Entry]:
        entry = self._entry("module", module.__name__, None, module.__doc__, module.__name__)
        if entry:
            yield entry
        members = sorted(
            (name, value)
            for name, value in vars(module).items()
            if _is_public(name) and _lives_in(value, module)
        )
        for name, value in [member for member in members if not inspect.isclass(member[1])]:
            entry = self._member("function", f"{module.__name__}.{name}", value, module.__name__)
            if entry:
                yield entry
        for name, value in [member for member in members if inspect.isclass(member[1])]:
            yield from self._class(f"{module.__name__}.{name}", value, module.__name__)

    def _class(self, qualified_name: str, cls: type, owner: str) -> Iterator[Entry]:
        if id(cls) in self._objects:
            return
        entry = self._member("class", qualified_name, cls, owner)
        if entry:
            yield entry
        for name in sorted(vars(cls)):
            if _is_public(name) or (name.startswith("__") and name.endswith("__")):
                entry = self._member(
                    "method", f"{qualified_name}.{name}", _unwrap(vars(cls)[name]), qualified_name
                )
                if entry:
                    yield entry

    def _member(
        self, kind: Literal["class", "function", "method"], name: str, value: Any, owner: str
    ) -> Entry | None:
        if id(value) in self._objects:
            return None
        self._objects[id(value)] = value
        return self._entry(kind, name, value, _own_docstring(value), owner)

    def _entry(self, kind: Any, name: str, value: Any, docstring: Any, owner: str) -> Entry | None:
        if not isinstance(docstring, str):
            return None
        docstring = ADDRESS.sub(" at 0x...", inspect.cleandoc(docstring))
        if not docstring or docstring in self._docstrings:
            return None
        self._docstrings.add(docstring)
        return Entry(
            kind=kind, qualified_name=name, signature=_signature(value), docstring=docstring, owner=owner
        )


class _Elided:
    def __repr__(self) -> str:
        return "..."


def _signature(value: Any) -> str:
    """The signature as text, or "". Defaults that differ between processes or machines appear as "..."."""
    if not callable(value):
        return ""
    try:
        signature = inspect.signature(value)
        parameters = [_portable(parameter) for parameter in signature.parameters.values()]
        text = str(signature.replace(parameters=parameters))
    except Exception:  # inspect runs foreign code: __signature__, __text_signature__, the repr of a default
        return ""
    return text if _is_portable(text) else ""


def _portable(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.default is not inspect.Parameter.empty and not _is_portable(repr(parameter.default)):
        parameter = parameter.replace(default=_Elided())
    if not _is_portable(str(parameter)):
        parameter = parameter.replace(annotation=inspect.Parameter.empty)
    return parameter


def _is_portable(text: str) -> bool:
    return not ADDRESS.search(text) and not any(folder in text for folder in _machine_folders())


@functools.cache
def _machine_folders() -> set[str]:
    folders = {
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        os.path.expanduser("~"),
        os.getcwd(),
        tempfile.gettempdir(),
    }
    folders.add(str(Path(os.__file__).parent))
    return {folder for folder in folders if len(folder) > 1}


def _own_docstring(value: Any) -> Any:
    try:
        docstring = value.__doc__
        if inspect.isclass(value):
            return vars(value).get("__doc__") if isinstance(vars(value).get("__doc__"), str) else docstring
        return None if docstring is type(value).__doc__ or docstring == type(value).__doc__ else docstring
    except Exception:  # a lazy object of another package may raise anything
        return None


def _lives_in(value: Any, module: types.ModuleType) -> bool:
    """Whether `module` is the home of an object, which is not imported from another public module."""
    try:
        if inspect.ismodule(value) or not callable(value):
            return False
        home, name = value.__module__, getattr(value, "__qualname__", None) or value.__name__
    except Exception:  # as in _own_docstring; ufuncs, for one, have no __module__ and are at home anywhere
        return callable(value)
    # What _io and _functools define is known as io's and functools's.
    home = home.removeprefix("_") if isinstance(home, str) else ""
    if not home or home == module.__name__ or any(part.startswith("_") for part in home.split(".")):
        return True
    return getattr(sys.modules.get(home), str(name), None) is not value


def _unwrap(value: Any) -> Any:
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


def _is_public(name: str) -> bool:
    return not name.startswith("_")
