"""Write docs/configuration.md from the config dataclasses: `python docs/configuration_reference.py`.

The meaning of a key stands in the source, beside the field. The first of these places counts:

    sequence_length: int = 1024  # a comment on the field's lines
    # a comment on the lines above the field
    "a string below the field"
    `sequence_length`: a clause in the docstring of the class
    sequence_length: an entry under "Args:" or "Attributes:" in that docstring

A key whose type is a config class may do without: the first sentence of that class explains it.
"""

import ast
import dataclasses
import functools
import html
import inspect
import json
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterator
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lumi.corpus import PrepareConfig
from lumi.evaluation.evaluate import EvaluationConfig
from lumi.sweeps.sweep_config import SweepConfig
from lumi.tokenizer.training import TokenizerConfig
from lumi.training.run_config import TrainConfig

PAGE = Path(__file__).parent / "configuration.md"
ROOTS = (
    (PrepareConfig, "Preparing a corpus", "lumi prepare --config FILE", "configs/corpus, configs/demo"),
    (TokenizerConfig, "Training a tokenizer", "lumi tokenizer --config FILE", "configs/tokenizer"),
    (
        TrainConfig,
        "Training",
        "torchrun lumi/train.py --config FILE",
        "configs/pretrain, configs/sft, configs/dpo",
    ),
    (EvaluationConfig, "Evaluation", "lumi evaluate --config FILE", "configs/evaluation"),
    (SweepConfig, "A sweep", "lumi sweep FILE", "configs/demo/sweep.json"),
)
HEAD = """# Configuration reference

<!-- Written by docs/configuration_reference.py. To change a meaning, change the comment beside the field. -->

Each stage reads one JSON file. This page lists every key that such a file may hold.

- An unknown key is refused, and the message names the nearest known one.
- A wrong type and an impossible value are refused too.
- A key that you leave out takes its default. "required" means that it has none.
- `key.subkey=value` on the command line changes one key, for example `optimizer.peak_lr=3e-4`.
  The value is JSON; a bare word is a string.
- Paths to data and models are not in the config. They are options of the command.
"""
NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", type(None): "null"}


class Section(NamedTuple):
    """One table of the page: the keys of a config class, at the first place where a file can hold it."""

    title: str
    cls: type
    is_root: bool


def config_classes(hint: Any) -> Iterator[type]:
    """The config classes that a type names, in order."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from config_classes(argument)


@functools.cache
def sections() -> list[Section]:
    """Every config class that a config file can hold, once, in the order in which a reader meets them."""
    found: list[Section] = []

    def visit(cls: type, title: str, key: str = "") -> None:
        if any(section.cls is cls for section in found):
            return
        found.append(Section(title, cls, not key))
        for name, hint in typing.get_type_hints(cls).items():
            for part in config_classes(hint):
                path = f"{key}.{name}" if key else name
                kind = kind_of(part)
                visit(part, f"`{path}`, kind `{kind}`" if kind else f"`{path}`", path)

    for root, title, _, _ in ROOTS:
        visit(root, title)
    return found


def kind_of(cls: type) -> str:
    """The value of `kind` by which this class is chosen among several; "" where there is no choice."""
    kinds = typing.get_args(typing.get_type_hints(cls).get("kind"))
    return kinds[0] if len(kinds) == 1 else ""


def anchor(title: str) -> str:
    """The name by which GitHub and MkDocs link to a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """What each key of a config class means, "" where nobody has said it."""
    docstring, beside = _clauses(inspect.getdoc(cls) or ""), _beside_fields(cls)
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        own = beside.get(field.name) or docstring.get(field.name, "")
        about = _about(list(config_classes(hints[field.name])))
        if field.name == "kind" and kind_of(cls):
            own = "Chooses this kind."
        if own.startswith(("null: ", "None: ")) and about:  # what it is, then what its absence means
            own = f"{about.rstrip('.')}; {own}"
        found[field.name] = _as_sentence(own or about)
    return found


def _about(classes: list[type]) -> str:
    """What a key holds that takes these config classes."""
    return _first_sentence(classes[0]) if len(classes) == 1 else "One of the kinds below." if classes else ""


