"""Options of `lumi export`: sizes, and the forms that they give."""

import pytest

from lumi.config import UserError
from lumi.formats.export_form import HuggingFaceFolder
from lumi.formats.export_options import form_of, parse_size
from lumi.formats.gguf_export import GgufFolder

NONE = {"dtype": None, "max_shard_size": None, "quantize": None, "licence": None}


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("500MB", 5 * 10**8), ("100KiB", 102_400), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 TB", "-1GB", "0", "1e3", "2GB2"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size must be a size such as 2GB, 500MB or 1GiB, got "):
        parse_size(text)


def test_forms():
    folder = {"dtype": "bfloat16", "max_shard_size": "1KB"}
    assert form_of("hf", **NONE | folder) == HuggingFaceFolder("bfloat16", 1000)
    assert form_of("hf", **NONE) == HuggingFaceFolder("float32", None)
    assert form_of("gguf", **NONE | {"quantize": "q8_0", "licence": "mit"}) == GgufFolder("q8_0", "mit")
    assert form_of("gguf", **NONE) == GgufFolder("f32", None)
