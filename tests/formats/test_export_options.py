"""Options of `lumi export`, and the forms that they give."""

from lumi.formats.export_form import HuggingFaceFolder
from lumi.formats.export_options import form_of
from lumi.formats.gguf_export import GgufFolder

NONE = {"dtype": None, "max_shard_size": None, "quantize": None, "licence": None}


def test_forms():
    folder = {"dtype": "bfloat16", "max_shard_size": "1KB"}
    assert form_of("hf", **NONE | folder) == HuggingFaceFolder("bfloat16", 1000)
    assert form_of("hf", **NONE) == HuggingFaceFolder("float32", None)
    assert form_of("gguf", **NONE | {"quantize": "q8_0", "licence": "mit"}) == GgufFolder("q8_0", "mit")
    assert form_of("gguf", **NONE) == GgufFolder("f32", None)
