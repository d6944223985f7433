from task_runs import pairs_config, planned, texts_config

from lumi.corpus.scale.stages import STAGES, tasks_of_stages


def test_no_stage_has_more_tasks_than_work(tmp_path):
    work = planned(texts_config(tmp_path), tmp_path / "c")
    assert tasks_of_stages(STAGES, work, 5) == {"read": 5, "share": 5, "decide": 1, "write": 5, "publish": 1}
    assert tasks_of_stages(STAGES, work, 50) == {
        "read": 10,
        "share": 34,
        "decide": 1,
        "write": 50,
        "publish": 1,
    }
    work = planned(pairs_config(tmp_path), tmp_path / "c")
    assert tasks_of_stages(STAGES, work, 50)["share"] == 1  # the exact hash
