"""transformers judges what harmless conversations become. Hostile templates and texts must get nowhere."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_2_tokenizers import train_model, write_config, write_json_twin
from transformers import AutoTokenizer

from lumi.chat import foreign_template
from lumi.chat.foreign_template import Content, ControlPiece
from lumi.chat.messages import Message, to_json
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.config import UserError
from lumi.tokenizer.loading import load_tokenizer

# In the manner of Zephyr: a header line, the text, EOS; line ends between the statements.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
# In the manner of Llama 2: the system message inside the first question, everything trimmed, order enforced.
LLAMA_2 = """
{%- if messages[0]['role'] == 'system' -%}
  {%- set system, rest = messages[0]['content'], messages[1:] -%}
{%- else -%}
  {%- set system, rest = none, messages -%}
{%- endif -%}
{%- for message in rest -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant!') -}}
  {%- endif -%}
  {%- if loop.index0 == 0 and system is not none -%}
    {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] -%}
  {%- else -%}
    {%- set content = message['content'] -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + content | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
# What newer templates make use of.
MODERN = """
{{- bos_token }}{% set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content }}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- message.role | upper }}{{ ns.count }}: {% generation %}{{ message.content }}{{ eos_token }}{%
    endgeneration %}
{%- endfor %}
{{- strftime_now('%%') }}{{ {"a": "<'é'>"} | tojson }}{{ tools is defined and tools }}
"""
SYSTEM, QUESTION, ANSWER = (
    Message("system", "Be brief.\n"),
    Message("user", "  What is é?\n\n    pass 😀 \n"),
    Message("assistant", "A letter. "),
)
CONVERSATIONS = [
    [QUESTION],
    [SYSTEM, QUESTION],
    [QUESTION, ANSWER, QUESTION],
    [SYSTEM, QUESTION, ANSWER, QUESTION],
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A tokenizer of the Llama 2 kind, which puts a space before a text."""
    folder = train_model(tmp_path_factory.mktemp("imported"))
    write_json_twin(folder)
    write_config(folder)
    return load_tokenizer(folder)


def parts(template, messages=None, **changes):
    variables = (("bos_token", "<s>"), ("eos_token", "</s>"))
    arguments = {
        "pieces": ("<s>", "</s>", "<|im_end|>"),
        "variables": variables,
        "add_generation_prompt": True,
    }
    return foreign_template.parts(template, messages or [Message("user", "hi")], **(arguments | changes))


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA_2], ids=["zephyr", "llama-2"])
@pytest.mark.parametrize("which", ["tokenizer", "imported"])
def test_transformers_makes_the_same_ids(request, tmp_path, template, which):
    tokenizer = request.getfixturevalue(which).with_chat_template(template)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(to_json(messages), add_generation_prompt=True)
        assert prompt_ids(tokenizer, messages) == expected["input_ids"]
    assert stop_ids(tokenizer) == {tokenizer.eos_id}


def test_what_newer_templates_use(tokenizer, tmp_path):
    tokenizer = tokenizer.with_chat_template(MODERN)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(to_json(messages), add_generation_prompt=True)
        assert prompt_ids(tokenizer, messages) == expected["input_ids"]


def test_zephyr_by_hand(tokenizer):
    e, tokenizer = tokenizer.encode, tokenizer.with_chat_template(ZEPHYR)
    expected = [*e("<|system|>\nBe brief.\n"), 2, *e("\n<|user|>\nHi?"), 2, *e("\n<|assistant|>\n")]
    assert prompt_ids(tokenizer, [SYSTEM, Message("user", "Hi?")]) == expected


TEXTS = st.lists(
    st.sampled_from(["<s>", "</s>", "<|im_end|>", "[INST]", " ", "\n", "▁", "<|", "im_end", "{{ 1 }}", "\0"])
    | st.text(max_size=4)
)


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA_2], ids=["zephyr", "llama-2"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS.map("".join))
def test_no_text_becomes_a_control_token(tokenizer, template, text):
    tokenizer = tokenizer.with_chat_template(template)
    hostile, calm = (
        prompt_ids(tokenizer, [Message("user", content), ANSWER, QUESTION]) for content in (text, "hello")
    )
    assert [token for token in hostile if token < 6] == [token for token in calm if token < 6]
    said = text.strip() if template == LLAMA_2 else text
    assert tokenizer.decode(hostile) == tokenizer.decode(calm).replace("hello", said, 1)


def test_white_space_goes_through_the_template():
    template = "{{ messages[0].content | trim }}|{{ messages[1].content }}|{{ messages[2].content.strip() }}"
    messages = [Message("user", " \n x "), Message("user", " x\n"), Message("user", " \n ")]
    assert parts(template, messages) == (Content(0), "| ", Content(1), "\n|", Content(2))


def test_a_control_piece_of_white_space_is_text():
    for piece in ("\n", "a\n", " "):
        assert parts("a{{ messages[0].content }}", [Message("user", "\n x")], pieces=(piece,)) == (
            "a\n ",
            Content(0),
        )


def test_longer_pieces_come_first():
    assert parts("<s><s>x{{ messages[0].content }}", pieces=("<s>", "<s>x", "")) == (
        ControlPiece("<s>"),
        ControlPiece("<s>x"),
        Content(0),
    )


def test_what_ends_an_answer_is_what_stands_behind_it(tokenizer):
    end = "{% if m.role == 'assistant' %}!{{ '<|im_end|>' }}{% endif %}"
    ends = "{% for m in messages %}<|im_start|>{{ m.content }}" + end + "<pad>{% endfor %}"
    assert stop_ids(tokenizer.with_chat_template(ends)) == {2, 5}
    endless = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert stop_ids(tokenizer.with_chat_template(endless)) == {2}


@pytest.mark.parametrize(
    ("template", "count"),
    [
        ("{{ messages[1].content }}", "message 1 (user) 0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "message 1 (user) 2 times"),
        ("{{ messages[0].content }}{{ messages[1].content | upper }}", "message 2 (assistant) 0 times"),
        ("{{ messages[0].content }}{{ messages[1].content[:5] }}", "message 2 (assistant) 0 times"),
        ("{{ messages[0].content }}{{ messages[1].content[:400] }}", "message 2 (assistant) 0 times"),
        ("{{ messages[0].content | lower }}{{ messages[1].content }}", "message 1 (user) 0 times"),
        ("{{ messages[0].content | e }}{{ messages[1].content }}", "message 1 (user) 0 times"),
        ("{{ messages[0].content | tojson }}{{ messages[1].content }}", "message 1 (user) 0 times"),
    ],
)
def test_templates_that_drop_repeat_or_change_a_message(template, count):
    with pytest.raises(UserError) as error:
        parts(template, [Message("user", "hi"), Message("assistant", "ho")])
    assert f"must show every message once and unchanged, got {count}; " in str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ self.__init__.__globals__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ (''|attr('__class__')).x }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__[0].x}'.format('') }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(content='x') }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10**6) }}", "OverflowError: Range too big"),
        ("{{ 'x' * 10**10 }}", "needs more than 1024 MiB"),
        ("{{ 'x' * 2**21 }}", "makes 2097152 characters of it"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many statically nested blocks"),
        ("{{ nothing.x }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'x' }}", "TypeError"),
        ("{% for %}", "is not valid Jinja, line 1: "),
        ("{{ raise_exception('not\n\nthis way') }}", "but says: not this way"),
    ],
)
def test_templates_that_break_out_or_fail(template, reason):
    with pytest.raises(UserError) as error:
        parts(template)
    assert reason in str(error.value)
    assert str(error.value).startswith("the model's chat template must accept the conversation, but ")
    assert "\n" not in str(error.value)


def test_a_template_that_does_not_end_is_stopped():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"must finish within 2 s and 1024 MiB, but did not"):
        parts(loops)


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(foreign_template, "WALL_SECONDS", 0.001)
    with pytest.raises(
        UserError, match=r"must finish within 0\.001 s, but did not; .*when the machine is less busy"
    ):
        parts("{{ messages[0].content }}{# patience #}")


def test_a_template_runs_once_for_conversations_of_the_same_form(tokenizer, monkeypatch):
    tokenizer = tokenizer.with_chat_template(ZEPHYR + "{# once #}")
    first = prompt_ids(tokenizer, [Message("user", "one")])
    monkeypatch.setattr(foreign_template, "_render", None)
    second = prompt_ids(tokenizer, [Message("user", "two")])
    assert (tokenizer.decode(first), tokenizer.decode(second)) == (
        "<|user|>\none\n<|assistant|>\n",
        "<|user|>\ntwo\n<|assistant|>\n",
    )
