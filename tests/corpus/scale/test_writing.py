import shutil

import pytest
from task_runs import files_of, make_small, pairs_config, planned, run_stages

from lumi.config import UserError
from lumi.corpus import prepare, read_corpus


@pytest.fixture
def work(tmp_path, monkeypatch):
    make_small(monkeypatch)
    work = planned(pairs_config(tmp_path), tmp_path / "c")
    run_stages(work, 2, ["read", "share", "decide"])
    return work


def test_a_damaged_part_of_a_cache_is_named(work):
    part = next(work.cache(1).folder.glob("part-000002-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"part 2 of .* must be there and whole; run without --use-cache"):
        run_stages(work, 1, ["write"])


def test_publishing_goes_on_after_some_shards_were_moved(work, tmp_path):
    run_stages(work, 2, ["write"])
    moved = sorted(work.shards.glob("shard-*"))[:2]
    for path in moved:
        shutil.move(path, work.output)
    run_stages(work, 1, ["publish"])
    read_corpus(work.output).verify()
    prepare(work.config, tmp_path / "one", num_workers=1)
    assert files_of(work.output) == files_of(tmp_path / "one")


def test_an_earlier_corpus_and_what_is_not_needed_are_gone_at_the_end(work):
    earlier = work.output / "shard-00000-01234567.parquet"
    earlier.touch()
    other = work.output / ".cache" / "other-0123"
    other.mkdir()
    run_stages(work, 2, ["write", "publish"])
    assert not earlier.exists()
    assert not other.exists()
    caches = {cache.folder for cache in work.caches}
    assert {path for path in (work.output / ".cache").iterdir() if path.is_dir()} == caches
