"""Strict JSON <-> frozen dataclasses: every key is known, every value has the declared type.

Each part of Lumi declares its dataclass beside its code. This file loads, overrides and saves them. Supported
field types: bool, int, float, str, None, Literal, `X | None`, `X | Literal`, `tuple[X, ...]`, `X | tuple[X,
...]`, `dict[str, X]`, a dataclass, and a union of dataclasses with a field `kind: Literal["..."]` that names
the right one.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake that the user can mend. The command line shows one line without a traceback and exits with 2.

    The line reads "SUBJECT EXPECTATION, got GOT; REMEDY". Its parts are attributes: code that catches the
    error adds a place (`within`) or another remedy (`replace`). It never cuts the text.

    Args:
        subject: what is wrong: an option, a config key, a file; or, without an expectation, the whole
            sentence.
        expectation: "must be ...".
        got: what came, as the message shows it.
        remedy: what to do.
    """

    def __init__(self, subject: str, expectation: str = "", *, got: object = "", remedy: str = ""):
        self.subject, self.expectation, self.got, self.remedy = subject, expectation, str(got), remedy
        statement = " ".join(filter(None, (subject, expectation)))
        came = f", got {got}" if self.got else ""
        super().__init__(f"{statement}{came}{f'; {remedy}' if remedy else ''}")

    def __reduce__(self) -> tuple[Any, ...]:  # processes send it to each other
        return _rebuild_error, (type(self), self._parts())

    def replace(self, **parts: str) -> "UserError":
        """The same error with other parts."""
        return _rebuild_error(type(self), self._parts() | parts)

    def within(self, place: str) -> "UserError":
        """The same error with "PLACE: " before its subject."""
        return self.replace(subject=f"{place}: {self.subject}")

    def _parts(self) -> dict[str, str]:
        return {part: getattr(self, part) for part in ("subject", "expectation", "got", "remedy")}


def _rebuild_error(kind: type[UserError], parts: dict[str, str]) -> UserError:
    return kind(**parts)


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Build `cls` from a JSON file and dotted overrides such as `optimizer.peak_lr=3e-4`.

    Raises:
        UserError: it names the file, the key, the value and, for an unknown key, the nearest known one.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config must be a JSON object, got {_describe(data)}")
    for override in overrides:
        _apply_override(data, override)
    return from_dict(cls, data, where=str(path))


def from_dict(cls: type[Config], data: dict[str, Any], where: str = "config") -> Config:
    """Build the dataclass `cls` from plain JSON values. Raises UserError; its message starts with `where`."""
    return _build(cls, data, where, ())


def derived() -> Any:
    """The default of a field that `__post_init__` computes from other fields.

    JSON may hold null for it. The object holds the computed value, so the field is declared without None.
    """
    return None


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON values of a config: `from_dict(type(config), to_dict(config)) == config`."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two JSON objects, as "key.subkey was X, is Y now". Long values are cut."""
    flat_old, flat_new = dict(flatten(old)), dict(flatten(new))
    pairs = {key: (flat_old.get(key), flat_new.get(key)) for key in flat_old | flat_new}
    return [f"{key} was {_describe(a)}, is {_describe(b)} now" for key, (a, b) in pairs.items() if a != b]


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a JSON object, each with its key: "key.subkey"."""
    if isinstance(value, dict | list | tuple) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from flatten(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def read_json(path: str | Path) -> Any:
    """Read JSON strictly: UTF-8, no duplicate keys, no NaN or Infinity. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: cannot be read: {reason}") from error
    try:
        return _parse_json(text)
    except (ValueError, RecursionError) as error:
        remedy = "it looks like YAML: write it as JSON" if _looks_like_yaml(str(path), text) else ""
        raise UserError(f"{path}: not valid JSON: {error}", remedy=remedy) from error


