"""The layout that the design promises: imports point upstream, every file has its test, no line is too
long."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Data flows from left to right, imports from right to left. `kernels` and `_csrc` stand before everything.
ORDER = """
    config command_line host chat corpus tokenizer data model parallel checkpoint formats inference evaluation
    training planning provenance reporting train finetune demo doctor sweeps server commands cli
""".split()


def imported_modules(path):
    """Names below `lumi.` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    return sorted(
        path
        for path in (ROOT / "lumi").iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    )


def test_every_module_has_its_place():
    assert {path.stem for path in modules()} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize(
    "path", [path for path in modules() if path.stem != "__init__"], ids=lambda path: path.stem
)
def test_imports_point_upstream(path):
    upstream = ORDER[: ORDER.index(path.stem)]
    files = path.rglob("*.py") if path.is_dir() else [path]
    for file in files:
        for name in imported_modules(file):
            parts = name.split(".")
            if (
                parts[0] != "lumi"
                or len(parts) == 1
                or parts[1] in ("kernels", "configs", "_csrc", "__version__", path.stem)
            ):
                continue
            assert parts[1] in upstream, f"{file.name} imports lumi.{parts[1]}, which is not upstream of it"


def test_kernels_know_nothing_of_the_rest():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imported_modules(path):
            parts = name.split(".")
            assert parts[0] != "lumi" or parts[1] in ("kernels", "_csrc"), f"{path.name} imports {name}"


def test_no_name_shadows_another_module():
    """A script's folder comes first on sys.path: a file lumi/queue.py would become `import queue` for
    everybody."""
    taken = {name.lower() for name in sys.stdlib_module_names} | {
        name.lower() for name in importlib.metadata.packages_distributions()
    }
    ours = {path.stem for path in modules()} - {"__init__"}
    assert not ours & taken - {"lumi"}


def test_the_script_takes_its_folder_off_the_path():
    """`torchrun lumi/train.py` must not turn lumi/data into everybody's `import data`."""
    script = ROOT / "lumi" / "train.py"
    code = f"""if True:
        import runpy, sys
        sys.path.insert(0, {str(script.parent)!r})
        sys.argv = ["train.py", "--help"]
        try:
            runpy.run_path({str(script)!r}, run_name="__main__")
        except SystemExit:
            assert {str(script.parent)!r} not in sys.path
            print("off the path")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "off the path" in done.stdout, done.stderr


def source_files():
    """(source, its test's path without what may follow the name)."""
    tests = ROOT / "tests"
    for source in sorted((ROOT / "lumi").rglob("*.py")):
        if source.stem != "__init__":
            yield source, tests / source.relative_to(ROOT / "lumi").parent / f"test_{source.stem}"
    for source in sorted((ROOT / "kernels").glob("*.py")):
        if source.stem != "__init__":
            yield source, tests / "kernels" / f"test_{source.stem}"


def test_every_source_file_has_its_test():
    missing = [
        str(source.relative_to(ROOT))
        for source, test in source_files()
        if not list(test.parent.glob(f"{test.name}*.py"))
    ]
    assert missing == []


def test_no_line_is_longer_than_110_columns():
    kinds = ("*.py", "*.cpp", "*.cu", "*.h", "*.cuh", "*.sh")
    folders = ("lumi", "kernels", "csrc", "tests", "benchmarks", "configs")
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for folder in folders
        for kind in kinds
        for file in (ROOT / folder).rglob(kind)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 110
    ]
    assert long == []


def test_no_init_files_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_run_time_imports_no_judge():
    judges = {"transformers", "peft", "accelerate", "trl", "pickle"}
    for path in [*(ROOT / "lumi").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        assert not judges & {name.split(".")[0] for name in imported_modules(path)}, path
