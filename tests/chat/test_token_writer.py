"""Which tokens of a text are trained, when a part of the text is."""

from lumi.chat.token_writer import TokenWriter


def trained_text(tokenizer, pieces):
    writer = TokenWriter(tokenizer)
    for text, trained in pieces:
        writer.text(text, trained=trained)
    writer.flush()
    assert writer.ids == tokenizer.encode("".join(text for text, _ in pieces))
    return "".join(tokenizer.decode([i]) for i, on in zip(writer.ids, writer.mask, strict=True) if on)


def test_a_token_is_trained_if_a_part_of_it_is(tokenizer):
    the = tokenizer.encode(" the")
    assert len(the) == 1
    assert trained_text(tokenizer, [(" t", False), ("he x", True)]) == " the x"
    assert trained_text(tokenizer, [("x th", True), ("e y", False)]) == "x the"
    assert trained_text(tokenizer, [("x", False), (" the", True), (" y", False)]) == " the"
    assert trained_text(tokenizer, [("x", False), ("", True), (" the", False)]) == ""


def test_characters_of_several_tokens(tokenizer):
    assert len(tokenizer.encode("🎉")) == 4
    writer = TokenWriter(tokenizer)
    writer.text("é🎉")
    writer.text("🎉", trained=True)
    writer.flush()
    assert writer.mask == [False] * (len(writer.ids) - 4) + [True] * 4


def test_answers_and_control_tokens(tokenizer):
    writer = TokenWriter(tokenizer)
    writer.control(1)
    writer.text("a")
    writer.text("b")
    writer.answer("the end")
    writer.control(2, trained=True)
    answer = tokenizer.encode("the end")
    assert writer.ids == [1, *tokenizer.encode("ab"), *answer, 2]
    assert writer.mask == [False] * (len(writer.ids) - len(answer) - 1) + [True] * (len(answer) + 1)
