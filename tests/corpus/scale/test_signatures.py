import numpy as np
from task_runs import chats_config, make_small, pairs_config, planned, run_stages

from lumi.corpus.scale.signatures import Signatures, shape_of


def test_signatures_of_any_documents_in_any_order(tmp_path, monkeypatch):
    make_small(monkeypatch)
    work = planned(chats_config(tmp_path), tmp_path / "c")
    run_stages(work, 1, ["read"])
    expected = [
        np.frombuffer(outcome.fingerprint.signature, "<u4").reshape(2, 128)  # of the whole and of answers
        for cache in work.caches
        for part in cache.read()
        for outcome in part
        if outcome.fingerprint is not None
    ]
    documents = np.random.default_rng(0).integers(len(expected), size=300)
    found = Signatures(work).fetch(documents)
    assert (found == np.array(expected)[documents]).all()
    assert Signatures(work).fetch(np.empty(0, dtype=np.int64)).shape == (0, 2, 128)


def test_there_are_none_without_near_duplicates(tmp_path):
    assert shape_of(planned(pairs_config(tmp_path), tmp_path / "c"), 5) == (5, 2, 0)
