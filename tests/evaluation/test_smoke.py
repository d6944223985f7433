"""Each check fails when it should, and prompts are asked as the model expects them."""

import json

import pytest

from lumi.chat import rendering
from lumi.config import UserError, from_dict
from lumi.evaluation import smoke
from lumi.evaluation.smoke import (
    SmokeConfig,
    SmokeMessage,
    SmokePrompt,
    SmokeTests,
    check,
    encode_smoke_tests,
    read_smoke_tests,
    repetition,
    run_smoke_tests,
)
from lumi.inference.generation import Completion, text_ids

PROMPT = SmokePrompt(prompt="What is it?", text="It is", any_of=("stone", "river bed"), all_of=("a",))
GOOD = {"not_empty": True, "not_repeating": True, "stops": True, "any_of": True, "all_of": True}


@pytest.mark.parametrize(
    ("answer", "stopped", "varied", "failed"),
    [
        ("A Stone.", True, True, set()),
        ("a river bed", True, True, set()),
        ("a stonemason in a riverbed", True, True, {"any_of"}),  # whole words
        ("the stone", True, True, {"all_of"}),
        (" \n", True, True, {"not_empty", "any_of", "all_of"}),
        ("a stone", False, True, {"stops"}),
        ("a stone", True, False, {"not_repeating"}),
    ],
)
def test_checks(answer, stopped, varied, failed):
    assert check(PROMPT, answer, stopped, varied) == GOOD | dict.fromkeys(failed, False)


def test_only_checks_that_apply():
    assert check(SmokePrompt(prompt="x"), "hello", None, True) == {"not_empty": True, "not_repeating": True}


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4], 2) == 0
    assert repetition([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21: two of four were there before
    assert repetition([7] * 9, 4) == pytest.approx(5 / 6)
    assert repetition([1, 1, 1], 4) == 0


def run(config, tests, model, tokenizer):
    return run_smoke_tests(
        config, encode_smoke_tests(config, tests, tokenizer, model.config.max_positions), model, tokenizer
    )


def scripted(monkeypatch, tokenizer, answers):
    """A model that says `answers`; returns what it is asked."""
    asked = []

    def generate_ids(model, prompts, config, **options):
        asked.append((prompts, config, options))
        return [Completion(tokenizer.encode(text), stopped) for text, stopped in answers]

    monkeypatch.setattr(smoke, "generate_ids", generate_ids)
    return asked


def test_a_chat_model_is_asked_through_its_template(opinionated_model, tokenizer, monkeypatch):
    turns = (
        SmokeMessage(role="user", content="A"),
        SmokeMessage(role="assistant", content="B"),
        SmokeMessage(role="user", content="C"),
    )
    tests = SmokeTests(
        categories={"one": (PROMPT,), "two": (SmokePrompt(messages=turns), SmokePrompt(prompt="D"))}
    )
    asked = scripted(monkeypatch, tokenizer, [("a stone", True), ("x " * 40, True), ("fine", False)])
    result = run(SmokeConfig(max_new_tokens=9), tests, opinionated_model, tokenizer)
    [(prompts, sampling, options)] = asked
    assert prompts == [
        rendering.prompt_ids(tokenizer, prompt.conversation)
        for category in tests.categories.values()
        for prompt in category
    ]
    assert options["stop_ids"] == rendering.stop_ids(tokenizer)
    assert (sampling.temperature, sampling.max_new_tokens) == (0, 9)
    assert (result.style, result.passed, result.prompts) == ("chat", 1, 3)
    assert result.categories == {"one": (1, 1), "two": (0, 2)}
    assert [answer.answer for answer in result.answers] == ["a stone", "x " * 40, "fine"]
    assert result.answers[0].checks == GOOD
    assert result.answers[1].checks == {"not_empty": True, "not_repeating": False, "stops": True}
    assert result.answers[1].repetition > 0.3
    assert result.answers[2].checks["stops"] is False
    lenient = SmokeConfig(max_repetition=1.0)
    scripted(monkeypatch, tokenizer, [("a stone", True), ("x " * 40, True), ("fine", True)])
    assert run(lenient, tests, opinionated_model, tokenizer).passed == 3


def test_a_base_model_goes_on_with_a_text(opinionated_model, tokenizer, monkeypatch):
    tests = SmokeTests(categories={"one": (PROMPT, SmokePrompt(prompt="Why?"))})
    asked = scripted(monkeypatch, tokenizer, [(" a stone", False), (" So", False)])
    result = run(SmokeConfig(style="text"), tests, opinionated_model, tokenizer)
    [(prompts, _, options)] = asked
    assert prompts == [text_ids(tokenizer, "It is"), text_ids(tokenizer, "Why?\n")]
    assert options["stop_ids"] == {tokenizer.eos_id}
    assert result.passed == 2
    assert "stops" not in result.answers[0].checks
    without = tokenizer.with_chat_template("")
    scripted(monkeypatch, tokenizer, [(" a stone", False), (" So", False)])
    assert run(SmokeConfig(), tests, opinionated_model, without).style == "text"


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        (
            SmokePrompt(prompt="x" * 300),
            None,
            "a prompt must be shorter than the model's 96 positions, got 3",
        ),
        (
            SmokePrompt(prompt="b\ud800"),
            None,
            "message 1: text must be valid Unicode, got the lone surrogate U+D800 at character 1",
        ),
        (SmokePrompt(prompt="x"), "", "the tokenizer must have a chat template, got none"),
        (
            SmokePrompt(prompt="x"),
            "{{ raise_exception('no') }}",
            "the model's chat template must accept the conversation, but says: no",
        ),
    ],
    ids=["too long", "no Unicode", "no template", "refused"],
)
def test_a_prompt_that_cannot_be_asked_is_named_before_any_is(prompt, template, message, tokenizer):
    other = SmokePrompt(prompt="A") if template is None else prompt
    tests = SmokeTests(categories={"one": (other,), "two": (other, prompt)})
    if template is not None:
        tokenizer = tokenizer.with_chat_template(template)
    with pytest.raises(UserError) as error:
        encode_smoke_tests(SmokeConfig(style="chat"), tests, tokenizer, 96)
    place = "two, prompt 2" if template is None else "one, prompt 1"
    assert str(error.value).startswith(f"smoke tests: {place}: {message}")


