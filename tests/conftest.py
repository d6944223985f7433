"""Settings for all tests.

The interpreter is chosen here because Triton reads the variable when a kernel is defined.
"""

import contextlib
import json
import os
import subprocess
import sys
import zlib

import pytest
import torch
from synthetic import write_jsonl

os.environ.setdefault(
    "TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1"
)  # before any kernel import
torch.set_num_threads(
    1
)  # the tests' tensors are tiny: threads that wait for each other cost far more than they bring

with contextlib.suppress(ImportError):  # machines with a GPU may lack it, and run no test that needs it
    from hypothesis import settings

    settings.load_profile("ci")  # examples follow from the test alone: a failure comes from what changed


@pytest.fixture
def device() -> str:
    """ "cuda" where there is one; "cpu" means Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    parser.addoption(
        "--soak", metavar="all|K/N", help="run the tests marked soak: all, or part K (from 0) of N"
    )


def pytest_collection_modifyitems(config, items):
    soak = config.getoption("--soak")
    config.hook.pytest_deselected(items=[item for item in items if not _is_wanted(item, soak)])
    items[:] = [item for item in items if _is_wanted(item, soak)]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _is_wanted(item, soak):
    """`make test` leaves the tests marked soak out; `make soak` runs them alone, whole or in parts of stable
    members."""
    if soak is None or "soak" not in item.keywords:
        return (soak is None) == ("soak" not in item.keywords)
    if soak == "all":
        return True
    part, parts = map(int, soak.split("/"))
    return zlib.crc32(item.nodeid.encode()) % parts == part


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A corpus folder of 400 synthetic documents."""
    from lumi.corpus import DeduplicationConfig, JsonlSource, PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("corpus")
    source = JsonlSource(name="synthetic", paths=(str(write_jsonl(folder / "raw.jsonl", 400)),))
    prepare(
        PrepareConfig(sources=(source,), deduplication=DeduplicationConfig(near=False)),
        folder / "corpus",
        num_workers=1,
    )
    return folder / "corpus"


@pytest.fixture(scope="session")
def tokenizer(corpus_dir, tmp_path_factory):
    """A tokenizer of 384 pieces, trained on `corpus_dir`; its folder is `tokenizer_dir`."""
    from lumi.tokenizer.training import TokenizerConfig, train_tokenizer

    return train_tokenizer(
        TokenizerConfig(vocab_size=384), [corpus_dir], tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    )


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer, tmp_path_factory):
    """A folder that holds `tokenizer`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def store_dir(corpus_dir, tokenizer, tmp_path_factory):
    """A token store of `corpus_dir`, a tenth of its documents held out."""
    from lumi.data.tokenization import tokenize

    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize([corpus_dir], tokenizer, folder, validation_fraction=0.1, num_workers=1)
    return folder


@pytest.fixture(scope="session")
def pairs_dir(tokenizer, tmp_path_factory):
    """A token store of 60 pairs, some of them held out."""
    from corpora import write_pairs
    from synthetic import pair

    from lumi.data.tokenization import tokenize

    folder = tmp_path_factory.mktemp("pairs")
    (folder / "corpus").mkdir()
    write_pairs(folder / "corpus", [pair(seed) for seed in range(60)])
    tokenize([folder / "corpus"], tokenizer, folder / "tokens", validation_fraction=0.2, num_workers=1)
    return folder / "tokens"


@pytest.fixture
def start(store_dir, tokenizer_dir, tmp_path, monkeypatch):
    """Train in this process; returns the run folder. Keywords are changes to `runs.CONFIG`.

    Drawing takes half of the time of such a run: `loss.png` is empty, unless `draws`.
    """
    from runs import merged, touch_picture

    import lumi.training.run_log
    from lumi.config import from_dict
    from lumi.training.run import train
    from lumi.training.run_config import Paths, TrainConfig

    def start(
        name="run",
        resume=None,
        expect=0,
        data_dirs=(store_dir,),
        weights=None,
        draws=False,
        model_path=None,
        **changes,
    ):
        if not draws:
            monkeypatch.setattr(lumi.training.run_log, "draw_loss", touch_picture)
        folders = [str(folder) for folder in data_dirs]
        paths = Paths(folders, str(tokenizer_dir), tmp_path / name, weights, resume, model_path)
        assert train(from_dict(TrainConfig, merged(changes)), paths, "cpu") == expect
        return tmp_path / name

    return start


@pytest.fixture
def command(store_dir, tokenizer_dir, tmp_path):
    """The command line of a training, for a process of its own; `processes`: under torchrun."""
    from runs import merged

    import lumi.train

    def command(name, *arguments, processes=None, **changes):
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(merged(changes)))
        launcher = [sys.executable]
        if processes:
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
            ]
        paths = [
            "--data_dirs",
            str(store_dir),
            "--tokenizer-dir",
            str(tokenizer_dir),
            "--output-dir",
            str(tmp_path / name),
        ]
        return [
            *launcher,
            lumi.train.__file__,
            "--config",
            str(config),
            *paths,
            *arguments,
            "--device",
            "cpu",
        ]

    return command


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this machine that huggingface_hub's own client speaks to, logged in, with an empty cache."""
    import hub_server
    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api

    server = hub_server.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def disk_of(tmp_path):
    """Mount a disk of a size such as "1m"; returns its folder.

    Needs root: the test is skipped where that fails.
    """
    folder = tmp_path / "disk"

    def disk_of(size):
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if mounted.returncode:
            folder.rmdir()
            pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
        return folder

    yield disk_of
    if folder.is_dir():
        subprocess.run(["umount", str(folder)], check=True)
