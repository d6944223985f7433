"""The card by itself; `test_push.py` has those of whole runs."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from lumi.formats.hf_format import read_shape
from lumi.host.hub_cache import HubModel
from lumi.provenance.model_card import CardFacts, is_ours, model_card


@pytest.fixture
def facts(base_dir, tokenizer):
    def facts(**changes):
        known = {
            "target": HubModel("me/x", None),
            "shape": read_shape(base_dir),
            "tokenizer": tokenizer,
            "is_adapter": False,
            "fingerprint": "f" * 64,
            "base": None,
            "is_recorded": True,
            "runs": [],
            "picture": False,
            "generation_config": True,
            "evaluations": [],
            "license": None,
        }
        return CardFacts(**known | changes)

    return facts


def test_a_card_knows_whether_somebody_has_changed_it(facts):
    card = model_card(facts())
    assert is_ours(card)
    for changed in (card.replace("# x", "# y"), card + "\nmore", card.rpartition("<!--")[0], "# mine", ""):
        assert not is_ours(changed)
    signature = re.search(r"<!-- .* -->", card)[0]
    assert not is_ours(f"# mine\n\n{signature}\n")


def test_the_same_facts_give_the_same_card(facts):
    assert model_card(facts()) == model_card(facts())


@pytest.mark.parametrize("license", [None, "mit"])
def test_a_licence_is_given_or_said_to_be_missing(license, facts):
    card = ModelCard(model_card(facts(license=license)))
    assert card.data.license == license
    assert ("No licence was given." in card.text) is (license is None)


def test_the_size_and_what_it_reads_at_most(facts, base_dir):
    text = model_card(facts())
    assert f"{read_shape(base_dir).num_parameters:,} parameters (2 layers, width 32, 384 token ids" in text
    assert "It reads at most 64 tokens." in text


def test_a_tokenizer_that_loses_characters(facts, tokenizer):
    lossy = SimpleNamespace(vocab_size=9, chat_template=None, fingerprint="0", loss="NFC changes characters")
    text = model_card(facts(tokenizer=lossy))
    assert "It does not keep every text as it is: NFC changes characters." in text


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_model_without_a_record(is_recorded, facts):
    text = model_card(facts(is_recorded=is_recorded))
    assert "How it was trained is not known here" in text
    assert ("the model was made before records were kept, or elsewhere." in text) is not is_recorded


def test_an_evaluation_that_was_stopped(facts):
    results = {"versions": {"lumi": "1"}, "date": "2026-01-02T03:04:05+00:00", "dtype": "float32"}
    results |= {"finished": False, "limit": 7, "tasks": {}, "perplexity": {}, "smoke_tests": None}
    results["centred_mean"] = None
    text = model_card(facts(evaluations=[results]))
    assert "2026-01-02, float32; lumi 1. The first 7 of each at most. **It was stopped before" in text
    assert "What it can do is not measured here." not in text
