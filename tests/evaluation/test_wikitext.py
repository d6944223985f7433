"""WikiText's pages and marks."""

from lumi.evaluation.wikitext import detokenize, pages

FIRST = " = Robert = \n \n = = Career = = \n \n He was x = y = z . \n = not a title \n "
SECOND = " = Second Page = \n \n = = = Deep = = = \n Text . \n"
RAW = f" \n{FIRST}\n{SECOND}"


def test_pages_begin_with_their_titles():
    assert pages([RAW]) == [FIRST, SECOND]


def test_the_hubs_lines_are_the_file():
    lines = [line if line.strip() else "" for line in RAW.splitlines(keepends=True)]
    assert lines[0] == lines[2] == ""
    assert pages(lines) == pages([RAW])


def test_marks_are_taken_out():
    """By hand, one line per kind of mark."""
    for raw, text in {
        "a two @-@ part , 1 @,@ 000 @.@ 5 m": "a two-part, 1,000.5 m",
        "He : yes ; no . Go ! Why ? So": "He: yes; no. Go! Why? So",
        "( in 2000 ) [ note ] { set }": "(in 2000) [note] {set}",
        'the play " Herons " by him': 'the play "Herons" by him',
        "Teddy 's den": "Teddy's den",
        "the boys ' den": "the boys' den",
        "a play ' In ' called": "a play 'In' called",
        "= = Life = =": "== Life ==",
        "= = = Early = = =": "=== Early ===",
        "20 ° C": "20°C",
        "one \n two \n ": "one\ntwo\n",
        "about N men": "about 1 men",
    }.items():
        assert detokenize(raw) == text
