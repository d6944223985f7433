"""The `Modelfile` of Ollama. Ollama itself is not here: its templates are compared with Jinja's."""

import re

import jinja2
import pytest
from hugging_face_tokenizers import make

from lumi.chat.templates import TEMPLATES
from lumi.formats.ollama import modelfile
from lumi.tokenizer.loading import load_tokenizer

CONVERSATION = [("system", "Be\nbrief."), ("user", "Where?"), ("assistant", "There."), ("user", " Why? ")]


def by_go(text, messages):
    """What Go makes of the few actions that the file has: a loop over messages, and a choice by role."""
    body, asks = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", text, re.DOTALL).groups()
    turns = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body.removesuffix("{{ end }}"))
    layouts = dict(zip(turns[1::2], turns[2::2], strict=True))
    assert turns[0] == ""
    return "".join(layouts[role].replace("{{ .Content }}", content) for role, content in messages) + asks


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template(tokenizer, name):
    template = TEMPLATES[name]
    written = modelfile("a.gguf", tokenizer.with_chat_template(template.jinja))
    found = re.search(r'TEMPLATE """(.*?)"""', written, re.DOTALL)[1]
    expected = jinja2.Template(template.jinja).render(
        bos_token="",
        eos_token="</s>",
        messages=[{"role": role, "content": content} for role, content in CONVERSATION],
        add_generation_prompt=True,
    )
    assert by_go(found, CONVERSATION) == expected
    assert ("SYSTEM " in written) == (template.default_system is not None)


def test_the_file(tokenizer):
    written = modelfile("a.gguf", tokenizer)
    assert written.startswith("FROM ./a.gguf\nTEMPLATE ")
    assert written.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n')
    assert modelfile("a.gguf", tokenizer.with_chat_template(None)) == 'FROM ./a.gguf\nPARAMETER stop "</s>"\n'


def test_a_template_of_others(tmp_path):
    written = modelfile("a.gguf", load_tokenizer(make(tmp_path, "smollm2")))
    assert "TEMPLATE" not in written
    assert "# Ollama finds the layout of conversations by the chat template in the file" in written
    assert written.endswith('PARAMETER stop "<|im_end|>"\n')
