import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumi import doctor
from lumi.config import UserError
from lumi.kernels import native


@pytest.fixture
def ask(capsys):
    """ask() -> the exit code, and the printed sections with their rows."""

    def ask():
        code = doctor.doctor()
        sections = {}
        for line in capsys.readouterr().out.splitlines():
            if not line.startswith("  "):
                rows = sections[line.split()[0]] = {}
            else:
                name, text = line.split(maxsplit=1)
                rows[name] = text
        return code, sections

    return ask


def change_versions(monkeypatch, **versions):
    """Packages have these versions; None: they are not installed."""
    version = importlib.metadata.version

    def changed(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", changed)


def test_this_machine(ask):
    code, sections = ask()
    assert code == 0
    assert "broken" not in sections
    assert sections["installed"]["torch"] == torch.__version__
    kernels = sections["kernels"]["cpu"]
    for dtype in (torch.float32, torch.bfloat16):
        target = f"native ({native.cpu_operators(dtype).target})" if native.csrc.cpu_targets else "reference"
        assert f"{str(dtype).removeprefix('torch.')} {target}" in kernels
    assert "float16 reference, AdamW compiled" in kernels
    assert ("gpu" in sections["machine"]) != torch.cuda.is_available()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads what Linux says")
def test_instructions_are_those_of_the_processor(ask):
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    has, _, lacks = ask()[1]["machine"]["instructions"].partition("; not ")
    assert set(has.split()) <= set(flags)
    assert not set(lacks.split()) & set(flags)


def test_what_is_needed_and_not_there_is_broken(ask, monkeypatch):
    change_versions(monkeypatch, ftfy=None, numpy="1.26.4")
    code, sections = ask()
    assert code == 1
    assert sections["broken"] == {
        "ftfy": "not installed; run: pip install 'ftfy>=6.3'",
        "numpy": "1.26.4; run: pip install 'numpy>=2.0'",
    }


def test_an_extra_is_no_fault(ask, monkeypatch):
    change_versions(monkeypatch, uvicorn=None)
    code, sections = ask()
    assert code == 0
    remedy = "run: pip install 'lumi-train[serve]'"
    assert re.fullmatch(rf"lacks uvicorn\S+; {re.escape(remedy)}", sections["extras"]["serve"])
    assert "lacks uvicorn" in sections["extras"]["test"]  # it takes other extras
    assert sections["extras"]["gguf"] == "ready"


def test_without_compiled_code(ask, monkeypatch):
    monkeypatch.setattr(native, "csrc", None)
    monkeypatch.setattr(native, "_operators", {})
    code, sections = ask()
    assert code == 0
    assert "float32 reference, bfloat16 reference, float16 reference" in sections["kernels"]["cpu"]
    assert "AdamW in plain torch" in sections["kernels"]["cpu"]
    assert "pip install --editable ." in sections["missing"]["C++"]


def test_a_gpu_that_torch_does_not_see(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "missing" not in ask()[1]
    (tmp_path / "0000:01:00.0").mkdir()
    code, sections = ask()
    assert code == 0
    assert sections["missing"]["CUDA"].startswith(f"torch {torch.__version__} sees none of the GPUs here")


def test_triton_needs_a_compiler_on_a_gpu(monkeypatch, tmp_path):
    assert doctor._triton_faults() == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "gcc-12")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    assert doctor._triton_faults() == []
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    assert [name for name, _ in doctor._triton_faults()] == ["C compiler", "Python.h"]
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    assert [name for name, _ in doctor._triton_faults()] == ["Python.h"]


@pytest.mark.parametrize("module", ["torch", "lumi._csrc"])
def test_what_does_not_load_is_named(module):
    """In a process of its own: a torch that fails to load, and an extension of another Python."""
    program = f"""
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("libgone.so: cannot open shared object file")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
import lumi.cli
sys.argv = ["lumi", "doctor"]
sys.exit(lumi.cli.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "ImportError: libgone.so: cannot open shared object file" in done.stdout
    assert "sentencepiece" in done.stdout


def test_a_folder_that_was_never_installed_is_refused(monkeypatch):
    change_versions(monkeypatch, **{"lumi-train": None})
    with pytest.raises(UserError, match="lumi-train must be installed; from a clone: pip install --editable"):
        doctor.doctor()
