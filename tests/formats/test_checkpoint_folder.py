"""What a checkpoint says of its run. `test_pretrained.py` loads them."""

import json

import pytest

from lumi.config import UserError
from lumi.formats.checkpoint_folder import is_checkpoint, open_folder, tokenizer_folder
from lumi.host.storage import file_record


def rewrite_state(path, change):
    """As somebody would who knows how to make the manifest fit."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = file_record(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_checkpoint_says(start, tokenizer, store_dir):
    run = start(num_steps=1)
    path = run / "checkpoints" / "step-00000001"
    assert [is_checkpoint(folder) for folder in (path, run, run / "final", store_dir)] == [True] + 3 * [False]
    opened = open_folder(path)
    assert (opened.shape.model_dim, opened.lora, opened.base) == (32, None, None)
    assert (opened.base_fingerprint, opened.tokenizer_fingerprint) == (None, tokenizer.fingerprint)
    assert tokenizer_folder(path) == run / "tokenizer"
    tuned = start("tuned", num_steps=1, model=None, lora={"rank": 2}, model_path=path)
    opened = open_folder(tuned / "checkpoints" / "step-00000001")
    assert (opened.lora.rank, opened.base, len(opened.base_fingerprint)) == (2, str(path), 64)


def test_the_tokenizer_of_an_older_run_is_that_of_final(start):
    run = start(num_steps=1)
    path = run / "checkpoints" / "step-00000001"
    (run / "tokenizer").rename(run / "gone")
    assert tokenizer_folder(path) == run / "final"
    (run / "final").rename(run / "gone too")
    with pytest.raises(UserError, match="the tokenizer must be in the run's folder"):
        tokenizer_folder(path)


def test_what_is_damaged_or_foreign_is_refused(start):
    path = start(num_steps=1) / "checkpoints" / "step-00000001"
    file = path / "model-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model-00000.safetensors: SHA-256 must be"):
        open_folder(path).weights()
    rewrite_state(path, lambda state: state.pop("identity"))
    with pytest.raises(
        UserError, match=r"state.json: must be the state of a training, got one without 'identity'"
    ):
        open_folder(path)
