"""The lines in a card; `test_push.py` runs them."""

from types import SimpleNamespace

import pytest

from lumi.host.hub_cache import HubModel
from lumi.provenance.usage import usage

PLAIN, TALKING = SimpleNamespace(chat_template=None), SimpleNamespace(chat_template="{{ messages }}")
TARGET, BASE = HubModel("me/x", None), HubModel("me/base", "0123")


@pytest.mark.parametrize(
    ("tokenizer", "command"),
    [
        (PLAIN, 'lumi generate --model-path me/x --prompt "The"'),
        (TALKING, "lumi chat --model-path me/x"),
        (None, 'lumi generate --model-path me/x --prompt "The"'),
    ],
)
def test_it_is_talked_to_where_there_is_a_chat_template(tokenizer, command):
    lines = usage(TARGET, tokenizer, None, True)
    assert command in lines
    assert ('messages = [{"role": "user", "content": "Who are you?"}]' in lines) is (tokenizer is TALKING)


def test_an_adapter_takes_its_base_at_the_commit():
    lines = usage(TARGET, None, BASE, False)
    assert 'tokenizer = AutoTokenizer.from_pretrained("me/base", revision="0123")' in lines
    assert 'base = AutoModelForCausalLM.from_pretrained("me/base", revision="0123")' in lines
    assert 'model = PeftModel.from_pretrained(base, "me/x")' in lines
    assert "With PEFT:" in lines


def test_a_branch_is_named_everywhere():
    lines = usage(HubModel("me/x", "next"), PLAIN, None, True)
    assert 'model = AutoModelForCausalLM.from_pretrained("me/x", revision="next")' in lines
    assert 'lumi generate --model-path me/x@next --prompt "The"' in lines
