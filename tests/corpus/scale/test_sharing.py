from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from task_runs import make_small, planned, run_stages, texts_config

from lumi.corpus.deduplication import are_near
from lumi.corpus.scale.keys import count_bands, count_rows
from lumi.corpus.scale.sharing import ENTRY, SHORT_RUN, SharedKeys, _Row, _save
from lumi.corpus.scale.signatures import Signatures


@pytest.fixture
def work(tmp_path, monkeypatch):
    make_small(monkeypatch)
    work = planned(texts_config(tmp_path), tmp_path / "c")
    run_stages(work, 3, ["read", "share"])
    return work


def test_what_is_found_is_what_comparing_each_with_each_finds(work):
    config = work.config.deduplication
    keys = np.concatenate([np.load(work.index(n) / "keys.npy") for n in range(len(work.units))], axis=1)
    signatures = Signatures(work).fetch(np.arange(keys.shape[1]))
    long_runs = 0
    for row in range(count_rows(config)):
        sizes = Counter(keys[row].tolist())
        long_runs += max(sizes.values()) > SHORT_RUN
        runs = {
            key: np.nonzero(keys[row] == np.uint64(key))[0].tolist()
            for key, size in sizes.items()
            if size > 1
        }
        expected = {(document, key) for key, run in runs.items() for document in run}
        if row < count_bands(config):
            near = {
                document
                for run in runs.values()
                for pair in combinations(run, 2)
                if are_near(signatures[pair[:1],], signatures[pair[1:],], config)[0]
                for document in pair
            }
            expected = {
                (document, key) for document, key in expected if document in near or sizes[key] > SHORT_RUN
            }
        found = np.load(work.shared(row))
        assert sorted(expected) == list(zip(found["document"].tolist(), found["key"].tolist(), strict=True))
    assert long_runs


def test_rows_are_given_out_in_the_order_of_documents(work):
    rows = [np.load(work.shared(row)) for row in range(count_rows(work.config.deduplication))]
    shared, last = SharedKeys(work), 0
    for end in (0, 1, 40, 40, 41, 200, int(work.offsets[-1])):
        for taken, row in zip(shared.take(end), rows, strict=True):
            assert (taken == row[(row["document"] >= last) & (row["document"] < end)]).all()
        last = end
    assert sum(map(len, rows)) > 1000


def test_a_row_without_entries(tmp_path):
    _save(tmp_path / "shared" / "0000.npy", np.empty(0, ENTRY))
    assert len(_Row(tmp_path / "shared" / "0000.npy").take(10)) == 0
