"""The Jinja text of a template, judged by jinja2."""

import jinja2
import pytest

from lumi.chat.messages import Message, to_json
from lumi.chat.templates import TEMPLATES, Control, Template, TurnLayout


def test_a_role_that_the_template_does_not_know():
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message):
        raise RuntimeError(message)

    for template in TEMPLATES.values():
        with pytest.raises(RuntimeError, match="role must be one of system, user, assistant, got tool"):
            environment.from_string(template.jinja).render(
                messages=[{"role": "tool", "content": ""}], raise_exception=raise_exception
            )


def test_quotes_and_backslashes_survive_jinja():
    awkward = "a'b\\n'' + ' \\' + \\\n{{ x }}{% y %}"
    turns = {
        role: TurnLayout((awkward, awkward), (Control.EOS, awkward))
        for role in ("system", "user", "assistant")
    }
    template = Template(name="awkward", turns=turns, default_system=awkward)
    once = f"{awkward}{awkward}x</s>{awkward}"
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(template.jinja).render(
        messages=to_json([Message("user", "x")]),
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )
    assert text == "<s>" + once.replace("x</s>", f"{awkward}</s>") + once + awkward * 2


def test_a_template_must_have_an_end():
    with pytest.raises(ValueError, match="must begin with a control token, got"):
        Template(name="x", turns={"assistant": TurnLayout((), ("\n",))})
