"""What is published: an sdist, and wheels that it becomes. They run where there is no compiler."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from runs import CONFIG, losses

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "build", "dist", "runs", "docs")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "nvcc")


def call(*command, **variables):
    """Run a command with a changed environment; returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    program = (
        "import os, sys; os.chdir(sys.argv[1]); from setuptools.build_meta import build_sdist as b; b('..')"
    )
    call(sys.executable, "-c", program, folder / "tree")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture
def install(sdist, tmp_path, monkeypatch):
    """install(pure) -> the folder of programs of an environment that has Lumi's wheel, and nothing of this
    checkout. The dependencies are those of the Python that runs."""

    monkeypatch.chdir(tmp_path)  # in the checkout, `import lumi` finds its folder

    def install(pure):
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-cache-dir"]
        variables = {"LUMI_PURE": str(int(pure)), "LUMI_CUDA": "0"}
        call(*build, "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", sdist, **variables)
        wheel = next((tmp_path / "wheels").iterdir())
        assert ("py3-none-any" in wheel.name) == pure
        venv.create(tmp_path / "venv", with_pip=False)
        programs = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
        call(*pip, "install", "--no-deps", "--no-index", wheel)
        place = call(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        # Behind the environment's own packages, and without the .pth files that lie there.
        shared = [path for path in sys.path if any(Path(path).glob("*.dist-info"))]
        Path(place.strip(), "dependencies.pth").write_text("\n".join(shared))
        assert not any(shutil.which(compiler, path=str(programs)) for compiler in COMPILERS)
        return programs

    return install


def test_anywhere_it_trains_with_the_operators_of_plain_torch(install, store_dir, tokenizer_dir, tmp_path):
    programs, run = install(pure=True), tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    paths = ["--data-dirs", store_dir, "--tokenizer-dir", tokenizer_dir, "--output-dir", run]
    train = [programs / "python", "-m", "lumi.train", "--config", tmp_path / "config.json", *paths]
    printed = call(*train, "--device", "cpu", PATH=str(programs))
    assert "reference kernels; Lumi is installed without compiled ones, which are faster" in printed
    assert losses(run)[-1] < losses(run)[0]
    generate = [programs / "lumi", "generate", "--model-path", run, "--max-new-tokens", "8"]
    assert call(*generate, "--prompt", "The river", PATH=str(programs)).startswith("The river")


@pytest.mark.soak  # compiles all of csrc/ and runs all stages
def test_with_compiled_operators_the_demo_runs(install, tmp_path):
    programs = install(pure=False)
    demo = [programs / "lumi", "demo", "--minutes", "0.2", "--output-dir", tmp_path / "demo"]
    printed = call(*demo, "--device", "cpu", PATH=str(programs))
    assert "native kernels" in printed
    assert (tmp_path / "demo" / "model" / "model.safetensors").is_file()