def _first_sentence(cls: type) -> str:
    """The first sentence of a class's docstring; "" where it begins with its keys."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)(?<!et al\.)\s|:\s", text)[0]
    return "" if re.fullmatch(r"`\w+`", sentence) else sentence


def _as_sentence(text: str) -> str:
    """Upper case at the beginning, a full stop at the end, JSON's null, and no HTML outside of code."""
    text = re.sub(r"\bNone\b", "null", text.strip().rstrip(",;:"))
    pieces = re.split(r"(`[^`]*`)", text)
    text = "".join(piece if piece.startswith("`") else html.escape(piece, quote=False) for piece in pieces)
    return text and text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def _clauses(docstring: str) -> dict[str, str]:
    """key -> what a docstring says of it, in the forms that the head of this file lists."""
    found = {}
    for paragraph in re.split(r"\n\s*\n", docstring):
        if paragraph.startswith(("Args:", "Attributes:")):
            for entry in re.split(r"\n(?= {4}\w+:)", paragraph)[1:]:
                name, _, text = entry.strip().partition(":")
                found[name] = " ".join(text.split())
            continue
        text = " ".join(paragraph.split())
        marks = list(re.finditer(r"((?:`\w+`(?:, | and )?)+): ", text))
        for mark, following in zip_longest(marks, marks[1:]):
            clause = text[mark.end() : following.start() if following else len(text)]
            for name in re.findall(r"`(\w+)`", mark[1]):
                found[name] = clause
        for sentence in re.split(r"(?<=[.;])\s+", text[: marks[0].start()] if marks else text):
            if subject := re.match(r"`(\w+)` \w", sentence):
                found.setdefault(subject[1], sentence)
    return found


def _beside_fields(cls: type) -> dict[str, str]:
    """key -> the comment or string beside its field, in this class or in those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(base))
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        whole_lines = {
            number for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")
        }
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip_longest(tree.body, tree.body[1:]):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            assert statement.end_lineno is not None
            lines = list(range(statement.lineno, statement.end_lineno + 1))
            if not any(line in comments for line in lines):
                lines = []
                while (above := (lines[0] if lines else statement.lineno) - 1) in whole_lines:
                    lines.insert(0, above)
            text = " ".join(comments[line] for line in lines if line in comments)
            if not text and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            if text:
                found[statement.target.id] = text
    return found


def describe_type(hint: Any) -> str:
    """A type in the words of JSON; a config class as a link to its table."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        *first, last = dict.fromkeys(map(describe_type, arguments))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        inner = describe_type(arguments[0])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if origin is dict:
        return f"object of {describe_type(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        title = next(section.title for section in sections() if section.cls is hint)
        return f"[{kind_of(hint) or 'object'}](#{anchor(title)})"
    return NAMES[hint]


def describe_default(field: "dataclasses.Field[Any]") -> str:
    """The default as JSON; "required" where there is none."""
    if field.default is not dataclasses.MISSING:
        return f"`{json.dumps(field.default, ensure_ascii=False)}`"
    if field.default_factory is dataclasses.MISSING:
        return "required"
    kind = kind_of(type(field.default_factory()))
    return f"`{kind}`, its defaults" if kind else "its defaults"


def render() -> str:
    """The whole page."""
    about: dict[type, tuple[str, str]] = {root: (command, folders) for root, _, command, folders in ROOTS}
    lines = [HEAD]
    for title, cls, is_root in sections():
        hints, texts = typing.get_type_hints(cls), meanings(cls)
        lines.append(f"{'##' if is_root else '###'} {title}\n")
        if is_root:
            command, folders = about[cls]
            examples = " and ".join(f"`{folder}`" for folder in folders.split(", "))
            lines.append(f"For `{command}`. Examples: {examples}.\n")
        elif intro := _as_sentence(_first_sentence(cls)):
            lines.append(f"{intro}\n")
        lines.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        for field in dataclasses.fields(cls):
            kind, default = describe_type(hints[field.name]), describe_default(field)
            if default == "`null`" and "null" not in kind:  # a value that the class derives from others
                kind += " or null"
            cells = (f"`{field.name}`", kind, default, texts[field.name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if missing := [
        f"{cls.__module__}.{cls.__name__}.{key}"
        for _, cls, _ in sections()
        for key, text in meanings(cls).items()
        if not text
    ]:
        sys.exit(
            "each config key must have a meaning beside its field, these have none:\n" + "\n".join(missing)
        )
    PAGE.write_text(render(), encoding="utf-8")
