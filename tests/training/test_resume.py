"""What a run may go on from."""

import pytest
from runs import final_weights

from lumi.config import UserError


def test_a_run_is_not_overwritten_nor_continued_with_other_settings(start, tmp_path):
    folder = start()
    before = final_weights(folder)
    with pytest.raises(
        UserError,
        match=r"--output-dir must be new, got .*run, which holds a run; "
        r"go on with it by --resume-from-checkpoint auto",
    ):
        start()
    with pytest.raises(UserError, match=r"cannot go on from here: seed was 0, is 5 now"):
        start(resume="auto", seed=5)
    with pytest.raises(UserError, match=r"cannot go on from here: batch_tokens was 256, is 512 now"):
        start(resume="auto", batches={"batch_tokens": 512})
    with pytest.raises(UserError, match=r"num_steps must be at least the checkpoint's step 12, got 5"):
        start(resume="auto", num_steps=5)
    with pytest.raises(UserError, match=r"--output-dir must be new, got .*other, which holds a run"):
        start("other", resume=str(start("other") / ".." / "run" / "checkpoints" / "step-00000012"))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--output-dir must be a folder that can be written to, got .*file is a file"
    ):
        start("file")
    assert final_weights(folder) == before
    with pytest.raises(UserError, match=r"nowhere: must be a checkpoint folder"):
        start("new", resume=str(tmp_path / "nowhere"))
