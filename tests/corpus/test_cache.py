import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from lumi.config import UserError, from_dict, to_dict
from lumi.corpus import JsonlSource, PrepareConfig, PythonDocsSource, prepare, processing, reading
from lumi.corpus.cache import PART

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "ma", "lis", "ro", "sk")]


def prose(seed):
    return " ".join(random.Random(seed).choices(WORDS, k=60)) + ".\n"


def jsonl(path, seeds):
    path.write_text("".join(json.dumps({"text": prose(seed)}) + "\n" for seed in seeds), encoding="utf-8")
    return JsonlSource(name=path.stem, paths=(str(path),))


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(processing, "BATCH_DOCUMENTS", 4)


@pytest.fixture
def processed(monkeypatch):
    """The texts that were processed, and not read from a cache."""
    texts = []
    process_batch = processing.process_batch

    def count(rules, records):
        texts.extend(record.document for record in records)
        return process_batch(rules, records)

    monkeypatch.setattr(processing, "process_batch", count)
    return texts


def test_a_second_run_reuses_sources_and_duplicates_are_found_across_them(tmp_path, processed):
    first, second = jsonl(tmp_path / "a.jsonl", range(20)), jsonl(tmp_path / "b.jsonl", range(10, 30))
    prepare(PrepareConfig(sources=(first,)), tmp_path / "c", num_workers=1)
    processed.clear()
    both = PrepareConfig(sources=(first, second))
    manifest = prepare(both, tmp_path / "c", use_cache=True, num_workers=1)
    assert processed == [prose(seed) for seed in range(10, 30)]
    assert manifest["sources"][1]["dropped"] == {"exact_duplicate": 10}
    processed.clear()
    turned = prepare(PrepareConfig(sources=(second, first)), tmp_path / "c", use_cache=True, num_workers=1)
    assert processed == []
    assert [source["kept"] for source in turned["sources"]] == [20, 10]
    prepare(PrepareConfig(sources=(second, first)), tmp_path / "d", num_workers=1)
    assert tree(tmp_path / "c") == tree(tmp_path / "d")


def test_an_unchanged_corpus_is_verified_and_left_alone(tmp_path, processed, capsys):
    config = PrepareConfig(sources=(jsonl(tmp_path / "a.jsonl", range(5)),))
    manifest = prepare(config, tmp_path / "c", num_workers=1)
    before = tree(tmp_path / "c")
    assert prepare(config, tmp_path / "c", use_cache=True, num_workers=1) == manifest
    assert "is up to date: 5 documents" in capsys.readouterr().out
    (shard,) = (tmp_path / "c").glob("shard*")
    shard.write_bytes(shard.read_bytes()[:-1])
    processed.clear()
    assert prepare(config, tmp_path / "c", use_cache=True, num_workers=1) == manifest
    assert processed == []
    assert tree(tmp_path / "c") == before


def test_without_use_cache_everything_is_done_anew(tmp_path, processed, capsys):
    config = PrepareConfig(sources=(jsonl(tmp_path / "a.jsonl", range(5)),))
    prepare(config, tmp_path / "c", num_workers=1)
    processed.clear()
    prepare(config, tmp_path / "c", num_workers=1)
    assert len(processed) == 5
    assert "is discarded" not in capsys.readouterr().err
    (tmp_path / "c" / "manifest.json").unlink()
    prepare(config, tmp_path / "c", num_workers=1)
    assert len(processed) == 10
    assert "what an interrupted run left is discarded; --use-cache goes on from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"filters": {"min_chars": 100}}, True),
        ({"cleaning": {"normalization": "none"}}, True),
        ({"deduplication": {"shingle_words": 3}}, True),
        ({"deduplication": {"threshold": 0.5}}, False),
        ({"shard_bytes": 4096}, False),
        ({"bytes_per_token": 3.0}, False),
    ],
)
def test_what_the_cache_depends_on(tmp_path, processed, change, redone):
    base = {"sources": [to_dict(jsonl(tmp_path / "a.jsonl", range(5)))]}
    prepare(from_dict(PrepareConfig, base), tmp_path / "c", num_workers=1)
    processed.clear()
    prepare(from_dict(PrepareConfig, base | change), tmp_path / "c", use_cache=True, num_workers=1)
    assert bool(processed) == redone
    assert len([path for path in (tmp_path / "c" / ".cache").iterdir() if path.is_dir()]) == 1


def test_a_file_that_changed_is_read_again(tmp_path, processed):
    source = jsonl(tmp_path / "a.jsonl", range(5))
    prepare(PrepareConfig(sources=(source,)), tmp_path / "c", num_workers=1)
    processed.clear()
    jsonl(tmp_path / "a.jsonl", range(6))
    assert (
        prepare(PrepareConfig(sources=(source,)), tmp_path / "c", use_cache=True, num_workers=1)["documents"]
        == 6
    )
    assert len(processed) == 6
    path = tmp_path / "a.jsonl"
    modified = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b".", b"!"))  # the same size
    os.utime(path, ns=(modified, modified + 10**9))
    prepare(PrepareConfig(sources=(source,)), tmp_path / "c", use_cache=True, num_workers=1)
    assert len(processed) == 12


