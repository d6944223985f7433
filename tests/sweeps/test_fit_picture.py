import matplotlib.figure
import pytest

from lumi.sweeps.fit_picture import draw_fit
from lumi.sweeps.fitted_law import make_fit


def test_runs_and_curves_for_each_size_and_the_best_size(law_runs, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path: kept.append(figure))
    fitted = make_fit(law_runs)
    draw_fit(fitted, tmp_path / "fit.png")
    curves, best = kept[0].axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["1M", "10M", "100M"]
    x, y = curves.lines[1].get_data()
    assert y[50] == pytest.approx(fitted.law.loss(10**6, x[50]))
    budgets, sizes = best.lines[0].get_data()
    assert sizes[7] == pytest.approx(fitted.best(budgets[7])["parameters"].value)
