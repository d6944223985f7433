"""What a model, an adapter or a checkpoint is called as a parent."""

import hashlib

import pytest
from crafted_models import LORA_KINDS, save_adapted, save_base

from lumi.config import UserError
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.model_parent import model_parent, model_parents
from lumi.formats.pretrained import load_pretrained
from lumi.host.provenance import Parent


def test_each_kind_by_its_content(tmp_path, tokenizer, start):
    base = save_base(tokenizer, tmp_path / "base")
    adapter = tmp_path / "adapter"
    save_adapted(base, LORA_KINDS[0], tokenizer, adapter)
    checkpoint = start(num_steps=1) / "checkpoints" / "step-00000001"
    hashes = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (adapter / "adapter_model.safetensors", checkpoint / "manifest.json")
    ]
    assert model_parent(base) == Parent("model", base, weights_fingerprint(base))
    assert model_parent(base, "known") == Parent("model", base, "known")
    assert model_parent(adapter) == Parent("adapter", adapter, hashes[0])
    assert model_parent(checkpoint) == Parent("checkpoint", checkpoint, hashes[1])
    loaded = load_pretrained(adapter, device="cpu", kernels="reference")
    assert model_parents(loaded) == [model_parent(adapter), model_parent(base)]
    with pytest.raises(UserError, match=r"must be a model folder with a config\.json"):
        model_parent(tmp_path / "nothing")
