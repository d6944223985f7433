import io
import sys

import pytest
import torch

import lumi.formats.pretrained
from lumi.cli import dispatch
from lumi.command_line import run


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_which_model_is_loaded(name, monkeypatch, capsys):
    seen = []

    def spy(path, **options):
        seen.append((str(path), options))
        raise KeyboardInterrupt

    monkeypatch.setattr(lumi.formats.pretrained, "load_pretrained", spy)
    for options in (
        [],
        ["--adapter-path", "A", "--tokenizer-path", "T", "--device", "cpu", "--dtype", "bfloat16"],
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
        assert run(dispatch, [name, "--model-path", "M", *options]) == 130
    plain = {"adapter_path": None, "tokenizer_path": None, "device": "auto", "dtype": torch.float32}
    full = {"adapter_path": "A", "tokenizer_path": "T", "device": "cpu", "dtype": torch.bfloat16}
    assert seen == [("M", plain), ("M", full)]
