import numpy as np
from task_runs import pairs_config, planned, run_stages, texts_config

from lumi.corpus import prepare
from lumi.corpus.scale.work import load_work, plan_work
from lumi.corpus.source_outcomes import source_keys


def test_a_plan_that_is_read_again_is_the_same(tmp_path):
    config = texts_config(tmp_path)
    work = plan_work(tmp_path / "c", config, source_keys(config))
    work.save()
    again = load_work(str(work.folder))
    assert (again.output, again.config, again.inputs_key) == (work.output, config, work.inputs_key)
    assert again.units == work.units
    assert [cache.folder for cache in again.caches] == [cache.folder for cache in work.caches]
    assert len({cache.folder for cache in again.caches}) == len(work.units) == 10


def test_the_key_of_the_inputs_is_that_of_one_process(tmp_path):
    config = pairs_config(tmp_path)
    manifest = prepare(config, tmp_path / "one", num_workers=1)
    assert planned(config, tmp_path / "c").inputs_key == manifest["inputs_key"]


def test_offsets_count_the_documents_of_each_unit(tmp_path):
    work = planned(pairs_config(tmp_path), tmp_path / "c")
    run_stages(work, 1, ["read"])
    counts = [
        sum(outcome.document is not None for part in cache.read() for outcome in part)
        for cache in work.caches
    ]
    assert work.offsets.tolist() == np.cumsum([0, *counts]).tolist()
    assert min(counts) > 50
