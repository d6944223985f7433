import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import Entry, PythonQuestionsSource, python_questions
from lumi.corpus.documents import text_of
from lumi.corpus.python_questions import ask, is_held_out, summarize
from lumi.corpus.reading import open_source
from lumi.corpus.sources import identify


def entry(
    kind="function", name="pkg.thing", signature="(a, b=1)", docstring="Do a thing to the other.", owner="pkg"
):
    return Entry(kind=kind, qualified_name=name, signature=signature, docstring=docstring, owner=owner)


def phrasings(**fields):
    """The questions about things with many names, and an answer to each, without the names."""
    pairs = [(ask(entry(name=f"pkg.n{number}", **fields), 300), f"pkg.n{number}") for number in range(60)]
    return {pair[0].content.replace(name, "X"): pair[1].content.replace(name, "X") for pair, name in pairs}


def test_phrasings_and_their_answers():
    answer = "Do a thing to the other."
    assert phrasings() == {
        "What does `X` do?": answer,
        "What is `X` for?": answer,
        "Explain `X`.": answer,
        "How do I call `X`?": f"`X(a, b=1)`. {answer}",
    }
    assert phrasings(kind="method", signature="(self, /, a)")["How do I call `X`?"] == f"`X(a)`. {answer}"
    assert phrasings(kind="method", signature="(self)")["How do I call `X`?"] == f"`X()`. {answer}"
    assert phrasings(kind="class") == {"What is `X`?": answer, "What is the class `X` for?": answer}
    assert phrasings(kind="module", signature="") == {
        "What is the module `X` for?": answer,
        "What does the module `X` do?": answer,
    }
    for signature in ("", "(*args, **kwargs)", "(a=<object>)", f"({'long' * 30})"):
        assert "How do I call `X`?" not in phrasings(signature=signature)
    assert set(phrasings(signature="")) == {"What is `X`?", "Explain `X`."}


def test_an_answer_with_its_signature_keeps_to_the_limit():
    docstring = "Do it once. Do it a second time."
    pairs = [ask(entry(name=f"pkg.n{number}", docstring=docstring), 40) for number in range(60)]
    answers = {pair[1].content.partition("`. ")[2] for pair in pairs if "How do I call" in pair[0].content}
    assert answers == {"Do it once."}
    assert {pair[1].content for pair in pairs if "How do I call" not in pair[0].content} == {docstring}


def test_names_as_they_are_written():
    for name, written in {
        "builtins.str.join": "`str.join`",
        "posix.stat": "`os.stat`",
        "posixpath.join": "`os.path.join`",
    }.items():
        assert written in ask(entry(name=name), 300)[0].content


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Remove the\nspace  around it.\n\nMore.", "Remove the space around it."),
        ("find(a, b=(1, 2)) -> int\n\nReturn the place.", "Return the place."),
        ("D.items() -> a set-like view of D", "A set-like view of D."),
        ("sum(x) -- Return the sum (of x).", "Return the sum (of x)."),
        ("getrandbits(k) -> x.  Generates an int with bits.", "Generates an int with bits."),
        (
            "mktime(tuple) -> floating point number\n\nConvert a tuple to seconds.",
            "Convert a tuple to seconds.",
        ),
        (
            "Call ``f`` or :func:`~os.stat` or `x' with *y*, 2*3*4.",
            "Call `f` or `os.stat` or `x` with `y`, 2*3*4.",
        ),
        ("Compute it, e.g. For a list. Then stop here.", "Compute it, e.g. For a list. Then stop here."),
        ("Return a list of things\n- one\n- two", "Return a list of things."),
        ("Return a thing.  For example:\n\n    >>> f()", "Return a thing."),
        ("Do a thing to it.\n:param it: the thing", "Do a thing to it."),
        ("Bisection algorithms.", "Bisection algorithms."),
        ("Constructor.", ""),
        ("hardware identifier", ""),
        ("a // b", ""),
        (">>> f()\n3", ""),
        ("The answer to it:\n\n    code", ""),
        ("NamedExpr(expr target, expr value)", ""),
    ],
)
def test_summaries(docstring, summary):
    assert summarize(docstring, 100) == summary


