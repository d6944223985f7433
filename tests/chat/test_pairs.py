import json
from types import SimpleNamespace

import pytest
from hugging_face_tokenizers import CHATML, make

from lumi.chat.foreign_rendering import ForeignTemplate
from lumi.chat.messages import Message
from lumi.chat.pairs import Pair, pair_from_json, pair_to_json, render_pair, split_pair
from lumi.chat.rendering import prompt_ids, render
from lumi.chat.templates import TEMPLATES
from lumi.tokenizer.loading import load_tokenizer

ASK, ANSWER = Message("user", "What is it?"), Message("assistant", "A river.")
AGAIN, GOOD, BAD = Message("user", "Sure?"), Message("assistant", "Yes."), Message("assistant", "No, no, no.")
PAIR = Pair((ASK, ANSWER, AGAIN), (GOOD,), (BAD,))


def test_the_common_beginning_of_two_conversations_is_the_prompt():
    assert split_pair((ASK, ANSWER, AGAIN, GOOD), (ASK, ANSWER, AGAIN, BAD)) == PAIR
    assert split_pair((ASK, GOOD), (AGAIN, BAD)) == Pair((), (ASK, GOOD), (AGAIN, BAD))
    assert split_pair((ASK, GOOD), (ASK, GOOD, AGAIN, BAD)) == Pair((ASK, GOOD), (), (AGAIN, BAD))
    thought = GOOD._replace(reasoning="It is wet.")
    assert split_pair((ASK, GOOD), (ASK, thought)) == Pair((ASK,), (GOOD,), (thought,))
    assert PAIR.messages == (ASK, ANSWER, AGAIN, GOOD, BAD)


def test_it_survives_json():
    for pair in (PAIR, PAIR._replace(chosen=(GOOD._replace(reasoning="It is wet."),))):
        assert pair_from_json(json.loads(json.dumps(pair_to_json(pair)))) == pair


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_both_are_rendered_whole_and_the_answers_alone_are_trained(template, tokenizer):
    sides = render_pair(tokenizer, template, PAIR)
    given = prompt_ids(tokenizer.with_chat_template(template.jinja), PAIR.prompt)
    for side, answer in zip(sides, (GOOD, BAD), strict=True):
        whole = render(tokenizer, template, (*PAIR.prompt, answer))
        assert side.ids == whole.ids
        assert side.ids[: len(given)] == given
        assert side.mask == [False] * len(given) + [True] * (len(side.ids) - len(given))
        assert sum(whole.mask) > sum(side.mask)  # a conversation trains the prompt's answer too


def test_an_answer_of_several_messages():
    """What the user says within it is not trained."""
    pair = Pair((ASK,), (ANSWER, AGAIN, GOOD), (BAD,))
    chosen = (ASK, ANSWER, AGAIN, GOOD)

    letters = SimpleNamespace(
        bos_id=0,
        eos_id=1,
        control_ids={},
        encode=lambda text, follows="nothing": [ord(letter) for letter in text],
    )
    side = render_pair(letters, TEMPLATES["plain"], pair)[0]
    trained = "".join(chr(token) for token, flag in zip(side.ids, side.mask, strict=True) if flag)
    assert trained == f"{ANSWER.content}\x01{GOOD.content}\x01"
    assert side == render(letters, TEMPLATES["plain"], chosen)


def test_a_pair_stays_whole_or_goes_whole(tokenizer):
    chosen, rejected = render_pair(tokenizer, TEMPLATES["chatml"], PAIR)
    assert len(rejected.ids) > len(chosen.ids)
    longest = len(rejected.ids)
    assert render_pair(tokenizer, TEMPLATES["chatml"], PAIR, longest) == (chosen, rejected)
    assert render_pair(tokenizer, TEMPLATES["chatml"], PAIR, longest - 1) is None
    swapped = Pair(PAIR.prompt, PAIR.rejected, PAIR.chosen)
    assert render_pair(tokenizer, TEMPLATES["chatml"], swapped, longest - 1) is None


def test_pairs_in_a_template_of_others(tmp_path):
    """Marked or derived: the answers within the prompt are not trained."""
    marks = (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    )
    marked = CHATML.replace(
        "{{ m.content }}<|im_end|>", marks + "{{ m.content }}<|im_end|>{% endif %}{{ '' }}"
    )
    folder = make(tmp_path, "qwen")
    sides = {}
    for template in (CHATML, marked):
        tokenizer = load_tokenizer(folder).with_chat_template(template)
        sides[template] = render_pair(tokenizer, ForeignTemplate(template), PAIR)
        for side, answer in zip(sides[template], (GOOD, BAD), strict=True):
            trained = [token for token, flag in zip(side.ids, side.mask, strict=True) if flag]
            assert trained == [*tokenizer.encode(answer.content), tokenizer.control_ids["<|im_end|>"]]
            assert side.ids[: side.mask.index(True)] == prompt_ids(tokenizer, PAIR.prompt)
    assert sides[CHATML] == sides[marked]
    longest = max(len(side.ids) for side in sides[CHATML])
    assert render_pair(tokenizer, ForeignTemplate(CHATML), PAIR, longest - 1) is None
