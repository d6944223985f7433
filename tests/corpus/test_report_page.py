import json

import pytest
from html_page import Page

from lumi.cli import dispatch
from lumi.config import UserError, from_dict
from lumi.corpus import prepare
from lumi.corpus.prepare_config import PrepareConfig

EVIL = "</blockquote><script>alert(1)</script> {{ 7 * 7 }}"
OPEN = {"max_duplicate_ngram_char_fraction": None, "max_top_ngram_char_fraction": None}


def config(folder, **filters):
    texts = [f"A page about number {number}. " * 20 for number in range(30)]
    texts += [f"{EVIL} {number}" for number in range(40)] + [texts[3], "lorem ipsum" * 50]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{\n")
    source = {"kind": "jsonl", "name": "pages", "paths": [str(folder / "a.jsonl")]}
    return {"sources": [source], "filters": OPEN | filters, "deduplication": {"near": False}}


def test_the_page_shows_counts_lengths_and_examples_as_text(tmp_path):
    prepare(from_dict(PrepareConfig, config(tmp_path)), tmp_path / "c", num_workers=1)
    page = Page(tmp_path / "c" / "DATA_REPORT.html")
    assert page.needs_nothing_else()
    for text in ("Corpus report: 30 documents", "dropped: too_short (40)", "dropped: exact_duplicate (1)"):
        assert page.has(text), text
    assert sum(EVIL in text for text in page.text) == 10
    assert page.tags.count("blockquote") == 10 + 10 + 3  # kept, too short, and one of each other reason
    assert page.has("64 to 127")
    assert page.has("The languages were not looked at.")
    assert any(text.startswith("malformed_json") or "a.jsonl:73" in text for text in page.text)


def test_languages_on_the_page(tmp_path):
    pytest.importorskip("py3langid")
    prepare(from_dict(PrepareConfig, config(tmp_path, languages=["en"])), tmp_path / "c", num_workers=1)
    assert Page(tmp_path / "c" / "DATA_REPORT.html").has("that passed all other filters, by language")


def test_a_plan_has_a_page_where_it_is_asked_for(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(config(tmp_path)))
    command = ["prepare", "--config", f"{tmp_path}/c.json", "--output-dir", f"{tmp_path}/c"]
    page = tmp_path / "page.html"
    assert dispatch([*command, "--analyze-only", "--report", str(page)]) == 0
    assert f"nothing but {page} was written" in capsys.readouterr().out
    assert not (tmp_path / "c").exists()
    assert dispatch(command) == 0
    assert (tmp_path / "c" / "DATA_REPORT.html").read_bytes() == page.read_bytes()
    page.write_text("mine")
    with pytest.raises(UserError, match="--report must be new, or a page that `lumi prepare` wrote"):
        prepare(from_dict(PrepareConfig, config(tmp_path)), tmp_path / "d", analyze_only=True, report=page)
    for more in ([], ["--executor", "local", "--tasks", "1"]):
        with pytest.raises(UserError, match="--report must come with"):
            dispatch([*command, "--report", "x.html", *more])
