"""Which files go to the hub, and what is refused."""

import shutil

import pytest
from crafted_models import save_adapted

from lumi.config import UserError
from lumi.formats.export import export_model
from lumi.formats.export_form import HuggingFaceFolder
from lumi.model.lora import LoraConfig
from lumi.provenance.pushed_files import Upload, choose_files, is_stale


def names(folder):
    return {upload.name for upload in choose_files(folder).uploads}


def written(folder):
    """What is there, without the record, which names folders of this machine."""
    return {path.name for path in folder.iterdir()} - {"provenance.json"}


def test_a_model_s_own_files_and_what_is_left_out(base_dir):
    own = written(base_dir)
    others = ["optimizer.pt", "pytorch_model.bin", "train.py", ".env", "model-00001-of-00009.safetensors"]
    for name in others:
        (base_dir / name).write_text("x")
    (base_dir / "checkpoints").mkdir()
    (base_dir / "LICENSE").write_text("mine")
    (base_dir / "README.md").write_text("# mine")
    assert names(base_dir) == own | {"LICENSE"}
    assert choose_files(base_dir).left_out == sorted([*others, "checkpoints/"])


def test_weights_in_several_files(base_dir, tmp_path):
    export_model(base_dir, tmp_path / "parts", form=HuggingFaceFolder(max_shard_bytes=50_000))
    assert names(tmp_path / "parts") == written(tmp_path / "parts")
    assert "model.safetensors.index.json" in names(tmp_path / "parts")


def test_an_adapter(base_dir, tokenizer, tmp_path):
    save_adapted(base_dir, LoraConfig(rank=2, alpha=4), tokenizer, tmp_path / "adapter")
    own = written(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"} <= own
    shutil.copy(base_dir / "model.safetensors", tmp_path / "adapter")
    assert names(tmp_path / "adapter") == own
    assert choose_files(tmp_path / "adapter").left_out == ["model.safetensors", "provenance.json"]


def test_a_checkpoint_is_refused(start):
    folder = start(num_steps=4) / "checkpoints" / "step-00000004"
    with pytest.raises(UserError, match="RUN must be a run or a model folder, got the checkpoint"):
        choose_files(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(name, base_dir, tmp_path):
    (base_dir / name).rename(tmp_path / name)
    (base_dir / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: must lie in the folder itself, got a link to {tmp_path}"):
        choose_files(base_dir)


def test_a_missing_file_of_weights(base_dir):
    (base_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: is missing"):
        choose_files(base_dir)


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("adapter_config.json", True),
        ("config.json", False),  # it is sent
        ("README.md", False),
        (".gitattributes", False),
        ("model-q4.gguf", False),
        ("onnx/model.safetensors", False),
    ],
)
def test_what_a_model_before_left(name, stale):
    assert is_stale(name, [Upload("config.json", b"")]) is stale


def test_sizes(base_dir):
    assert Upload("x", b"four").size == 4
    assert Upload("x", base_dir / "config.json").size == (base_dir / "config.json").stat().st_size
