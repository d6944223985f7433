import pytest
from small_checkpoints import rewrite, save

from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.checkpoint.manifest import REMEDY, seal_checkpoint
from lumi.config import UserError
from lumi.host.storage import DamagedError


def test_manifest_and_plan_must_name_the_same_files(tmp_path):
    """Or a file would be read that nobody has checked."""
    path = save(tmp_path)
    rewrite(path, "manifest.json", lambda manifest: manifest["files"].pop("model-00000.safetensors"))
    message = r"model-00000\.safetensors: must stand in both manifest\.json and tensors\.json"
    with pytest.raises(UserError, match=message):
        open_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path)
    rewrite(path, "manifest.json", lambda manifest: manifest.update(format=1))
    message = r"manifest\.json: format must be 2, got 1; resume with the version of Lumi that wrote it"
    with pytest.raises(UserError, match=message) as raised:
        open_checkpoint(path)
    assert not isinstance(raised.value, DamagedError)


def test_damaged_is_what_has_the_wrong_content(tmp_path):
    path = save(tmp_path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match=r"manifest\.json: not valid JSON") as raised:
        open_checkpoint(path)
    assert raised.value.remedy == REMEDY
    path = save(tmp_path)
    (path / "tensors.json").unlink()
    with pytest.raises(DamagedError, match=r"tensors\.json: is missing"):
        open_checkpoint(path)


def test_a_plan_larger_than_its_files_is_refused_before_anything_is_allocated(tmp_path):
    path, large = save(tmp_path), 10**15

    def grow(groups):
        groups["model"]["w"].update(shape=[large])
        groups["model"]["w"]["pieces"][0].update(offset=[0], shape=[large])

    rewrite(path, "tensors.json", grow)
    size = (path / "model-00000.safetensors").stat().st_size
    message = (
        rf"model-00000\.safetensors: must hold {4 * large + 3 * 8} bytes of tensors, got a file of {size}"
    )
    with pytest.raises(DamagedError, match=message):
        open_checkpoint(path).read("model", "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w["pieces"].pop(),
            r"the pieces must hold the 15 elements of shape \(3, 5\) once each, got 0",
        ),
        (
            lambda w: w["pieces"][0].update(shape=[2, 5]),
            r"must hold the 15 elements of shape \(3, 5\) once each, got 10",
        ),
        (lambda w: w["pieces"][0].update(offset=[1, 0]), r"a piece must lie inside shape \(3, 5\)"),
        (lambda w: w["pieces"].append(w["pieces"][0]), r"once each, got 30"),
        (
            lambda w: w["pieces"][0].update(file="../model-00000.safetensors"),
            r"must be the name of a tensor file beside it, got '\.\./",
        ),
        (
            lambda w: w["pieces"][0].update(file="/etc/passwd"),
            r"must be the name of a tensor file beside it, got '/etc/passwd'",
        ),
        (lambda w: w["pieces"][0].update(file=7), "must tell where a tensor lies"),
        (lambda w: w["pieces"][0].update(offset=[0.0, 0]), r"must be lists of integers, got \[0\.0, 0\]"),
        (lambda w: w["pieces"][0].pop("file"), "must tell where a tensor lies: 'file'"),
        (lambda w: w.update(dtype="load"), "dtype must be a type of torch's, got 'load'"),
        (lambda w: w.update(shape=[5, 3]), r"a piece must lie inside shape \(5, 3\)"),
        (lambda w: w.update(shape=15), "must tell where a tensor lies"),
    ],
)
def test_a_crafted_plan_is_refused(tmp_path, change, message):
    path = save(tmp_path)
    rewrite(path, "tensors.json", lambda groups: change(groups["model"]["w"]))
    with pytest.raises(UserError, match=rf"tensors\.json: model tensor 'w': .*{message}"):
        open_checkpoint(path)


def test_a_plan_that_overlaps_and_leaves_a_hole(tmp_path):
    """The right number of elements, but not each once: neither when it is read, nor when it is written."""
    path = save(tmp_path)
    piece = {"file": "model-00000.safetensors", "shape": [2, 5]}
    other = {"file": "model-00000.safetensors", "shape": [1, 5]}
    pieces = [piece | {"offset": [0, 0]}, other | {"offset": [1, 0]}]
    rewrite(path, "tensors.json", lambda groups: groups["model"]["w"].update(pieces=pieces))
    with pytest.raises(UserError, match=r"tensors\.json: model tensor 'w': .* must not overlap"):
        open_checkpoint(path)
    entry = {"dtype": "float32", "shape": [3, 5], "pieces": pieces}
    with pytest.raises(ValueError, match="must not overlap"):
        seal_checkpoint(tmp_path, {}, {"model": {"w": entry}}, {})
    assert not (tmp_path / "manifest.json").exists()
