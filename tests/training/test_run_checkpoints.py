"""Which checkpoint a run goes on from, and which it keeps."""

import signal

import pytest
from runs import final_weights, losses

import lumi.checkpoint.saver
import lumi.training.objective
from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint
from lumi.config import UserError
from lumi.host.provenance import from_plain, read_provenance


def test_auto_goes_back_to_the_newest_whole_checkpoint(start, tmp_path, capsys):
    """One flipped byte costs the steps since the checkpoint before; the run then is the one that never
    stopped."""
    warms_up = {"optimizer": {"schedule": {"warmup_steps": 4}}}  # until then the length of a run is no matter
    whole = start("whole", **warms_up)
    start("damaged", num_steps=8, **warms_up)
    newest, older = (tmp_path / "damaged" / "checkpoints" / f"step-0000000{step}" for step in (8, 4))
    file = newest / "optimizer-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    start("damaged", resume="auto", **warms_up)
    printed = capsys.readouterr().out
    assert f"{file}: SHA-256 must be" in printed
    assert f"resumed from {older} at step 4" in printed
    assert losses(tmp_path / "damaged") == losses(whole)
    assert final_weights(tmp_path / "damaged") == final_weights(whole)
    for path in list_checkpoints(tmp_path / "damaged" / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=r"none of 2 checkpoints is whole; the newest: "
        r".*step-00000012/state\.json: must be \d+ bytes, got 2",
    ):
        start("damaged", resume="auto", num_steps=16)


def test_equal_runs_leave_equal_bytes_and_name_what_they_were_made_from(
    start, tmp_path, store_dir, tokenizer_dir
):
    for name in ("one", "two"):
        start(name, num_steps=4)
    final, checkpoint = "final", "checkpoints/step-00000004"
    for folder in (final, checkpoint):
        files = [
            {path.name: path.read_bytes() for path in (tmp_path / name / folder).iterdir()}
            for name in ("one", "two")
        ]
        assert files[0] == files[1]
    made_from = from_plain(
        open_checkpoint(tmp_path / "one" / checkpoint).state["parents"], tmp_path / "one" / checkpoint
    )
    assert [(parent.kind, parent.path) for parent in made_from] == [
        ("tokenizer", tokenizer_dir),
        ("token store", store_dir),
    ]
    assert read_provenance(tmp_path / "one" / final).parents == made_from  # which checkpoints may go


def test_best_and_last_checkpoints_are_kept(start, monkeypatch):
    results = iter([3.0, 1.0, 2.0, 2.5, 2.2])
    real = lumi.training.objective.held_out_loss

    def scripted(*arguments):
        return type(real(*arguments))(loss=next(results), bits_per_byte=1.0, tokens=1, bytes=1)

    monkeypatch.setattr(lumi.training.objective, "held_out_loss", scripted)
    folder = start(num_steps=10, validate_every=2, save_every=2, keep_last=2)
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
    assert open_checkpoint(folder / "checkpoints" / "step-00000010").state["best"] == {"step": 4, "loss": 1.0}


def test_a_corrupt_checkpoint_that_was_asked_for_is_an_error(start):
    folder = start()
    newest = list_checkpoints(folder / "checkpoints")[-1]
    data = bytearray((newest / "model-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model-00000.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=rf"{newest.name}/model-00000\.safetensors: SHA-256 must be"):
        start(resume=str(newest))
    assert len(losses(folder)) == 12  # nothing was thrown away


def test_from_an_older_checkpoint_the_newer_ones_make_way(start, capsys):
    folder = start(keep_last=1, save_every=3)
    straight, weights = losses(folder), final_weights(folder)
    folder = start("again", keep_last=9, save_every=3)
    older = folder / "checkpoints" / "step-00000003"
    start("again", resume=str(older), keep_last=1, save_every=3)
    printed = capsys.readouterr().out
    assert "set aside step-00000012: this run goes on from before it" in printed
    assert "changed since the checkpoint: keep_last was 9, is 1 now" in printed
    assert losses(folder) == straight
    assert final_weights(folder) == weights
    assert "step-00000012" in [path.name for path in list_checkpoints(folder / "checkpoints")]


def test_another_runs_checkpoint_starts_a_new_run(start):
    folder = start()
    other = start("other", resume=str(folder / "checkpoints" / "step-00000008"))
    assert losses(other) == losses(folder)[8:]
    assert final_weights(other) == final_weights(folder)
    at_its_end = start(
        "at its end", resume=str(folder / "checkpoints" / "step-00000012")
    )  # nothing is left to do but final/
    assert final_weights(at_its_end) == final_weights(folder)


def test_a_stop_right_after_a_save_does_not_save_again(start, monkeypatch):
    """Replacing a whole checkpoint by the same one would open a moment in which a kill finds none."""
    real, saves = lumi.checkpoint.saver.Saver.begin, []

    def begin(self, step, *arguments):
        saves.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(self, step, *arguments)

    monkeypatch.setattr(lumi.checkpoint.saver.Saver, "begin", begin)
    start(expect=128 + signal.SIGTERM)
    assert saves == [4]


def test_auto_with_nothing_to_resume_says_so(start, capsys):
    start(resume="auto")
    assert "starting at step 0" in capsys.readouterr().out
