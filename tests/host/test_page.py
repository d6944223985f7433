import pytest
from html_page import Page
from jinja2 import UndefinedError

from lumi.host.page import is_page, template, write_page


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.html.jinja"
    path.write_text('{% extends "page.html.jinja" %}{% block main %}<p>{{ text }}</p>{% endblock %}')
    return path


def test_text_is_escaped_and_nothing_else_is_needed(file, tmp_path):
    text = "<script>{{ 1 + 1 }}</script> \ud800"
    write_page(tmp_path / "a.html", template(file).render(generator="us", title="<b>", text=text))
    page = Page(tmp_path / "a.html")
    assert page.needs_nothing_else()
    assert page.has("<script>{{ 1 + 1 }}</script> ?")
    assert page.text.count("<b>") == 2


def test_a_name_that_is_missing_is_an_error(file):
    with pytest.raises(UndefinedError, match="text"):
        template(file).render(generator="us", title="")


def test_a_page_is_known_by_who_wrote_it(file, tmp_path):
    link, page = tmp_path / "link.html", tmp_path / "page.html"
    page.write_text("old")
    link.symlink_to(page)
    write_page(link, template(file).render(generator="us", title="", text=""))
    assert link.is_symlink()
    assert is_page(page, "us")
    assert not is_page(page, "them")
    (tmp_path / "own.html").write_text("<!DOCTYPE html>")
    assert not is_page(tmp_path / "own.html", "us")
    assert not is_page(tmp_path / "none.html", "us")
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["link.html", "own.html", "page.html"]
