"""Which tokenizer a folder or a file holds."""

import shutil

import pytest
from llama_2_tokenizers import train_model, write_config, write_json_twin
from transformers import AutoTokenizer

from lumi.config import UserError
from lumi.tokenizer.hugging_face import HuggingFaceTokenizer
from lumi.tokenizer.loading import has_tokenizer, load_tokenizer
from lumi.tokenizer.sentencepiece_bpe import SentencePieceTokenizer


def test_the_file_or_its_folder(folder, tmp_path):
    of_folder = load_tokenizer(folder)
    assert isinstance(of_folder, SentencePieceTokenizer)
    assert load_tokenizer(folder / "tokenizer.model").fingerprint == of_folder.fingerprint
    assert isinstance(load_tokenizer(folder / "tokenizer.json"), HuggingFaceTokenizer)
    assert has_tokenizer(folder)
    assert not has_tokenizer(tmp_path)


def test_a_model_of_others_and_its_json_are_one_tokenizer(tmp_path):
    train_model(tmp_path)
    write_config(tmp_path)
    of_model = load_tokenizer(tmp_path)
    write_json_twin(tmp_path)
    of_json = load_tokenizer(tmp_path)
    assert (
        of_model.fingerprint
        == of_json.fingerprint
        == load_tokenizer(tmp_path / "tokenizer.model").fingerprint
    )
    assert of_model.encode(" a river ") == of_json.encode(" a river ")


def test_our_tokenizer_stays_the_same_when_transformers_saves_it(folder, tmp_path):
    ours = load_tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert (again.begin_ids, again.control_ids) == (ours.begin_ids, ours.control_ids)
    assert again.chat_template == ours.chat_template
    for text in (" a  river\n", "<|im_end|>", "▁ é 12", ""):
        assert again.encode(text) == ours.encode(text)
        assert again.decode(again.encode(text)) == text


def test_files_that_are_no_tokenizer(folder, tmp_path):
    command = r"lumi tokenizer --config configs/tokenizer/32k\.json --corpus-dirs"
    with pytest.raises(
        UserError, match=rf"nowhere: must be a tokenizer folder .* no such file or folder.*{command}"
    ):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=rf"the folder holds no tokenizer.model and no tokenizer.json; .*{command}"
    ):
        load_tokenizer(tmp_path)
    model = (folder / "tokenizer.model").read_bytes()
    for damaged in (b"", b"hello", model[: len(model) // 2]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"tokenizer.model: must be .*{command}"):
            load_tokenizer(tmp_path)


def test_one_changed_byte_is_noticed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = bytearray((folder / "tokenizer.model").read_bytes())
    place = model.index("▁the".encode())
    model[place + 3] = ord("T")
    (tmp_path / "copy" / "tokenizer.model").write_bytes(model)
    with pytest.raises(UserError, match=r"SHA-256 must be [0-9a-f]{64} .*the file is corrupt"):
        load_tokenizer(tmp_path / "copy")
