"""Hand-written layouts, hypothesis, jinja2 and transformers judge how conversations are rendered."""

import copy

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumi.chat.messages import Message, to_json
from lumi.chat.rendering import check_controls, prompt_ids, render, stop_ids, template_of
from lumi.chat.templates import TEMPLATES, Control, Template, TurnLayout
from lumi.config import UserError

BOS, EOS, IM_START, IM_END = 1, 2, 4, 5
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
MARKERS = """
    <s> </s> <unk> <pad> <|im_start|> <|im_end|> <|im_start|>assistant <0x0A>
    [INST] [/INST] <<SYS>> {{bos_token}} {%endfor%}
""".split()
HEADERS = [
    "### Instruction:\n",
    "\n\n### Response:\n",
    "User:\n",
    "Assistant:\n",
    "<|im_end|>\n<|im_start|>system\n",
]
CHARACTERS = [
    "'",
    "\\",
    "▁",
    "▁▁",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " ",
    "  ",
    "\0",
    "é",
    "e\u0301",
    "😀",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\u00a0",
]

TEXTS = st.lists(st.sampled_from(MARKERS + HEADERS + CHARACTERS) | st.text(max_size=6), max_size=4).map(
    "".join
)
NAMES = sorted(TEMPLATES)


@st.composite
def conversations(draw):
    """Perhaps a system message, one to three exchanges, perhaps a question that waits for its answer."""
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXTS)), Message("assistant", draw(TEXTS))]
    return tuple(messages + ([Message("user", draw(TEXTS))] if draw(st.booleans()) else []))


examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Answer(str):
    """Text that is trained, as is the control token behind it."""


def layout(name, messages):
    """The conversation as it should be: control ids and texts."""
    if name == "chatml":
        header = lambda role: [IM_START, f"{role}\n"]
        items = [item for m in messages for item in (*header(m.role), said(m), IM_END, "\n")]
        return [BOS, *items], header("assistant")
    names = {"alpaca": ("### Instruction:\n", "### Response:\n"), "plain": ("User:\n", "Assistant:\n")}[name]
    before = {"system": "", "user": names[0], "assistant": names[1]}
    items = [PREAMBLE, "\n\n"] if name == "alpaca" and messages[0].role != "system" else []
    for m in messages:
        items += [before[m.role], said(m), *([EOS] if m.role == "assistant" else []), "\n\n"]
    return [BOS, *items], [names[1]]


def said(message):
    return Answer(message.content) if message.role == "assistant" else message.content


def encoded(tokenizer, items):
    """Ids and mask of a layout: texts that stand together are encoded as one, an answer by itself."""
    ids, mask, waiting = [], [], ""
    for item, before in zip([*items, Answer()], [None, *items], strict=True):
        if type(item) is str:
            waiting += item
            continue
        text, waiting = tokenizer.encode(waiting), ""
        own = [item] if isinstance(item, int) else tokenizer.encode(item)
        ids += text + own
        mask += [False] * len(text) + [isinstance(item, Answer) or isinstance(before, Answer)] * len(own)
    return ids, mask


def until_last_answer(items):
    last = max(index for index, item in enumerate(items) if isinstance(item, Answer))
    return items[: last + 2]


def spelt(tokenizer, ids):
    """The text with control tokens by name; contents come out as they went in."""
    names = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
    text, run = "", []
    for token in [*ids, None]:
        if token is None or token in names:
            text, run = text + tokenizer.decode(run) + names.get(token, ""), []
        else:
            run.append(token)
    return text