def test_a_summary_ends_with_the_last_sentence_that_fits():
    docstring = "The first of them. The second one. The third."
    assert summarize(docstring, 45) == docstring
    assert summarize(docstring, 44) == "The first of them. The second one."
    assert summarize(docstring, 18) == "The first of them."
    assert summarize(docstring, 17) == ""


def test_the_share_of_modules_that_is_held_out():
    names = [f"module{number}" for number in range(2000)]
    held_out = {name for name in names if is_held_out(name, 0.1)}
    assert 140 < len(held_out) < 260  # 200 expected, 13.4 standard deviation
    assert held_out < {name for name in names if is_held_out(name, 0.2)}


@pytest.fixture(scope="module")
def sides():
    """Of each side the records and the facts; the entries, which all sides share, are collected once."""
    header, entries = python_questions.open_entries(("stdlib",))
    entries = list(entries)
    sources = {
        side: PythonQuestionsSource(name="x", modules=side, held_out_fraction=0.3)
        for side in ("all", "train", "held_out")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_questions, "open_entries", lambda packages: (header, iter(entries)))
        opened = {side: open_source(source, 1000) for side, source in sources.items()}
    return {side: (list(found.records), found.facts) for side, found in opened.items()}


def test_train_and_held_out_share_no_module_and_are_all(sides):
    texts = {
        side: {text_of(record.document) for record in records if record.document}
        for side, (records, _) in sides.items()
    }
    assert not texts["train"] & texts["held_out"]
    missing = texts["all"] - texts["train"] - texts["held_out"]
    assert texts["train"] | texts["held_out"] < texts["all"]
    assert len(missing) == sum(record.reason == "answer_in_train" for record in sides["held_out"][0])
    assert len(texts["all"]) > 4000
    assert (
        len(sides["all"][0])
        == len(sides["train"][0]) + len(sides["held_out"][0])
        == sides["all"][1]["entries"]
    )
    # The functions, classes and methods of a module are where it is.
    for side in ("train", "held_out"):
        expected = is_held_out("textwrap", 0.3) == (side == "held_out")
        names = (
            "`textwrap.dedent`",
            "`textwrap.TextWrapper`",
            "`textwrap.TextWrapper.fill`",
            "module `textwrap`",
        )
        assert all(any(name in text for text in texts[side]) == expected for name in names)


def test_no_answer_that_is_held_out_stands_in_a_module_of_the_other_side(sides):
    train, held_out = (
        [record.document[1].content for record in sides[side][0] if record.document]
        for side in ("train", "held_out")
    )
    assert len(held_out) > 1000
    assert not set(held_out) & set(train)
    # Nor as what follows a signature.
    assert not {answer.rpartition("`. ")[2] for answer in held_out} & {
        answer.rpartition("`. ")[2] for answer in train
    }
    assert {record.reason for record in sides["train"][0]} == {"", "no_summary"}
    assert {record.reason for record in sides["held_out"][0]} == {"", "no_summary", "answer_in_train"}


def test_what_gives_no_answer_is_counted(sides):
    records, facts = sides["all"]
    assert {record.reason for record in records if record.document is None} == {"no_summary"}
    assert len(facts["sha256"]) == 64
    for record in records:
        if record.document is not None:
            question, answer = record.document
            assert (question.role, answer.role) == ("user", "assistant")
            assert len(answer.content) <= 300
            assert "\n" not in question.content + answer.content


def test_the_identity_of_a_source():
    source = PythonQuestionsSource(name="x")
    assert {"versions", "phrasing", "modules", "held_out_fraction", "max_answer_chars"} <= identify(
        source
    ).keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packages": ["topics", "stdlib"]}, "packages must be stdlib or names of packages, got topics"),
        ({"packages": []}, "packages must be a list of different names"),
        ({"modules": "test"}, 'modules must be one of "all", "train", "held_out", got "test"'),
        ({"held_out_fraction": 1.0}, "held_out_fraction must be within 0 and 1, got 1.0"),
        ({"max_answer_chars": 19}, "max_answer_chars must be at least 20, got 19"),
    ],
)
def test_impossible_sources_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(PythonQuestionsSource, {"name": "x"} | values)
