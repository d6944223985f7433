from pathlib import Path

import pytest

from lumi.host.user_cache import URL_FILE, home_of, is_url, url_of, user_cache


@pytest.mark.parametrize(
    "place", ["s3://bucket/tokens", "memory://tokens", "hf://datasets/a/b", "abfs+x://c"]
)
def test_what_is_a_url(place):
    assert is_url(place)


@pytest.mark.parametrize(
    "place", ["tokens", "/runs/tokens", "C:\\tokens", "a b://c", "://c", Path("s3:/bucket")]
)
def test_what_is_a_path(place):
    assert not is_url(place)


def test_each_url_has_its_place_which_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = home_of("s3://bucket/tokens/")
    assert home == home_of("s3://bucket/tokens") != home_of("s3://bucket/others")
    assert user_cache() == tmp_path / "lumi"
    assert user_cache() in home.parents
    assert home_of("s3://bucket/tokens", tmp_path / "named").parent == tmp_path / "named" / "remote"
    assert url_of(home) is None
    home.mkdir(parents=True)
    (home / URL_FILE).write_text("s3://bucket/tokens\n")
    assert url_of(home) == "s3://bucket/tokens"