@pytest.mark.usefixtures("small_batches")
def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path, processed):
    source = to_dict(jsonl(tmp_path / "a.jsonl", range(40)))

    def run(max_documents):
        config = from_dict(PrepareConfig, {"sources": [source | {"max_documents": max_documents}]})
        return prepare(config, tmp_path / "c", use_cache=True, num_workers=1)["documents"]

    assert run(6) == 6
    assert len(processed) == 8
    assert run(13) == 13
    assert len(processed) == 16
    assert run(5) == 5
    assert run(None) == 40
    assert len(processed) == 40


@pytest.mark.usefixtures("small_batches")
def test_a_damaged_part_is_found_and_made_again(tmp_path, processed, capsys):
    config = PrepareConfig(sources=(jsonl(tmp_path / "a.jsonl", range(40)),))
    manifest = prepare(config, tmp_path / "c", num_workers=1)
    for damage in (b"", b"x" * 50):
        (tmp_path / "c" / "manifest.json").unlink()
        parts = sorted((tmp_path / "c" / ".cache").glob("*/part-*"))
        assert all(PART.fullmatch(part.name) for part in parts)
        assert len(parts) == 10
        parts[5].write_bytes(damage)
        processed.clear()
        assert prepare(config, tmp_path / "c", use_cache=True, num_workers=1) == manifest
        assert len(processed) == 20
        assert f"{parts[5]}: this part of the cache is damaged, it is made again" in capsys.readouterr().err
    (tmp_path / "c" / "manifest.json").unlink()
    next((tmp_path / "c" / ".cache").glob("*/facts.json")).write_text("{")
    processed.clear()
    assert prepare(config, tmp_path / "c", use_cache=True, num_workers=1) == manifest
    assert len(processed) == 40


def test_python_docs_are_not_collected_twice_and_keep_their_hash(tmp_path, monkeypatch):
    config = PrepareConfig(sources=(PythonDocsSource(name="docs", packages=("topics",)),))
    manifest = prepare(config, tmp_path / "c", num_workers=1)
    assert len(manifest["sources"][0]["sha256"]) == 64
    (tmp_path / "c" / "manifest.json").unlink()
    monkeypatch.setattr(reading, "read_python_docs", None)
    assert prepare(config, tmp_path / "c", use_cache=True, num_workers=1) == manifest


CHILD = """
import os, sys, time
from pathlib import Path
from lumi.config import load_config
from lumi.corpus import PrepareConfig, prepare, processing

processing.BATCH_DOCUMENTS = 4
process_batch = processing.process_batch

def slow(rules, records):
    (Path(sys.argv[3]) / str(os.getpid())).touch()
    time.sleep(0.1)
    return process_batch(rules, records)

processing.process_batch = slow
if __name__ == "__main__":
    config = load_config(PrepareConfig, sys.argv[1])
    prepare(config, sys.argv[2], use_cache=True, num_workers=int(sys.argv[4]))
"""


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("stop", "num_workers"), [(signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGINT, 1)]
)
def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path, processed, stop, num_workers):
    sources = (jsonl(tmp_path / "a.jsonl", range(12)), jsonl(tmp_path / "b.jsonl", range(6, 200)))
    config = PrepareConfig(sources=sources)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "pids").mkdir()
    arguments = [
        tmp_path / "child.py",
        tmp_path / "config.json",
        tmp_path / "c",
        tmp_path / "pids",
        num_workers,
    ]
    child = subprocess.Popen([sys.executable, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    cache = tmp_path / "c" / ".cache"
    deadline = time.monotonic() + 60
    while len(list(cache.glob("b-*/part-*.parquet"))) < 3:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(stop)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: -2}[stop]
    if stop != signal.SIGKILL:
        assert "lumi: interrupted; finished batches are kept, run again with --use-cache to go on" in errors
    assert not (tmp_path / "c" / "manifest.json").exists()
    _wait_for_the_end_of([int(path.name) for path in (tmp_path / "pids").iterdir()])

    resumed = prepare(config, tmp_path / "c", use_cache=True, num_workers=1)
    assert 0 < len(processed) <= 194 - 12
    assert prepare(config, tmp_path / "d", num_workers=1) == resumed
    assert tree(tmp_path / "c") == tree(tmp_path / "d")
    assert not (tmp_path / "c" / ".building").exists()


def _wait_for_the_end_of(processes):
    deadline = time.monotonic() + 20
    while any(_is_alive(process) for process in processes):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _is_alive(process):
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_two_runs_in_one_folder_are_refused(tmp_path):
    config = PrepareConfig(sources=(jsonl(tmp_path / "a.jsonl", range(3)),))
    (tmp_path / "c" / ".cache").mkdir(parents=True)
    holds = "import sys; from lumi.host.locks import lock_file; lock_file(sys.argv[1], 0, print)"
    holds += "; print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(tmp_path / "c" / ".cache" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="--output-dir must be used by one run at a time"):
            prepare(config, tmp_path / "c", num_workers=1)
        other.stdin.close()
    prepare(config, tmp_path / "c", num_workers=1)
