"""The documentation says what is there: links, paths, commands, options, configs and figures."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import lumi.cli
import lumi.configs
import lumi.train
from lumi.command_line import normalize
from lumi.config import from_dict, load_config
from lumi.corpus import PrepareConfig
from lumi.evaluation.evaluate import EvaluationConfig
from lumi.sweeps.sweep_config import SweepConfig
from lumi.tokenizer.training import TokenizerConfig
from lumi.training.run_config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@functools.cache
def generator():
    """docs/configuration_reference.py."""
    specification = importlib.util.spec_from_file_location(
        "configuration_reference", ROOT / "docs" / "configuration_reference.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def blocks(page, language):
    """The code blocks of a page in one language."""
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def code_spans(page):
    """What stands in backquotes within the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


class TestConfigurationReference:
    def test_the_page_is_what_the_generator_gives(self):
        page = (ROOT / "docs" / "configuration.md").read_text()
        assert page == generator().render(), "run: make docs"

    def test_every_key_has_a_meaning(self):
        missing = [
            f"{cls.__name__}.{key}"
            for _, cls, _ in generator().sections()
            for key, meaning in generator().meanings(cls).items()
            if not meaning
        ]
        assert not missing, "write a comment beside each of these fields"

    def test_every_key_of_the_shipped_configs_is_on_the_page(self):
        page = (ROOT / "docs" / "configuration.md").read_text()
        for path in Path(lumi.configs.__file__).parent.rglob("*.json"):
            if path.stem != "smoke_tests":
                assert {key for key in json.loads(path.read_text()) if f"| `{key}` |" not in page} == set()

    @pytest.mark.parametrize(
        ("body", "meaning"),
        [
            ("key: int = 1  # rows; null: none", "Rows; null: none."),
            ("# of each folder,\n# in tokens\nkey: int = 1", "Of each folder, in tokens."),
            ("key: int = (\n    1  # rows\n)", "Rows."),
            ('key: int = 1\n"""Rows."""', "Rows."),
            ('"""What it is. `key`: how many rows; `other`: no."""\nkey: int = 1', "How many rows."),
            ('"""What it is.\n\nArgs:\n    key: a row,\n        < 1\n"""\nkey: int', "A row, &lt; 1."),
            ('"""What it is."""\nkey: int = 1  # None: `<s>`', "Null: `<s>`."),
            ('"""What it is."""\nkey: int = 1', ""),
        ],
        ids="trailing above within below clause entry code nothing".split(),
    )
    def test_where_a_meaning_may_stand(self, body, meaning, tmp_path, monkeypatch):
        path = tmp_path / "example.py"
        header = "from dataclasses import dataclass\n\n\n@dataclass\nclass Example:\n"
        path.write_text(header + textwrap.indent(body, "    ") + "\n")
        specification = importlib.util.spec_from_file_location("example", path)
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "example", module)
        specification.loader.exec_module(module)
        assert generator().meanings(module.Example) == {"key": meaning}


