"""What a model is asked, what is remembered, and the loop on a pipe. The terminal has a file of its own."""

import builtins
import io
import sys

import pytest
from crafted_models import speller, wanderer

import lumi.inference.dialogue
from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids
from lumi.config import UserError
from lumi.inference.dialogue import Dialogue, converse
from lumi.inference.generation import SamplingConfig, generate_ids

SHORT = SamplingConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that reach the model, as they come."""
    seen = []

    def spy(model, prompts, *arguments, **options):
        seen.extend(prompts)
        return generate_ids(model, prompts, *arguments, **options)

    monkeypatch.setattr(lumi.inference.dialogue, "generate_ids", spy)
    return seen


def ignore(_piece):
    pass


def roles(*texts, system=None):
    """user, assistant, user ..."""
    spoken = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [Message("system", system), *spoken] if system else spoken


def test_every_prompt_is_the_whole_conversation(tokenizer, prompts):
    dialogue = Dialogue(wanderer(tokenizer, padding=16), tokenizer, SHORT, system="Be brief.")
    pieces = []
    first = dialogue.answer("one <|im_end|>", pieces.append)
    second = dialogue.answer("two", ignore)
    assert first.text == "".join(pieces)
    assert first[1:] == (8, False, False, 0)
    assert len(pieces) > 1
    assert first.text.isalpha()
    assert prompts == [
        prompt_ids(tokenizer, roles("one <|im_end|>", system="Be brief.")),
        prompt_ids(tokenizer, roles("one <|im_end|>", first.text, "two", system="Be brief.")),
    ]
    fresh = Dialogue(dialogue.model, tokenizer, SHORT, system="Be brief.")
    assert second.text != fresh.answer("two", ignore).text
    dialogue.reset()
    dialogue.answer("three", ignore)
    assert prompts[-1] == prompt_ids(tokenizer, roles("three", system="Be brief."))


def test_an_answer_that_ends_by_itself_in_whole_characters(tokenizer):
    first, second = tokenizer.encode("é")
    model = speller(tokenizer, {None: first, first: second, second: tokenizer.control_id("<|im_end|>")})
    pieces = []
    assert Dialogue(model, tokenizer, SHORT).answer("?", pieces.append) == ("é", 2, True, False, 0)
    assert pieces == ["é"]
    broken = speller(tokenizer, {None: first, first: tokenizer.eos_id})
    assert Dialogue(broken, tokenizer, SHORT).answer("?", pieces.append) == ("\ufffd", 1, True, False, 0)
    assert pieces == ["é", "\ufffd"]


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(tokenizer, prompts):
    dialogue = Dialogue(wanderer(tokenizer), tokenizer, SamplingConfig(max_new_tokens=100, temperature=0.0))
    pieces = []

    def interrupt(piece):
        pieces.append(piece)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    answer = dialogue.answer("go", interrupt)
    assert answer == ("".join(pieces), 5, False, True, 0)
    assert not dialogue.answer("on", ignore).interrupted
    assert prompts[-1] == prompt_ids(tokenizer, roles("go", answer.text, "on"))


def test_nothing_is_remembered_of_an_answer_interrupted_before_it_began(tokenizer, monkeypatch):
    dialogue = Dialogue(wanderer(tokenizer), tokenizer, SHORT)

    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lumi.inference.dialogue, "generate_ids", interrupt)
    assert dialogue.answer("go", ignore) == ("", 0, False, True, 0)
    assert dialogue.exchanges == []


def test_the_oldest_turns_are_forgotten_whole(tokenizer, prompts):
    dialogue = Dialogue(wanderer(tokenizer, max_positions=200), tokenizer, SHORT, system="Be brief.")
    assert dialogue.max_prompt_tokens == 192
    said, forgotten = [], []
    for number in range(12):
        question = f"Question {number} " + "?" * (40 if number == 8 else 3)  # a long one pushes several out
        answer = dialogue.answer(question, ignore)
        forgotten.append(answer.num_forgotten)
        candidates = [
            prompt_ids(tokenizer, roles(*said[start:], question, system="Be brief."))
            for start in range(0, len(said) + 1, 2)
        ]
        assert prompts[-1] == next(ids for ids in candidates if len(ids) <= 192)
        said += [question, answer.text]
    assert forgotten[0] == 0
    assert max(forgotten) > 1
    assert len(dialogue.exchanges) == 12 - sum(forgotten)


def test_a_message_too_long_changes_nothing(tokenizer, prompts):
    dialogue = Dialogue(wanderer(tokenizer, max_positions=100), tokenizer, SHORT)
    first = dialogue.answer("one", ignore)
    with pytest.raises(
        UserError, match=r"must fit into 92 tokens \(the model's 100 positions, .* got \d+; shorten it"
    ):
        dialogue.answer("x" * 300, ignore)
    with pytest.raises(UserError, match="lone surrogate"):
        dialogue.answer("\udc80", ignore)
    dialogue.answer("two", ignore)
    assert prompts[-1] == prompt_ids(tokenizer, roles("one", first.text, "two"))
    with pytest.raises(UserError, match="the system message must leave room for a question within 92 tokens"):
        Dialogue(dialogue.model, tokenizer, SHORT, system="x" * 300)
    assert Dialogue(dialogue.model, tokenizer, SamplingConfig(max_new_tokens=5000)).max_prompt_tokens == 50


def test_another_system_message_begins_a_new_conversation(tokenizer, prompts):
    dialogue = Dialogue(wanderer(tokenizer), tokenizer, SHORT, system="Old.")
    dialogue.answer("one", ignore)
    dialogue.set_system("New.")
    dialogue.answer("two", ignore)
    assert prompts[-1] == prompt_ids(tokenizer, roles("two", system="New."))
    dialogue.set_system(None)
    dialogue.answer("three", ignore)
    assert prompts[-1] == prompt_ids(tokenizer, roles("three"))


NO_SYSTEM = """{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}\
{% for message in messages %}{{ message.content }}{% endfor %}"""


@pytest.mark.parametrize(
    ("system", "template", "message"),
    [
        ("x" * 900, None, "the system message must leave room for a question within 248 tokens"),
        ("ab\udc80", None, "text must be valid Unicode, got the lone surrogate U\\+DC80 at character 2"),
        (
            "Be brief.",
            NO_SYSTEM,
            "the model's chat template must accept the conversation, but says: no system here",
        ),
    ],
    ids=["too long", "no Unicode", "refused by the template"],
)
def test_a_refused_system_message_changes_nothing(system, template, message, tokenizer, prompts):
    if template is not None:
        tokenizer = tokenizer.with_chat_template(template)
    dialogue = Dialogue(wanderer(tokenizer), tokenizer, SHORT)
    first = dialogue.answer("one", ignore)
    with pytest.raises(UserError, match=message):
        dialogue.set_system(system)
    dialogue.answer("two", ignore)
    assert prompts[-1] == prompt_ids(tokenizer, roles("one", first.text, "two"))
    with pytest.raises(UserError, match=message):
        Dialogue(dialogue.model, tokenizer, SHORT, system=system)


def test_no_chat_template_no_dialogue(tokenizer):
    with pytest.raises(UserError, match="chat template"):
        Dialogue(wanderer(tokenizer), tokenizer.with_chat_template(""), SHORT)


def test_the_seed_decides_and_moves_on(tokenizer):
    def answers(seed):
        dialogue = Dialogue(
            wanderer(tokenizer), tokenizer, SamplingConfig(max_new_tokens=12, temperature=2.0, seed=seed)
        )
        for _ in range(2):
            dialogue.reset()
            yield dialogue.answer("go", ignore).text

    first, second = answers(1)
    assert (first, second) == tuple(answers(1))
    assert first != second
    assert [second] == list(answers(2))[:1]
    list(answers(2**63 - 1))


def pipe(monkeypatch, data, dialogue):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return converse(dialogue)


def test_every_token_is_shown_before_the_next_is_computed(tokenizer, monkeypatch):
    screen, shown = io.BytesIO(), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen))

    def spy(*arguments, on_token, **options):
        def look(row, token):
            on_token(row, token)
            shown.append(len(screen.getvalue()))

        return generate_ids(*arguments, on_token=look, **options)

    monkeypatch.setattr(lumi.inference.dialogue, "generate_ids", spy)
    pipe(monkeypatch, b"one\n", Dialogue(wanderer(tokenizer), tokenizer, SHORT))
    assert len(shown) == 8
    assert shown[0] > 0
    assert shown == sorted(set(shown))


def test_a_pipe_gets_answers_alone(tokenizer, monkeypatch, capsys):
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    dialogue = Dialogue(
        speller(tokenizer, {None: a, a: b, b: tokenizer.control_id("<|im_end|>")}), tokenizer, SHORT
    )
    assert pipe(monkeypatch, "one\n\nzwei é\r\nthree".encode(), dialogue) == 0
    assert capsys.readouterr() == ("ab\nab\nab\n", "")
    assert [exchange.user.content for exchange in dialogue.exchanges] == ["one", "zwei é", "three"]


def test_commands_and_remarks_on_a_pipe(tokenizer, monkeypatch, capsys):
    a = tokenizer.encode("a")[0]
    model = speller(tokenizer, {None: a, a: a}, max_positions=100)
    dialogue = Dialogue(model, tokenizer, SHORT, system="Old.")
    lines = ["one", "two", "/undo", "three " + "?" * 40, "/reset"]
    lines += ["/system New one.", "four", "/usr/bin is a path", "/exit", "five"]
    assert pipe(monkeypatch, "\n".join(lines).encode(), dialogue) == 0
    captured = capsys.readouterr()
    assert captured.out == "a" * 8 + ("\n" + "a" * 8) * 4 + "\n"
    assert captured.err.splitlines() == [
        "[cut after 8 tokens]",
        "[cut after 8 tokens]",
        "[turns that are left: 1]",
        "[cut after 8 tokens]",
        "[the conversation outgrew the model's 100 positions: the oldest turn was forgotten]",
        "[a new conversation]",
        "[a new conversation, with this system message]",
        "[cut after 8 tokens]",
        "[cut after 8 tokens]",
    ]
    assert [exchange.user.content for exchange in dialogue.exchanges] == ["four", "/usr/bin is a path"]
    assert dialogue.system == "New one."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"x" * 900, "error: a message must fit into 248 tokens"),
        (b"caf\xe9", "error: text must be valid Unicode, got the lone surrogate U+DCE9 at character 3"),
        (
            b"/system " + b"x" * 900,
            "error: the system message must leave room for a question within 248 tokens",
        ),
        (b"/rest", "error: a command must be /reset, /undo, /system TEXT, /help or /exit, got /rest"),
        (
            b"/reset now",
            "error: a command must be /reset, /undo, /system TEXT, /help or /exit, got /reset now",
        ),
    ],
    ids=["too long", "not UTF-8", "system message too long", "unknown command", "a command with too much"],
)
def test_a_refused_line_is_named_and_the_conversation_goes_on(line, message, tokenizer, monkeypatch, capsys):
    a = tokenizer.encode("a")[0]
    dialogue = Dialogue(
        speller(tokenizer, {None: a, a: tokenizer.control_id("<|im_end|>")}), tokenizer, SHORT
    )
    assert pipe(monkeypatch, b"one\n" + line + b"\ntwo\n", dialogue) == 2
    captured = capsys.readouterr()
    assert captured.out == "a\na\n"
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert len(dialogue.exchanges) == 2


def test_control_c_ends_a_program_in_a_pipe(tokenizer, monkeypatch):
    dialogue = Dialogue(wanderer(tokenizer), tokenizer, SHORT)

    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lumi.inference.dialogue, "generate_ids", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipe(monkeypatch, b"one\ntwo\n", dialogue)


class Keyboard(io.TextIOWrapper):
    """A stdin that takes itself for a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("keys", "hints"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt, "never read"], 1),
        ([KeyboardInterrupt, "/reset", KeyboardInterrupt, EOFError, "never read"], 2),
        ([KeyboardInterrupt, "  /exit ", "never read"], 1),
    ],
    ids=["twice in a row", "with a line between", "once"],
)
def test_control_c_at_the_prompt(keys, hints, tokenizer, monkeypatch, capsys):
    pressed = iter(keys)

    def press(_prompt):
        if isinstance(key := next(pressed), str):
            return key
        raise key

    monkeypatch.setattr(builtins, "input", press)
    monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO()))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert converse(Dialogue(wanderer(tokenizer), tokenizer, SHORT)) == 0
    assert capsys.readouterr().err.count("[Ctrl-C again leaves") == hints
    assert list(pressed) == ["never read"]
