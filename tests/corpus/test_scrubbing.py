import random
from collections import Counter

import pytest

from lumi.corpus.scrubbing import DETAILS, PLACEHOLDERS, scrub


def scrubbed(text, *details):
    replaced = Counter()
    return scrub(text, details or DETAILS, replaced), dict(replaced)


@pytest.mark.parametrize(
    ("detail", "found"),
    [
        ("email", "jo.doe+news@mail.example.co.uk"),
        ("email", "O_K%1@EXAMPLE.COM"),
        ("ip", "8.8.8.8"),
        ("ip", "185.199.108.153"),
        ("ip", "2001:4860:4860::8888"),
        ("ip", "2a00:1450:4001:0829:0000:0000:0000:200E"),
        ("phone", "+49 (0)30 1234-5678"),
        ("phone", "+442079460958"),
        ("phone", "+1 212.555.0142"),
        ("phone", "(212) 555-0142"),
        ("phone", "1-212-555-0142"),
        ("phone", "212.555.0142"),
    ],
)
@pytest.mark.parametrize("frame", ["{}", "Ask {}.", "({})", "<{}>:", "电话{}谢谢", "{}, {}\n{}"])
def test_details_become_placeholders(detail, found, frame):
    count = frame.count("{}")
    expected = (frame.replace("{}", PLACEHOLDERS[detail]), {detail: count})
    assert scrubbed(frame.replace("{}", found)) == expected
    assert scrubbed(frame.replace("{}", found), *(set(DETAILS) - {detail}))[1].get(detail) is None
    assert scrubbed(expected[0]) == (expected[0], {})


@pytest.mark.parametrize(
    "text",
    [
        "@decorator\ndef f(): return a @ b",
        "user@localhost and @handle",
        "10.0.0.1 192.168.1.7 127.0.0.1 192.0.2.1 256.1.1.1 v1.2.3.4 1.2.3.4.5 2001:db8::1 fe80::1",
        "std::vector<a::b> x; 12:34:56 and a::b and ::1 and dead::beef",
        "2024-05-17, 1234567890, 978-3-16-148410-0, 3.14159265358979, 1-212-555-01420, 112-555-0142",
        "a+4912345678 and +1 and 12+12345678",
    ],
)
def test_what_only_looks_like_details_stays(text):
    assert scrubbed(text) == (text, {})


@pytest.mark.parametrize("text", ["a", "a.", "a@", "a@a.", "1.", "f:", "+1(", "212-", "+1 "])
def test_long_runs_take_time_in_proportion(text):
    assert scrubbed(text * 100_000) == (text * 100_000, {})  # in squares this would take minutes


def test_a_text_between_others_is_the_same():
    pieces = ["me@example.com", "8.8.8.8", "+442079460958", "word", "7"]
    words = [random.Random(seed).choice(pieces) for seed in range(300)]
    text, replaced = scrubbed(", ".join(words))
    assert text == ", ".join(scrubbed(word)[0] for word in words)
    assert sum(replaced.values()) == sum(word not in ("word", "7") for word in words)
