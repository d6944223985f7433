import numpy as np
import pytest
from task_runs import chats_config, make_small, planned, run_stages

from lumi.corpus.corpus_writer import has_reasoning
from lumi.corpus.scale.keys import keys_of
from lumi.corpus.scale.reading import read_outcomes
from lumi.corpus.scale.signatures import Signatures


@pytest.fixture
def work(tmp_path, monkeypatch):
    make_small(monkeypatch)
    work = planned(chats_config(tmp_path), tmp_path / "c")
    run_stages(work, 2, ["read"])
    return work


def test_outcomes_are_there_without_documents_and_signatures(work):
    for number, cache in enumerate(work.caches):
        whole = [outcome for part in cache.read() for outcome in part]
        bare = [outcome for group in read_outcomes(work.index(number)) for outcome in group]
        assert bare == [
            outcome._replace(
                document=None,
                fingerprint=outcome.fingerprint and outcome.fingerprint._replace(signature=b""),
            )
            for outcome in whole
        ]
        assert any(outcome.reason for outcome in bare)


def test_keys_and_reasoning_of_each_document(work):
    signatures, flags = Signatures(work), []
    for number, cache in enumerate(work.caches):
        kept = [each for part in cache.read() for each in part if each.document is not None]
        documents = np.arange(work.offsets[number], work.offsets[number + 1])
        prints = [outcome.fingerprint for outcome in kept]
        expected = keys_of(prints, signatures.fetch(documents), work.config.deduplication)
        assert (np.load(work.index(number) / "keys.npy") == expected.T).all()
        reasoning = np.fromfile(work.index(number) / "reasoning", dtype=bool)
        assert reasoning.tolist() == [has_reasoning(outcome.document) for outcome in kept]
        flags += reasoning.tolist()
        assert sum(work.facts(number)["parts"]) == len(kept)
    assert 0 < sum(flags) < len(flags)
    assert not any(flags[:50])  # late, for the tests that write shards
