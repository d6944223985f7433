"""Which limits, addresses and keys are taken."""

import pytest

from lumi.config import UserError
from lumi.server.limits import Limits, check_key, is_loopback


def test_a_request_may_have_no_more_choices_than_there_is_room():
    for change, most in (
        ({}, 16),
        ({"max_batch": 2, "max_queue": 2}, 4),
        ({"max_batch": 1, "max_queue": 0}, 1),
    ):
        assert Limits(**change).max_choices == most


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_choices": 0}, "max_choices must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1, got 0"),
        ({"max_queue": -1}, "max_queue must be at least 0, got -1"),
        ({"cache_tokens": 0}, "cache_tokens must be at least 1, got 0"),
        ({"request_seconds": 0.0}, "request_seconds must be above 0, got 0.0"),
        ({"request_seconds": float("nan")}, "request_seconds must be above 0, got nan"),
        ({"request_seconds": float("inf")}, "request_seconds must be above 0, got inf"),
        (
            {"max_batch": 2, "max_queue": 3, "max_choices": 6},
            "max_choices must be at most --max-batch and --max-queue together, 5, got 6",
        ),
    ],
    ids=str,
)
def test_a_limit_that_nothing_can_keep_is_refused(change, said):
    Limits(max_batch=2, max_queue=3, max_choices=5, cache_tokens=1)
    with pytest.raises(UserError) as refused:
        Limits(**change)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.0.7", False),
        ("localhost.example", False),
    ],
)
def test_which_addresses_are_of_this_machine_alone(host, expected):
    assert is_loopback(host) is expected


def test_others_need_a_key():
    check_key("127.0.0.1", None)
    check_key("0.0.0.0", "k-!~")
    with pytest.raises(UserError) as refused:
        check_key("0.0.0.0", None)
    assert str(refused.value) == (
        "--host must be 127.0.0.1 where there is no key, because others would reach the model, got 0.0.0.0; "
        "set LUMI_API_KEY"
    )


@pytest.mark.parametrize("key", ["", "se cret", "secret\n", "sécret", "secret\udcff"], ids=ascii)
def test_a_key_that_no_client_can_send_is_refused_and_not_shown(key):
    with pytest.raises(UserError, match="the API key must be visible ASCII") as refused:
        check_key("127.0.0.1", key)
    assert "cret" not in str(refused.value)
