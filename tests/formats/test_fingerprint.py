"""The fingerprint of weights is that of their values, whatever files hold them."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from crafted_models import save_base

from lumi.config import UserError
from lumi.formats.fingerprint import is_fingerprint_of, weights_fingerprint
from lumi.formats.hf_format import load_model, save_model
from lumi.host.storage import sha256_file
from lumi.kernels.bundle import REFERENCE


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    return save_base(tokenizer, tmp_path / "base")


def change(folder, edit):
    """Save the weights again, changed; the file's order and metadata are not those of before."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(dict(reversed(tensors.items())), file, {"note": "saved again"})


def test_by_hand(base_dir):
    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.torch.load_file(base_dir / "model.safetensors").items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode() + tensor.float().numpy().tobytes())
    assert weights_fingerprint(base_dir) == digest.hexdigest()


def test_files_make_no_difference(base_dir, tokenizer, tmp_path):
    fingerprint = weights_fingerprint(base_dir)
    save_model(tmp_path / "sharded", load_model(base_dir, REFERENCE), tokenizer, max_shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_fingerprint(tmp_path / "sharded") == fingerprint
    before = sha256_file(base_dir / "model.safetensors")
    change(base_dir, lambda tensors: tensors.update({"rotary_emb.inv_freq": torch.ones(4)}))
    assert sha256_file(base_dir / "model.safetensors") != before
    assert weights_fingerprint(base_dir) == fingerprint


def test_a_repeated_tied_matrix_makes_no_difference(tokenizer, tmp_path):
    base_dir = save_base(tokenizer, tmp_path / "base", tied_embeddings=True)
    fingerprint = weights_fingerprint(base_dir)
    change(base_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert weights_fingerprint(base_dir) == fingerprint


def test_values_make_one(base_dir):
    fingerprint = weights_fingerprint(base_dir)
    change(base_dir, lambda tensors: tensors["model.norm.weight"][0].add_(1e-6))
    assert weights_fingerprint(base_dir) != fingerprint


def test_wider_is_the_same_and_rounded_is_another(base_dir, tokenizer, tmp_path):
    model = load_model(base_dir, REFERENCE)
    save_model(tmp_path / "narrow", model, tokenizer, "bfloat16")
    save_model(tmp_path / "wide", load_model(tmp_path / "narrow", REFERENCE), tokenizer, "float32")
    narrow, wide = weights_fingerprint(tmp_path / "narrow"), weights_fingerprint(tmp_path / "wide")
    assert narrow == wide != weights_fingerprint(base_dir)


def test_the_fingerprint_of_the_first_version_is_that_of_the_files(base_dir):
    of_files = hashlib.sha256(sha256_file(base_dir / "model.safetensors").encode()).hexdigest()
    assert is_fingerprint_of(weights_fingerprint(base_dir), base_dir)
    assert is_fingerprint_of(of_files, base_dir)
    change(base_dir, lambda tensors: None)
    assert not is_fingerprint_of(of_files, base_dir)


def test_a_folder_without_weights_is_refused(base_dir):
    (base_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        weights_fingerprint(base_dir)
