import json

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import HubDataset, JsonlFiles, TextFiles
from lumi.evaluation.records import text_field, tightest


def test_the_place_of_a_lone_surrogate_is_counted_in_the_field():
    with pytest.raises(
        UserError,
        match=r"^here: 'a': text must be valid Unicode, got the lone surrogate U\+D800 at character 2$",
    ):
        text_field({"b": "x", "a": "xx\ud800"}, "a", "here")


def test_the_tightest_limit():
    assert (tightest(None, None), tightest(3, None), tightest(None, 4), tightest(5, 4)) == (None, 3, 4, 4)


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (HubDataset, {"dataset": ""}, 'c: dataset must be a name, got ""'),
        (HubDataset, {"dataset": "a", "split": ""}, 'c: split must be a name, got ""'),
        (JsonlFiles, {"paths": []}, "c: paths must hold at least one path or glob pattern, got []"),
        (TextFiles, {"paths": [""]}, "c: paths must hold at least one path or glob pattern, got ['']"),
    ],
)
def test_bad_configs(cls, data, message):
    with pytest.raises(UserError) as error:
        from_dict(cls, json.loads(json.dumps(data)), "c")
    assert str(error.value) == message
