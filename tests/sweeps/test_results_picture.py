import matplotlib.figure
import pytest

from lumi.sweeps.results import Row
from lumi.sweeps.results_picture import draw_results


def row(bits, num_finished=1, contender="", **values):
    parts = {"setting": str(values), "values": values, "state": "", "standard_error": 0.1, "trials": ()}
    parts["contender"] = contender
    return Row(**parts, bits_per_byte=bits, num_finished=num_finished, tokens=1, seconds=1)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of the picture of some rows."""
    kept = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, path: (kept.append(figure), original(figure, path)),
    )

    def drawn(rows):
        draw_results(rows, tmp_path / "results.png")
        assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
        return kept[-1].axes

    return drawn


def test_a_panel_for_each_key_and_a_line_for_equal_other_keys(drawn):
    rows = [
        row(bits, lr=lr, kind=kind)
        for lr, kind, bits in (
            (0.1, "muon", 3.0),
            (0.001, "muon", 1.0),
            (0.01, "muon", 2.0),
            (0.01, "adamw", 4.0),
            (0.1, "adamw", 5.0),
        )
    ]
    rate, kind = drawn([*rows, row(9.0, 0, lr=1.0, kind="muon")])
    assert (rate.get_xlabel(), rate.get_xscale(), kind.get_xscale()) == ("lr", "log", "linear")
    lines = {line.get_label(): line for line in rate.containers}
    assert lines.keys() == {"kind=muon", "kind=adamw"}
    x, y = lines["kind=muon"].lines[0].get_data()
    assert (list(x), list(y)) == ([0.001, 0.01, 0.1], [1.0, 2.0, 3.0])  # the unfinished one is not there
    assert [label.get_text() for label in kind.get_xticklabels()] == ["adamw", "muon"]


def test_a_key_with_one_value_has_no_panel(drawn):
    (axes,) = drawn([row(1.0, lr=0.1, kind="muon"), row(2.0, lr=0.2, kind="muon")])
    assert (axes.get_xlabel(), axes.get_xscale()) == ("lr", "linear")
    (axes,) = drawn([row(1.0, lr=0.1)])
    assert axes.get_xlabel() == "lr"


def test_contenders_have_a_line_each_against_the_keys_that_vary_within_one(drawn):
    adamw = [row(bits, contender="adamw", lr=lr, kind="adamw") for lr, bits in ((0.01, 4.0), (0.1, 5.0))]
    muon = [row(bits, contender="muon", lr=lr, qk=True) for lr, bits in ((0.1, 2.0), (0.3, 3.0))]
    (axes,) = drawn([*adamw, *muon])
    assert axes.get_xlabel() == "lr"
    assert {line.get_label() for line in axes.containers} == {"adamw", "muon"}