def _looks_like_yaml(path: str, text: str) -> bool:
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return path.lower().endswith((".yaml", ".yml")) or bool(
        re.match(r"---|- |[A-Za-z_][\w.-]*:(\s|$)", next(lines, ""))
    )


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON as `write_text` writes."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def write_text(path: str | Path, text: str) -> None:
    """Write a text and a newline so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _parse_json(text: str) -> Any:
    """Raises ValueError for a duplicate key and for a number that is not finite."""
    return json.loads(
        text,
        object_pairs_hook=unique_keys,
        parse_constant=_refuse_constant,
        parse_float=_finite_float,
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for json: the object of these pairs. Raises ValueError for a key that stands twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {twice!r}")
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a config may hold")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise UserError(f"an override must look like key.subkey=value, got {override!r}")
    try:
        value = _parse_json(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string: optimizer.kind=muon
    except ValueError as error:
        raise UserError(f"override {override!r}: {error}") from error
    target: Any = data
    for depth, key in enumerate(keys):
        path, last = ".".join(keys[: depth + 1]), depth == len(keys) - 1
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                raise UserError(f"override {override!r}: {path} must be an index below {len(target)}")
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
            if not last and target.get(key) is None:
                target[key] = {}
        else:
            parent = ".".join(keys[:depth])
            raise UserError(f"override {override!r}: {parent} holds {_describe(target)}, it has no keys")
        if last:
            target[index] = value
        else:
            target = target[index]


def _build(cls: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        raise _error(where, path, "must be an object", value)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            unknown = _error(where, (*path, key), f"unknown key (value {json.dumps(value[key])[:60]})")
            raise unknown.replace(remedy=hint)
    arguments = {}
    for name, field in fields.items():
        if name in value:
            is_derived = value[name] is None and field.default is None
            arguments[name] = None if is_derived else _coerce(hints[name], value[name], where, (*path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _error(where, (*path, name), "is required, but missing")
    try:
        return cls(**arguments)
    except UserError as error:
        if error.subject in fields:
            raise error.replace(subject=_place(where, (*path, error.subject))) from error
        raise error.replace(subject=f"{_place(where, path)} {error.subject}".lstrip()) from error
    except ValueError as error:
        raise _error(where, path, str(error)) from error


def _coerce(hint: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments and isinstance(value, type(arguments[arguments.index(value)])):
            return value
        refused = _error(where, path, f"must be one of {', '.join(map(json.dumps, arguments))}", value)
        near = difflib.get_close_matches(str(value), map(str, arguments), n=1)
        raise refused.replace(remedy=f"did you mean {near[0]!r}?") if near else refused
    if origin in (Union, types.UnionType):
        return _coerce_union(arguments, value, where, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _error(where, path, "must be a list", value)
        return tuple(_coerce(arguments[0], item, where, (*path, str(i))) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _error(where, path, "must be an object", value)
        return {key: _coerce(arguments[1], item, where, (*path, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    raise _error(where, path, f"must be {_TYPE_NAMES.get(hint, hint.__name__)}", value)


def _coerce_union(options: tuple[Any, ...], value: Any, where: str, path: tuple[str, ...]) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _coerce(options[0], value, where, path)
    classes = {
        typing.get_args(typing.get_type_hints(option)["kind"])[0]: option
        for option in options
        if dataclasses.is_dataclass(option)
    }
    if classes:
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind not in classes:
            raise _error(
                where, (*path, "kind"), f"must be one of {', '.join(map(json.dumps, classes))}", kind
            )
        return _build(classes[kind], value, where, path)
    for option in options:
        origin = typing.get_origin(option)
        if type(value) is option or (origin is Literal and value in typing.get_args(option)):
            return value
        if origin is tuple and isinstance(value, list | tuple):
            return _coerce(option, value, where, path)
    raise _error(where, path, f"must be {' or '.join(map(_describe_type, options))}", value)


def _describe_type(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(map(json.dumps, typing.get_args(option)))
    return _TYPE_NAMES.get(option, str(option))


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


_NOTHING = object()


def _error(where: str, path: tuple[str, ...], expectation: str, got: Any = _NOTHING) -> UserError:
    return UserError(_place(where, path), expectation, got="" if got is _NOTHING else _describe(got))


def _place(where: str, path: tuple[str, ...]) -> str:
    key = ".".join(path)
    return f"{where}: {key}".rstrip() if where else key


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
