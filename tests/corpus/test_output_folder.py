"""What `test_prepare.py` and `test_cache.py` do not see of the folder that `prepare` writes into."""

import errno
import signal

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import PrepareConfig, prepare
from lumi.corpus.cache import SourceCache
from lumi.corpus.output_folder import (
    discard_caches,
    earlier_corpus,
    full_disk_refused,
    interruptible,
    is_up_to_date,
    sweep_cache,
)

CONFIG = from_dict(
    PrepareConfig,
    {"sources": [{"kind": "python_docs", "name": "a", "packages": ["ftfy"], "max_documents": 2}]},
)


def test_a_corpus_is_up_to_date_while_it_is_whole_and_its_inputs_are_the_same(tmp_path, capsys):
    assert earlier_corpus(tmp_path / "c", CONFIG, use_cache=False) is None
    manifest = prepare(CONFIG, tmp_path / "c", num_workers=1)
    assert earlier_corpus(tmp_path / "c", CONFIG, use_cache=False) == manifest
    assert is_up_to_date(tmp_path / "c", manifest, manifest["inputs_key"])
    assert not is_up_to_date(tmp_path / "c", manifest, "another")
    (tmp_path / "c" / manifest["shards"][0]["file"]).unlink()
    assert not is_up_to_date(tmp_path / "c", manifest, manifest["inputs_key"])
    assert "it is made again" in capsys.readouterr().err


def test_caches_that_are_not_in_use_go(tmp_path, capsys):
    used, other = (SourceCache(tmp_path / ".cache" / name, kind="texts", writable=True) for name in "ab")
    used.finish()
    other.finish()
    sweep_cache(tmp_path, [used.folder])
    assert list((tmp_path / ".cache").iterdir()) == [used.folder]
    assert capsys.readouterr().err == ""
    discard_caches(tmp_path, [used, other])
    assert "what an interrupted run left is discarded; --use-cache goes on" in capsys.readouterr().err
    assert list((tmp_path / ".cache").iterdir()) == []


def test_a_full_disk_is_a_user_error(tmp_path):
    refused = pytest.raises(UserError, match=r"x cannot be written: No space left .* --use-cache")
    with refused, full_disk_refused(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "x")


@pytest.mark.parametrize(
    ("writes", "said"), [(True, "with --use-cache to go on"), (False, "nothing was written")]
)
def test_sigterm_ends_a_run_and_says_what_it_leaves(writes, said, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, interruptible(writes):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert said in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
