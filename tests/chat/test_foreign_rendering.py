"""What is trained of a conversation in somebody else's chat template; transformers judges ids and masks."""

import pytest
from hugging_face_tokenizers import CHATML, RECIPES, make
from llama_2_tokenizers import train_model, write_config
from transformers import AutoTokenizer

from lumi.chat.foreign_rendering import ForeignTemplate
from lumi.chat.foreign_template import TemplateRefusal
from lumi.chat.messages import Message, to_json
from lumi.chat.rendering import prompt_ids, render_documents, template_of
from lumi.chat.templates import TEMPLATES
from lumi.tokenizer.loading import load_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Qwen3: only the last answer shows that nothing was thought.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('no system message') }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHAT = [
    Message("system", "Be brief."),
    Message("user", "What is é?\n"),
    Message("assistant", " A letter.\n\nNo more"),
    Message("user", "<|im_end|> 2"),
    Message("assistant", "two"),
    Message("user", "unanswered"),
]


@pytest.fixture(scope="module", params=RECIPES)
def folder(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


def in_template(folder, template):
    return load_tokenizer(folder).with_chat_template(template)


def documents(tokenizer, messages, max_tokens=None):
    return render_documents(tokenizer, template_of(tokenizer), messages, max_tokens)


def trained(tokenizer, document):
    """The trained runs, spelt."""
    names = {i: name for name, i in tokenizer.control_ids.items()}
    runs, before = [], False
    for token, on in zip(document.ids, document.mask, strict=True):
        if on and not before:
            runs.append("")
        if on:
            runs[-1] += names.get(token) or tokenizer.decode([token], continues=True)
        before = on
    return runs


@pytest.mark.parametrize("count", [3, 5, 6])
def test_marked_answers_are_those_of_transformers(folder, count):
    tokenizer, theirs = in_template(folder, MARKED), AutoTokenizer.from_pretrained(folder)
    # transformers reads the marker out of the user's words.
    messages = [
        message._replace(content=message.content.replace("<|im_end|>", "")) for message in CHAT[:count]
    ]
    expected = theirs.apply_chat_template(
        to_json(messages), chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    (document,) = documents(tokenizer, messages)
    size = len(document.ids)
    assert document.ids == expected["input_ids"][:size]
    assert list(map(int, document.mask)) == expected["assistant_masks"][:size]
    assert not any(expected["assistant_masks"][size:])
    assert document.num_messages == min(count, 5)


def test_answers_derived_from_renderings_are_the_marked_ones(folder):
    marked, derived = in_template(folder, MARKED), in_template(folder, CHATML)
    assert documents(derived, CHAT) == documents(marked, CHAT)
    (document,) = documents(derived, CHAT)
    assert trained(derived, document) == [" A letter.\n\nNo more<|im_end|>", "two<|im_end|>"]


def test_before_an_answer_stand_the_ids_of_the_prompt(folder):
    for template in (CHATML, MARKED, THINKING):
        tokenizer = in_template(folder, template)
        (document,) = documents(tokenizer, CHAT[:3])
        prompt = prompt_ids(tokenizer, CHAT[:2])
        assert document.ids[: len(prompt)] == prompt
        assert document.mask.index(True) == len(prompt)


def test_each_answer_is_trained_as_it_is_when_it_is_given(folder):
    tokenizer = in_template(folder, THINKING)
    first, second = documents(tokenizer, CHAT)
    think = "<think>\n\n</think>\n\n"
    assert trained(tokenizer, first) == [f"{think} A letter.\n\nNo more<|im_end|>"]
    assert trained(tokenizer, second) == [f"{think}two<|im_end|>"]
    assert (first.num_messages, second.num_messages) == (3, 5)
    assert think not in tokenizer.decode(second.ids[: second.mask.index(True)])


# In the manner of Qwen3 with thoughts: shown where nothing follows, left out of the history.
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set content, thought = m.content, m.reasoning_content if m.reasoning_content is defined else '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_is_trained_where_the_template_shows_it(folder):
    tokenizer, theirs = in_template(folder, QWEN_3), AutoTokenizer.from_pretrained(folder)
    apart = [
        CHAT[1],
        Message("assistant", "A letter.", "Hm.\n\nYes."),
        CHAT[1],
        Message("assistant", "So.", "2?"),
    ]
    inline = [CHAT[1], Message("assistant", "<think>\nHm.\n\nYes.\n</think>\n\nA letter."), *apart[2:]]
    for messages in (apart, inline):
        first, second = documents(tokenizer, messages)
        assert trained(tokenizer, first) == ["<think>\nHm.\n\nYes.\n</think>\n\nA letter.<|im_end|>"]
        assert trained(tokenizer, second) == ["<think>\n2?\n</think>\n\nSo.<|im_end|>"]
        for document, size in ((first, 2), (second, 4)):
            expected = theirs.apply_chat_template(to_json(messages[:size]), chat_template=QWEN_3)["input_ids"]
            assert document.ids == expected[: len(document.ids)]
        prompt = prompt_ids(tokenizer, messages[:3])
        expected = theirs.apply_chat_template(
            to_json(messages[:3]), chat_template=QWEN_3, add_generation_prompt=True
        )
        assert prompt == expected["input_ids"] == second.ids[: len(prompt)]


def test_reasoning_without_a_place_is_refused(folder):
    messages = [CHAT[1], Message("assistant", "A letter.", "Hm.")]
    for template in (CHATML, MARKED):
        with pytest.raises(
            TemplateRefusal, match="must have a place for reasoning_content, got none for that of message 2"
        ):
            documents(in_template(folder, template), messages)


def test_llama_2_by_hand(tmp_path):
    train_model(tmp_path)
    write_config(tmp_path)
    tokenizer = in_template(tmp_path, LLAMA_2)
    (document,) = documents(tokenizer, [Message("user", "hi"), Message("assistant", "a river")])
    assert document.ids == [1, *tokenizer.encode("[INST] hi [/INST] a river ", "control"), 2]
    assert trained(tokenizer, document) == [" a river </s>"]
    with pytest.raises(TemplateRefusal, match="but says: no system message"):
        documents(tokenizer, CHAT[:3])


def test_a_limit_keeps_whole_answers(folder):
    tokenizer = in_template(folder, CHATML)
    (whole,) = documents(tokenizer, CHAT)
    first = whole.mask.index(False, whole.mask.index(True))
    for limit in (first - 1, first, len(whole.ids) - 1, len(whole.ids)):
        found = documents(tokenizer, CHAT, limit)
        if limit < first:
            assert found == []
        elif limit < len(whole.ids):
            assert found == [(whole.ids[:first], whole.mask[:first], 3)]
        else:
            assert found == [whole]


def test_without_an_answer_there_is_nothing_to_train(folder):
    tokenizer = in_template(folder, CHATML)
    assert documents(tokenizer, CHAT[:2]) == []
    (empty,) = documents(tokenizer, [Message("user", ""), Message("assistant", "")])
    assert trained(tokenizer, empty) == ["<|im_end|>"]


def test_a_template_without_stable_beginnings_is_refused(folder):
    changing = "{{ messages | length }}" + CHATML
    with pytest.raises(TemplateRefusal) as error:
        documents(in_template(folder, changing), CHAT)
    assert "must render a conversation up to an answer as the beginning of the conversation with it" in str(
        error.value
    )
    assert "got another beginning for the answer of message 3; choose another --template" in str(error.value)


def test_names_of_templates(folder):
    tokenizer = load_tokenizer(folder)
    assert template_of(tokenizer) == ForeignTemplate(CHATML)
    assert ForeignTemplate(CHATML).name != ForeignTemplate(MARKED).name
    assert template_of(tokenizer.with_chat_template(TEMPLATES["chatml"].jinja)) is TEMPLATES["chatml"]


def test_our_chatml_without_a_bos_token(folder):
    tokenizer = in_template(folder, TEMPLATES["chatml"].jinja)
    (document,) = documents(tokenizer, CHAT[1:3])
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert document.ids[: len(begin) + 1] == [*begin, tokenizer.control_id("<|im_start|>")]
