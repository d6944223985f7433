import pickle
import time
from dataclasses import dataclass, field
from typing import Literal

import pytest

from lumi.config import (
    UserError,
    derived,
    differences,
    from_dict,
    load_config,
    read_json,
    to_dict,
    unique_keys,
    write_json,
)
from lumi.host.storage import DamagedError


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: int


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    steps: int = 3
    ratio: float | None = None
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    shapes: tuple[Circle | Square, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    circle: Circle = field(default_factory=Circle)
    names: str | tuple[str, ...] = "all"

    area: int = derived()

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.area is None:
            object.__setattr__(self, "area", self.steps**2)


@dataclass(frozen=True, kw_only=True)
class Port:
    number: int

    def __post_init__(self):
        if self.number < 1:
            raise UserError("number", "must be at least 1", got=self.number, remedy="pass another one")
        if self.number > 9:
            raise UserError("number and others", "must be small")


@dataclass(frozen=True, kw_only=True)
class Server:
    port: Port


def load(tmp_path, text, overrides=()):
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    return load_config(Tree, path, overrides)


def test_one_or_several():
    assert from_dict(Tree, {"name": "x", "names": "one"}).names == "one"
    assert from_dict(Tree, {"name": "x", "names": ["one", "two"]}).names == ("one", "two")
    with pytest.raises(UserError, match=r"names must be a string or .*, got 3"):
        from_dict(Tree, {"name": "x", "names": 3})
    with pytest.raises(UserError, match=r"names\.1 must be a string, got 3"):
        from_dict(Tree, {"name": "x", "names": ["one", 3]})


def test_round_trip():
    data = {
        "name": "x",
        "ratio": 1,
        "shapes": [{"kind": "square", "side": 2}, {"kind": "circle"}],
        "weights": {"a": 0.5},
    }
    tree = from_dict(Tree, data)
    assert tree.shapes == (Square(side=2), Circle())
    assert tree.ratio == 1.0
    assert isinstance(tree.ratio, float)
    assert from_dict(Tree, to_dict(tree)) == tree


def test_null_for_a_derived_field_is_computed():
    for data in ({"name": "x"}, {"name": "x", "area": None}):
        assert from_dict(Tree, data).area == 9
    assert from_dict(Tree, {"name": "x", "area": 5}).area == 5
    with pytest.raises(UserError, match="steps must be an integer, got null"):
        from_dict(Tree, {"name": "x", "steps": None})


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "c: port.number must be at least 1, got 0; pass another one"),
        (10, "c: port number and others must be small"),
    ],
)
def test_an_error_that_names_a_field_gets_its_whole_key(number, message):
    with pytest.raises(UserError) as raised:
        from_dict(Server, {"port": {"number": number}}, "c")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x", "stepz": 4}', r"c\.json: stepz unknown key \(value 4\); did you mean 'steps'\?"),
        ('{"name": "x", "circle": {"raduis": 4}}', r"circle\.raduis unknown key .* did you mean 'radius'"),
        ('{"name": "x", "steps": "4"}', r'steps must be an integer, got "4"'),
        ('{"name": "x", "steps": true}', r"steps must be an integer, got true"),
        ('{"name": "x", "steps": 4.0}', r"steps must be an integer, got 4\.0"),
        ('{"name": "x", "flag": 1}', r"flag must be true or false, got 1"),
        ('{"name": "x", "ratio": NaN}', r"not valid JSON: NaN is not a number"),
        ('{"name": "x", "ratio": 1e999}', r"1e999 is too large"),
        ('{"name": "x", "name": "y"}', r"duplicate key 'name'"),
        ('{"name": "x", "mode": "c"}', r'mode must be one of "a", "b", got "c"'),
        (
            '{"name": "x", "shapes": [{"kind": "hexagon"}]}',
            r'shapes\.0\.kind must be one of "circle", "square", got "hexagon"',
        ),
        ('{"name": "x", "shapes": [{"kind": "square"}]}', r"shapes\.0\.side is required, but missing"),
        ('{"name": "x", "steps": 0}', r"steps must be at least 1, got 0"),
        ('{"steps": 1}', r"name is required, but missing"),
        ("[]", r"a config must be a JSON object, got a list"),
        ('{"name": ', r"not valid JSON: Expecting value: line 1 column 10"),
    ],
)
def test_refuses(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "- a\n"),
        ("config.YML", "{name: x}"),
        ("config.json", "# a run\n\nname: x\nsteps: 3\n"),
        ("config.json", "---\nname: x\n"),
        ("config", "sources:\n  - kind: text\n"),
    ],
)
def test_yaml_is_told_from_broken_json(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(
        UserError, match=rf"{name}: not valid JSON: .*; it looks like YAML: write it as JSON$"
    ):
        load_config(Tree, tmp_path / name)
    (tmp_path / "broken.json").write_text('{"name": ')
    with pytest.raises(UserError) as caught:
        load_config(Tree, tmp_path / "broken.json")
    assert "YAML" not in str(caught.value)


def test_a_key_that_stands_twice_among_many_is_found_at_once():
    pairs = [(str(number), 0) for number in range(100_000)]
    start = time.monotonic()
    with pytest.raises(ValueError, match="duplicate key '99999'"):
        unique_keys([*pairs, pairs[-1]])
    assert time.monotonic() - start < 10  # a count of each key would take minutes


def test_overrides(tmp_path):
    overrides = ["circle.radius=3e-1", "mode=b", "shapes.0.side=7", "weights.new=2"]
    tree = load(tmp_path, '{"name": "x", "shapes": [{"kind": "square", "side": 1}]}', overrides)
    assert (tree.circle.radius, tree.mode, tree.shapes[0].side, tree.weights) == (0.3, "b", 7, {"new": 2.0})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "must look like key.subkey=value"),
        ("circle.radiu=1", "did you mean 'radius'"),
        ("name.inner=1", 'name holds "x", it has no keys'),
        ("steps=NaN", "NaN is not a number"),
        ('circle={"radius": 1, "radius": 2}', "duplicate key 'radius'"),
        ("shapes.3.side=1", "must be an index below 0"),
    ],
)
def test_refuses_overrides(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, '{"name": "x", "shapes": []}', [override])


def test_differences():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": "x" * 100, "e": 1}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": "y", "f": None}
    assert differences(old, new) == [
        "a.c.1 was 2, is 3 now",
        f'd was "{"x" * 56}..., is "y" now',
        "e was 1, is null now",
    ]
    assert differences(old, old) == []


def test_files(tmp_path):
    write_json(tmp_path / "a.json", {"é": 1})
    assert read_json(tmp_path / "a.json") == {"é": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(UserError, match=r"missing\.json: cannot be read: No such file"):
        read_json(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.json: cannot be read: it is not UTF-8"):
        read_json(tmp_path / "bad.json")


def test_an_error_is_its_parts():
    error = UserError("--port", "must be at least 1", got=0, remedy="pass another one")
    assert str(error) == "--port must be at least 1, got 0; pass another one"
    assert str(UserError("a whole sentence")) == "a whole sentence"
    assert str(error.within("here")) == "here: --port must be at least 1, got 0; pass another one"
    assert str(error.replace(remedy="")) == "--port must be at least 1, got 0"
    again = pickle.loads(pickle.dumps(DamagedError("file.bin:", "must be whole", remedy="copy it again")))
    assert type(again) is DamagedError
    assert (str(again), again.remedy) == ("file.bin: must be whole; copy it again", "copy it again")
