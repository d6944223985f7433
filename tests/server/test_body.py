"""JSON texts as Python reads them, and why others are refused. `test_errors.py` has the answers."""

import pytest
from starlette.exceptions import HTTPException

from lumi.server.body import read_json


def test_values():
    assert read_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}') == {"a": [1, 2.5, None, "\u00e9"]}
    assert read_json(b"\xef\xbb\xbf[]") == []


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'[{"b": {"c": 1, "c": 2}}]', "duplicate key 'c'"),
        (b'"\xff"', "UTF-8, got byte 0xff at 1"),
        (b"[1,]", "character 3"),
        (b"[" * 100_000, "levels"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
)
def test_what_is_refused(body, cause):
    with pytest.raises(HTTPException) as refused:
        read_json(body)
    assert refused.value.status_code == 400
    assert cause in refused.value.detail
    assert "\n" not in refused.value.detail
