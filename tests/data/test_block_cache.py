"""Blocks in a folder of a bounded size."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

from lumi.data.block_cache import BlockCache


def block(number, size=1000):
    return number.to_bytes(4, "little") * (size // 4)


def kept(folder):
    return {int(path.name): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def age(cache, number, seconds):
    path = cache.folder / "a" / f"{number:08d}"
    os.utime(path, ns=(0, path.stat().st_mtime_ns - seconds * 10**9))


def test_what_is_added_is_read_whole_and_in_parts(tmp_path):
    cache = BlockCache(tmp_path / "blocks", 10**6)
    assert cache.read("a", 0) is None
    cache.add("a", 0, block(7))
    cache.add("b", 0, block(8))
    assert cache.read("a", 0) == block(7)
    assert cache.read("b", 0, 3, 9) == block(8)[3:9]
    assert BlockCache(tmp_path / "blocks", 10**6).read("a", 0, 4, 8) == block(7)[4:8]
    assert cache.read("a", 1) is None


def test_those_used_the_longest_time_ago_make_room(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    for number in range(8):
        cache.add("a", number, block(number))
        age(cache, number, 100 - number)
    assert cache.read("a", 0, 0, 4) == block(0)[:4]  # used now
    cache.add("a", 8, block(8))
    assert kept(tmp_path).keys() == {0, 2, 3, 4, 5, 6, 7, 8}
    assert sum(kept(tmp_path).values()) <= 10_000 * 7 / 8


def test_several_processes_stay_below_the_limit_together(tmp_path):
    caches = [BlockCache(tmp_path, 1 << 20) for _ in range(8)]
    totals = []
    for number in range(50):
        for place, cache in enumerate(caches):
            cache.add("a", 1000 * place + number, block(number, 4096))
        totals.append(sum(kept(tmp_path).values()))
    assert 7 * 2**20 / 8 < max(totals) <= 2**20
    assert {1000 * place + 49 for place in range(8)} <= kept(tmp_path).keys()


def test_whoever_reads_beside_others_gets_a_whole_block_or_none(tmp_path):
    def work(cache):
        found = []
        for number in range(40):
            cache.add("a", number, block(number, 4096))
            found.append(cache.read("a", number) in (None, block(number, 4096)))
        return all(found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, [BlockCache(tmp_path, 100_000) for _ in range(8)]))
    assert sum(kept(tmp_path).values()) <= 100_000


def test_what_a_killed_process_was_writing_is_litter_after_a_while(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    cache.add("a", 0, block(0))
    for name, seconds in (("new", 60), ("old", 3600)):
        path = tmp_path / "a" / f"00000001.tmp-{name}"
        path.write_bytes(bytes(9000))
        os.utime(path, (time.time() - seconds,) * 2)
    BlockCache(tmp_path, 10_000).add("a", 2, block(2))
    assert [path.name for path in tmp_path.rglob("*.tmp-*")] == ["00000001.tmp-new"]


def test_a_limit_below_one_block_keeps_none(tmp_path):
    cache = BlockCache(tmp_path, 1)
    cache.add("a", 0, block(0))
    assert cache.read("a", 0) is None
