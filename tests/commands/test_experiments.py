import lumi.sweeps.fit
import lumi.sweeps.sweep
from lumi.cli import dispatch
from lumi.command_line import run


def test_sweep(tmp_path, capsys):
    paths = "--data_dirs D --tokenizer-dir T --output-dir".split()
    (tmp_path / "s.json").write_text('{"config": "c.json", "search": {"kind": "grid", "values": {}}}')
    assert run(dispatch, ["sweep", str(tmp_path / "s.json"), *paths, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 's.json'}: search.values must name at least one key")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sweep_hands_its_options_on(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(lumi.sweeps.sweep, "sweep", lambda *a, **b: given.append((a, b)) or 3)
    options = "--data-dirs D E --tokenizer-dir T --output-dir O --processes 4 --device cpu"
    assert run(dispatch, ["sweep", "s.json", *options.split()]) == 3
    ((arguments, named),) = given
    assert [str(argument) for argument in arguments] == ["s.json", "['D', 'E']", "T", "O"]
    assert named == {"processes": 4, "device": "cpu"}


def test_fit(monkeypatch, tmp_path, capsys):
    assert run(dispatch, ["fit", str(tmp_path / "none"), "--output-dir", str(tmp_path / "fit")]) == 2
    assert capsys.readouterr().err.startswith("error: RUN must be a run folder")
    given = []
    monkeypatch.setattr(lumi.sweeps.fit, "fit", lambda *a: given.append(a) or 0)
    assert run(dispatch, "fit a b --output-dir O --flops 1e15 2e15".split()) == 0
    assert str(given[0][1]) == "O"
    assert (list(map(str, given[0][0])), given[0][2]) == (["a", "b"], [1e15, 2e15])
