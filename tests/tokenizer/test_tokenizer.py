"""What every tokenizer does, shown by one of Lumi's."""

import numpy as np
import pytest

from lumi.config import UserError
from lumi.tokenizer.tokenizer import StreamDecoder


def test_special_ids_decode_to_nothing_and_cut_characters_to_replacements(tokenizer):
    party = tokenizer.encode("🎉")
    assert len(party) == 4
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 4, 5, 2, 3, 0]) == "hi"
    assert tokenizer.decode(np.array(party[:3])) == "\ufffd"
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(i) for i in party] == ["", "", "", "🎉"]
    assert [decoder.feed(i) for i in party[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


@pytest.mark.parametrize("bad", [-1, 400])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(UserError, match=f"token id must be between 0 and 399, got {bad}"):
        tokenizer.decode([7, bad])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
        tokenizer.encode("é \ud800")
    with pytest.raises(UserError, match=r"U\+DFFF at character 0"):
        tokenizer.encode_batch(["fine", "\udfff"])