def trained_runs(rendered):
    runs, previous = [], False
    for token, trained in zip(rendered.ids, rendered.mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return runs


@pytest.mark.parametrize("name", NAMES)
@examples
@given(messages=conversations())
def test_ids_and_mask_are_the_layout(tokenizer, name, messages):
    items, header = layout(name, messages)
    rendered = render(tokenizer, TEMPLATES[name], messages)
    assert (rendered.ids, rendered.mask) == encoded(tokenizer, until_last_answer(items))
    assert rendered.num_messages == max(i for i, m in enumerate(messages, start=1) if m.role == "assistant")
    asking = tokenizer.with_chat_template(TEMPLATES[name].jinja)
    assert prompt_ids(asking, messages) == encoded(tokenizer, items + header)[0]


@pytest.mark.parametrize("name", NAMES)
@examples
@given(messages=conversations())
def test_what_is_trained_is_the_answers_and_their_ends(tokenizer, name, messages):
    end = IM_END if name == "chatml" else EOS
    runs = trained_runs(render(tokenizer, TEMPLATES[name], messages))
    answers = [m.content for m in messages if m.role == "assistant"]
    assert [tokenizer.decode(run[:-1]) for run in runs] == answers
    assert [run[:-1] for run in runs] == [
        tokenizer.encode(answer) for answer in answers
    ]  # as they are generated
    assert all(run[-1] == end and not set(run[:-1]) & set(range(6)) for run in runs)


@pytest.mark.parametrize("name", NAMES)
@examples
@given(messages=conversations())
def test_no_text_becomes_a_control_token_or_moves_the_mask(tokenizer, name, messages):
    harmless = [m if m.role == "assistant" else m._replace(content="hello") for m in messages]
    hostile, calm = (render(tokenizer, TEMPLATES[name], some) for some in (messages, harmless))
    assert trained_runs(hostile) == trained_runs(calm)
    controls = [
        [(token, trained) for token, trained in zip(r.ids, r.mask, strict=True) if token < 6]
        for r in (hostile, calm)
    ]
    assert controls[0] == controls[1]


@pytest.mark.parametrize("name", NAMES)
@settings(examples, max_examples=15)
@given(messages=conversations())
def test_truncation_keeps_whole_turns_from_the_start(tokenizer, name, messages):
    whole = render(tokenizer, TEMPLATES[name], messages)
    ends = [i + 1 for i, token in enumerate(whole.ids) if whole.mask[i] and token in (EOS, IM_END)]
    answers = [i for i, m in enumerate(messages, start=1) if m.role == "assistant"]
    for limit in range(1, len(whole.ids) + 2):
        cut = render(tokenizer, TEMPLATES[name], messages, max_tokens=limit)
        fitting = [(end, number) for end, number in zip(ends, answers, strict=True) if end <= limit]
        if not fitting:
            assert cut is None
        else:
            size, number = fitting[-1]
            assert cut == (whole.ids[:size], whole.mask[:size], number)


@pytest.mark.parametrize("name", NAMES)
@settings(examples, max_examples=15)
@given(messages=conversations())
def test_a_prompt_is_what_stands_before_the_answer_in_training(tokenizer, name, messages):
    tokenizer = tokenizer.with_chat_template(TEMPLATES[name].jinja)
    whole = render(tokenizer, TEMPLATES[name], messages)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            prompt = prompt_ids(tokenizer, messages[:index])
            answer = tokenizer.encode(message.content)
            assert whole.ids[: len(prompt) + len(answer)] == prompt + answer
            assert whole.mask[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_three_conversations_by_hand(tokenizer):
    e = tokenizer.encode
    ask = (Message("user", "Hi?"), Message("assistant", "Yes."))
    chatml = [
        BOS,
        IM_START,
        *e("user\nHi?"),
        IM_END,
        *e("\n"),
        IM_START,
        *e("assistant\n"),
        *e("Yes."),
        IM_END,
    ]
    alpaca = [BOS, *e(f"{PREAMBLE}\n\n### Instruction:\nHi?\n\n### Response:\n"), *e("Yes."), EOS]
    plain = [BOS, *e("Be brief.\n\nUser:\nHi?\n\nAssistant:\n"), *e("Yes."), EOS]
    answer = len(e("Yes.")) + 1
    for name, ids, messages in (
        ("chatml", chatml, ask),
        ("alpaca", alpaca, ask),
        ("plain", plain, (Message("system", "Be brief."), *ask)),
    ):
        assert render(tokenizer, TEMPLATES[name], messages) == (
            ids,
            [False] * (len(ids) - answer) + [True] * answer,
            len(messages),
        )


def test_what_stands_behind_an_answer_is_left_out(tokenizer):
    turns = {"user": TurnLayout((), ()), "assistant": TurnLayout((), (Control.EOS, "\n", Control.IM_END))}
    rendered = render(
        tokenizer, Template(name="x", turns=turns), [Message("user", "q"), Message("assistant", "a")] * 2
    )
    e = tokenizer.encode
    expected = [BOS, *e("q"), *e("a"), EOS, *e("\n"), IM_END, *e("q"), *e("a"), EOS]
    assert rendered.ids == expected
    trained = [index for index, trained in enumerate(rendered.mask) if trained]
    assert [expected[index] for index in trained] == [*e("a"), EOS] * 2


def test_nothing_to_train_on_is_none(tokenizer):
    for name in NAMES:
        assert render(tokenizer, TEMPLATES[name], ()) is None
        assert render(tokenizer, TEMPLATES[name], [Message("system", "x"), Message("user", "y")]) is None
        empty = render(tokenizer, TEMPLATES[name], [Message("user", ""), Message("assistant", "")])
        assert sum(empty.mask) == 1  # to end at once can be learnt


def test_a_lone_surrogate_is_named(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
        render(tokenizer, TEMPLATES["plain"], [Message("user", "q"), Message("assistant", "a\ud800")])


# The Jinja text beside a model


def jinja(template, messages, **variables):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.jinja).render(
        messages=to_json(messages), bos_token="<s>", eos_token="</s>", **variables
    )


@pytest.mark.parametrize("name", NAMES)
@examples
@given(messages=conversations())
def test_jinja2_makes_the_same_text(tokenizer, name, messages):
    template = TEMPLATES[name]
    asking = tokenizer.with_chat_template(template.jinja)
    assert jinja(template, messages, add_generation_prompt=True) == spelt(
        tokenizer, prompt_ids(asking, messages)
    )
    training = spelt(tokenizer, render(tokenizer, template, messages).ids)
    assert jinja(template, messages, add_generation_prompt=False).startswith(training)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_makes_the_same_ids(tokenizer, tmp_path, name):
    from transformers import AutoTokenizer

    tokenizer = tokenizer.with_chat_template(TEMPLATES[name].jinja)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    system, question = (
        Message("system", "You are brief.\n"),
        Message("user", "  What is é?\n\n def f():\n    pass 😀"),
    )
    for messages in ([question], [system, question]):
        assert theirs.apply_chat_template(to_json(messages), add_generation_prompt=True)[
            "input_ids"
        ] == prompt_ids(tokenizer, messages)
    answer = Message("assistant", "A letter.\n")
    long = [
        system,
        question,
        answer,
        question,
    ]  # before an answer they encode header and answer as one, which is another way of the same
    for messages in (long, long[1:]):
        text = theirs.apply_chat_template(to_json(messages), add_generation_prompt=True, tokenize=False)
        assert text == spelt(tokenizer, prompt_ids(tokenizer, messages))


# Which template, which tokens


def test_which_template_a_tokenizer_has(tokenizer):
    assert template_of(tokenizer) is TEMPLATES["chatml"]
    for name, template in TEMPLATES.items():
        assert template_of(tokenizer.with_chat_template(template.jinja)).name == name
    assert template_of(tokenizer.with_chat_template("{{ messages }}")) is None


def test_what_ends_an_answer(tokenizer):
    assert stop_ids(tokenizer) == {EOS, IM_END}
    assert stop_ids(tokenizer.with_chat_template(TEMPLATES["alpaca"].jinja)) == {EOS}
    assert stop_ids(tokenizer.with_chat_template(None)) == {EOS}


def test_a_base_model_cannot_be_asked(tokenizer):
    message = "must have a chat template, got none: the model was not made for conversations; continue a"
    with pytest.raises(UserError, match=message):
        prompt_ids(tokenizer.with_chat_template(None), [Message("user", "hi")])


def test_a_template_whose_tokens_are_missing_is_refused(tokenizer):
    poor = copy.copy(tokenizer)
    poor.im_start_id = poor.im_end_id = None
    for use in (
        lambda: render(poor, TEMPLATES["chatml"], []),
        lambda: prompt_ids(poor, []),
        lambda: stop_ids(poor),
    ):
        with pytest.raises(
            UserError, match=r"got chatml, which needs IM_END and IM_START; use alpaca or plain"
        ):
            use()
    assert check_controls(poor, TEMPLATES["plain"]) == {Control.BOS: BOS, Control.EOS: EOS}


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_without_a_place_is_refused_by_name(tokenizer, name):
    messages = (Message("user", "q"), Message("assistant", "a", "thought"), Message("user", "r"))
    message = rf"reasoning_content must be left out of messages, got some, and .*{name} has no place for it"
    with pytest.raises(UserError, match=message):
        render(tokenizer, TEMPLATES[name], messages)
    spoken = copy.copy(tokenizer)
    spoken.chat_template = TEMPLATES[name].jinja
    with pytest.raises(UserError, match=message):
        prompt_ids(spoken, messages)