def test_the_shipped_ones_run(opinionated_model, tokenizer):
    tests = read_smoke_tests(SmokeConfig())
    assert len(tests.categories) == 5
    assert sum(map(len, tests.categories.values())) == 20
    result = run(SmokeConfig(max_new_tokens=4, style="text"), tests, opinionated_model, tokenizer)
    assert result.prompts == 20
    assert result == run(SmokeConfig(max_new_tokens=4, style="text"), tests, opinionated_model, tokenizer)


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"categories": {"c": [{"prompt": "Why?"}]}}))
    assert read_smoke_tests(SmokeConfig(path=str(tmp_path / "mine.json"))).categories == {
        "c": (SmokePrompt(prompt="Why?"),)
    }
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_smoke_tests(SmokeConfig(path=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (SmokeConfig, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (SmokeConfig, {"repetition_tokens": 0}, "repetition_tokens must be at least 1, got 0"),
        (SmokeConfig, {"max_repetition": 2}, "max_repetition must be between 0 and 1, got 2.0"),
        (SmokeConfig, {"style": "poem"}, 'style must be one of "auto", "chat", "text", got "poem"'),
        (SmokePrompt, {}, "one of prompt and messages must be given, got both or neither"),
        (
            SmokePrompt,
            {"messages": [{"role": "assistant", "content": "x"}]},
            "messages must end with the user's, got assistant",
        ),
        (
            SmokePrompt,
            {"prompt": "x", "any_of": [""]},
            'text and the words of any_of and all_of must not be empty, got ""',
        ),
        (
            SmokeTests,
            {"categories": {"a": []}},
            "categories must hold at least one, each with at least one prompt",
        ),
    ],
)
def test_bad_configs(cls, data, message):
    with pytest.raises(UserError) as error:
        from_dict(cls, data, "c")
    assert str(error.value) == f"c: {message}"