def anchors(page):
    """The names of a page's headings, as GitHub and MkDocs make them."""
    return {generator().anchor(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


@each_page
def test_headings_have_names_of_their_own(page):
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    # A changelog repeats "Added" and "Changed" in each version.
    assert page.stem == "CHANGELOG" or len(anchors(page)) == len(titles)


@each_page
def test_paths_exist(page):
    for path in code_spans(page):
        if re.match(r"(lumi|tests|configs|kernels|csrc|benchmarks|docs|dev)/[\w./-]+$", path):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"


def test_tests_exist():
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    for page in PAGES:
        named = {span for span in code_spans(page) if re.fullmatch(r"test_\w+", span)}
        assert named <= defined, page.name


def commands(page):
    """The command lines of a page, as lists of words; variables that the page sets are put in."""
    variables = {}
    for block in blocks(page, "sh"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assignment[1]] = assignment[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            if words := shlex.split(line, comments=True):
                yield words


class ParsedError(Exception):
    """Ends a command when its arguments are parsed, before any work."""


def parse(command, words, monkeypatch):
    """What the command's own parser makes of the words; a wrong option is a SystemExit."""

    def parse_args(self, *arguments, **named):
        raise ParsedError(self, original(self, *arguments, **named))

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(ParsedError) as stopped:
        command(normalize(words))
    return stopped.value.args


@each_page
def test_commands_are_accepted(page, monkeypatch):
    for words in commands(page):
        if words[0] == "lumi":
            parse(lumi.cli.COMMANDS[words[1]], words[2:], monkeypatch)
        elif "lumi/train.py" in words:
            parse(lumi.train.main, words[words.index("lumi/train.py") + 1 :], monkeypatch)
        for path in words:
            assert not path.startswith("configs/") or (ROOT / path).exists(), f"{page.name} names {path}"


@each_page
def test_commands_and_options_in_the_prose_exist(page, monkeypatch):
    required = {"--model-path": "m", "--config": "c", "--output-dir": "o", "--corpus-dirs": "d"}
    for span in code_spans(page):
        words = span.split()
        if words[0] != "lumi" or len(words) < 2:
            continue
        assert words[1] in lumi.cli.COMMANDS, f"{page.name} names {span}"
        options = {word for word in normalize(words) if word.startswith("--")} - {"--help"}
        if options:
            given = [word for pair in required.items() for word in pair]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "error", lambda self, message: None)
                known = parse(lumi.cli.COMMANDS[words[1]], given, patch)[0]._option_string_actions
            assert options <= known.keys(), f"{page.name} names {span}"


def test_make_targets_exist():
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        spans = [*code_spans(page), *(line for block in blocks(page, "sh") for line in block.splitlines())]
        named = {target for span in spans for target in re.findall(r"^make ([\w-]+)", span)}
        assert named <= defined, page.name


@each_page
def test_configs_are_accepted(page):
    by_key = {"sources": PrepareConfig, "vocab_size": TokenizerConfig, "tasks": EvaluationConfig}
    by_key["search"] = SweepConfig
    for block in blocks(page, "json"):
        data = json.loads(block)
        cls = next((cls for key, cls in by_key.items() if key in data), TrainConfig)
        from_dict(cls, {"num_steps": 1000} | data if cls is TrainConfig else data)


def test_numbers_of_parameters_are_those_of_the_configs():
    named = set()
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "planning.md"):
        for name, count in re.findall(r"^\| (\w+) \| ([\d,]{7,}) \|", page.read_text(), re.MULTILINE):
            config = load_config(TrainConfig, ROOT / "configs" / "pretrain" / f"{name}.json")
            assert config.model.num_parameters == int(count.replace(",", "")), f"{page.name}: {name}"
            named.add(name)
    assert named == {path.stem for path in (ROOT / "configs" / "pretrain").glob("*.json")}


def test_every_field_of_the_log_is_explained(tmp_path):
    from lumi.evaluation import HeldOut
    from lumi.training.metrics import read_metrics
    from lumi.training.objective import HeldOutPairs
    from lumi.training.run_folder import RunFolder
    from lumi.training.run_log import RunLog
    from lumi.training.train_state import StepOutcome

    outcome = StepOutcome(
        step=1, loss=2.0, gradient_norm=0.5, lr=0.1, num_targets=9, micro_losses=[], accepted=True
    )
    log = RunLog(RunFolder(tmp_path), is_main=True)
    log.begin(0)
    with log.progress(0, 1):
        log.step(outcome, skipped_steps=1, mix=[0.5, 0.5], tokens=64, flops_share=1e-9)
    written = set(read_metrics(tmp_path / "metrics.jsonl")[0])
    written |= {field.name for cls in (HeldOut, HeldOutPairs) for field in dataclasses.fields(cls)}
    page = (ROOT / "docs" / "watching.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", page.split("## Fields of")[1], re.MULTILINE))
    assert explained == written | {"stall_seconds"}
