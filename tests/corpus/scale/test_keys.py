import hashlib

import numpy as np

from lumi.corpus import DeduplicationConfig
from lumi.corpus.deduplication import choose_bands, fingerprint
from lumi.corpus.scale.keys import count_bands, count_rows, hash_fields, keys_of


def keys(texts, **options):
    config = DeduplicationConfig(**options)
    found = fingerprint(texts, config)
    signatures = [np.frombuffer(item.signature, "<u4") for item in found]
    return keys_of(found, np.array(signatures).reshape(len(texts), 1, -1), config)


def test_a_row_for_each_band_and_each_hash():
    config = DeduplicationConfig(normalized=True)
    assert count_bands(config) == choose_bands(0.8, 128) == 32
    assert (count_rows(config), hash_fields(config)) == (34, ["digest", "normalized"])
    config = DeduplicationConfig(near=False, exact=False)
    assert (count_bands(config), count_rows(config), hash_fields(config)) == (0, 0, [])
    assert keys(["a"], near=False, exact=False).shape == (1, 0)


def test_equal_documents_share_all_keys_and_others_none():
    one, again, capitals, other = keys(["a b c", "a b c", "A b c", "d e f"], normalized=True)
    assert (one == again).all()
    assert (one == capitals).tolist() == [True] * 32 + [False, True]
    assert not (one == other).any()
    assert int(one[32]) == int.from_bytes(hashlib.sha256(b"a b c").digest()[:8], "little")
