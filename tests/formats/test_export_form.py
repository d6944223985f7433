"""What a folder for transformers holds; `test_export.py` reads it back."""

import torch
from crafted_models import save_base

from lumi.formats.export_form import HuggingFaceFolder
from lumi.formats.pretrained import load_pretrained


def test_a_folder(tokenizer, tmp_path):
    pretrained = load_pretrained(save_base(tokenizer, tmp_path / "base"), device="cpu", kernels="reference")
    form, model = HuggingFaceFolder("float16", max_shard_bytes=20_000), pretrained.model
    for name, weight in model.named_parameters():
        weight.data = form.round(model, name, weight.data)
        assert torch.equal(weight.data, weight.data.half().float())
    (tmp_path / "out").mkdir()
    written = form.save(tmp_path / "out", "out", pretrained, [])
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert (written.num_files, written.num_bytes) == (len(sizes), sum(sizes))
    assert written.num_files > 1
    assert form.num_bytes(model) == 2 * model.config.num_parameters < written.num_bytes
    reread = form.load(tmp_path / "out", model, pretrained.tokenizer)
    weights, others = model.state_dict(), reread.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert form.precision == "float16"
