import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import JsonlSource, JsonSource, PrepareConfig, PythonDocsSource, TextSource
from lumi.corpus.conversations import AlpacaFormat
from lumi.corpus.sources import identify


def test_identity_follows_the_files_but_not_name_and_budget(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1")
    one = identify(TextSource(name="x", paths=(str(path),)))
    assert one == identify(TextSource(name="y", paths=(str(path),), max_tokens=5, max_documents=2))
    assert one != identify(TextSource(name="x", paths=(str(path),), separator="-"))
    path.write_text("12")
    assert one != identify(TextSource(name="x", paths=(str(path),)))
    assert identify(JsonSource(name="x", paths=(str(path),))) != identify(
        JsonSource(name="x", paths=(str(path),), conversation=AlpacaFormat())
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "text", "name": "a/b", "paths": ["x"]}, r"sources.0 name must be letters, .* got 'a/b'"),
        ({"kind": "text", "name": "x", "paths": []}, "paths must hold at least one path"),
        ({"kind": "text", "name": "x", "paths": ["x"], "separator": ""}, "separator must be null"),
        (
            {"kind": "text", "name": "x", "paths": ["x"], "max_tokens": 0},
            "max_tokens must be at least 1, or null for all, got 0",
        ),
        (
            {"kind": "jsonl", "name": "x", "paths": ["x"], "max_documents": -1},
            "max_documents must be at least 1",
        ),
        ({"kind": "jsonl", "name": "x", "paths": ["x"], "text_field": ""}, "text_field must be a name"),
        ({"kind": "hub", "name": "x", "dataset": ""}, "dataset must be a name"),
        ({"kind": "hub", "name": "x", "dataset": "a/b", "split": ""}, "split must be a name"),
        ({"kind": "json", "name": "x", "paths": []}, "paths must hold at least one path"),
        (
            {
                "kind": "json",
                "name": "x",
                "paths": ["x"],
                "text_field": "a",
                "conversation": {"kind": "alpaca"},
            },
            "text_field must be left out where conversation is given, got 'a'",
        ),
        (
            {"kind": "text", "name": "x", "paths": ["x"], "conversation": {"kind": "alpaca"}},
            "sources.0.conversation unknown key",
        ),
        ({"kind": "python_docs", "name": "x", "packages": []}, "packages must be a list of different names"),
        ({"kind": "python_docs", "name": "x", "packages": ["../x"]}, "packages must be names such as"),
        ({"kind": "tsv", "name": "x"}, 'sources.0.kind must be one of "hub", "jsonl", "json", .*, got "tsv"'),
        ({"kind": "csv", "name": "x", "paths": ["x"], "delimiter": ""}, "delimiter must be one character"),
        ({"kind": "csv", "name": "x", "paths": ["x"], "delimiter": '"'}, "delimiter must be one character"),
        (
            {"kind": "text", "name": "x", "paths": ["x"], "sample_fraction": 0.0},
            r"sample_fraction must be within \(0, 1\], or null for all, got 0.0",
        ),
        (
            {"kind": "json", "name": "x", "paths": ["x"], "min_score": 1.0},
            "score_field and min_score must be given together, got min_score alone",
        ),
        ({"kind": "json", "name": "x", "paths": ["x"], "url_field": ""}, "url_field must be a name"),
        (
            {
                "kind": "json",
                "name": "x",
                "paths": ["x"],
                "url_field": "u",
                "conversation": {"kind": "oasst_messages"},
            },
            "must be null with oasst_messages, .* got u",
        ),
    ],
)
def test_impossible_sources_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        from_dict(PrepareConfig, {"sources": [source]})


def test_python_docs_of_a_package_that_is_not_installed():
    with pytest.raises(UserError, match="packages must name installed packages, got 'no_such_package_here'"):
        identify(PythonDocsSource(name="x", packages=("no_such_package_here",)))


def test_a_compression_that_nobody_reads_is_refused_before_the_work(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl.br").write_text("")
    source = from_dict(JsonlSource, {"name": "x", "paths": [str(tmp_path / "*")]})
    with pytest.raises(UserError, match=r"source 'x': .*b.jsonl.br must be plain, .*, got brotli; unpack it"):
        identify(source)
