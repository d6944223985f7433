"""The Dockerfile names what is there; building it needs Docker and a network."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lumi.cli import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())  # continued lines as one
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name):
    return [line.split(maxsplit=1)[1] for line in TEXT.splitlines() if line.split(maxsplit=1)[:1] == [name]]


def test_paths_exist():
    copied = [words.split()[:-1] for words in instructions("COPY") if not words.startswith("--from")]
    paths = {path for paths in copied for path in paths}
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    assert paths >= {"pyproject.toml", "setup.py", "MANIFEST.in", "lumi", "kernels", "configs", "csrc"}
    assert paths >= {PROJECT["readme"], *PROJECT["license-files"]}  # else setuptools refuses to build


def test_versions_fit():
    pythons = set(re.findall(r"^FROM python:([\d.]+)-", TEXT, re.MULTILINE))
    assert len(pythons) == 1, "a wheel is for one version of Python"
    assert SpecifierSet(PROJECT["requires-python"]).contains(pythons.pop())
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    needed = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
    assert re.findall(r"grep \^(\w+)==", TEXT) == ["torch"]
    for name in pins.keys() & needed.keys():
        assert needed[name].specifier.contains(pins[name]), name


def test_extras_and_commands_exist():
    extras = {name for names in re.findall(r"whl\)\[([\w,]+)\]", TEXT) for name in names.split(",")}
    assert extras
    assert extras <= PROJECT["optional-dependencies"].keys()
    [(default,)] = map(re.compile(r'"(\w+)"').findall, instructions("CMD"))
    assert default in COMMANDS
    shown = re.findall(r"^#\s+docker run .* lumi(?:-cuda)? (\w+)", TEXT, re.MULTILINE)
    assert len(shown) == 2
    assert set(shown) <= COMMANDS.keys()


def test_both_kinds_of_torch_are_built():
    assert instructions("ARG") == ["TORCH=cpu"]
    assert re.findall(r"(\w+)\) (?:pip|apt-get) ", TEXT) == ["cpu", "cuda"]
