from pathlib import Path

import pytest

from lumi.config import UserError, from_dict, load_config, read_json
from lumi.corpus import (
    CleaningConfig,
    ConversationFilterConfig,
    DeduplicationConfig,
    FilterConfig,
    PrepareConfig,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_filters_that_fit_the_sources_are_set():
    texts = from_dict(PrepareConfig, {"sources": [{"kind": "python_docs", "name": "a"}]})
    assert (texts.filters, texts.conversation_filters) == (FilterConfig(), None)
    assert texts.rules == (CleaningConfig(), FilterConfig(), DeduplicationConfig(), None)
    chats = from_dict(PrepareConfig, {"sources": [{"kind": "python_questions", "name": "a"}]})
    assert (chats.filters, chats.conversation_filters) == (None, ConversationFilterConfig())
    assert chats.rules.filters == ConversationFilterConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "sources must hold at least one source, got none"),
        (
            {"sources": [{"kind": "python_docs", "name": "a"}] * 2},
            "sources must have different names, got 'a' more than once",
        ),
        ({"bytes_per_token": 0.0}, "bytes_per_token must be above 0, got 0.0"),
        ({"shard_bytes": 10}, "shard_bytes must be at least 1024, got 10"),
        (
            {"filters": {"min_chars": 5, "max_chars": 4}},
            r"filters max_chars must be at least min_chars \(5\), got 4",
        ),
        ({"filter": {}}, "did you mean 'filters'"),
        (
            {"sources": [{"kind": "python_docs", "name": "a"}, {"kind": "python_questions", "name": "b"}]},
            "sources must all give texts, or all conversations .* got texts from a and conversations from b;"
            " prepare a corpus of each",
        ),
        (
            {"conversation_filters": {}},
            "conversation_filters must be left out for sources of texts; use filters",
        ),
        (
            {"sources": [{"kind": "python_questions", "name": "b"}], "filters": {}},
            "filters must be left out for sources of conversations; use conversation_filters",
        ),
    ],
)
def test_impossible_configs_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(PrepareConfig, {"sources": [{"kind": "python_docs", "name": "a"}]} | values)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("micro", 9_438_336),
        ("tiny", 23_072_000),
        ("small", 41_686_656),
        ("medium", 83_898_880),
        ("base", 276_861_696),
    ],
)
def test_corpus_configs_hold_twenty_tokens_per_parameter(name, num_parameters):
    config = load_config(PrepareConfig, CONFIGS / "corpus" / f"{name}.json")
    # a tenth more: duplicates between sources are free, but an estimate by bytes is not exact
    assert sum(source.max_tokens for source in config.sources) >= 1.1 * 20 * num_parameters


def test_the_demo_needs_no_network():
    config = load_config(PrepareConfig, CONFIGS / "demo" / "prepare.json")
    assert {source.kind for source in config.sources} == {"python_docs"}


def test_the_questions_of_the_demo_need_no_network_and_two_sides_differ_in_nothing_else():
    sides = {side: read_json(CONFIGS / "demo" / f"questions_{side}.json") for side in ("train", "held_out")}
    for side, config in sides.items():
        assert [source.pop("modules") for source in config["sources"]] == [side]
        assert {source["kind"] for source in config["sources"]} == {"python_questions"}
    assert sides["train"] == sides["held_out"]


def test_the_chat_config_names_its_datasets():
    config = load_config(PrepareConfig, CONFIGS / "corpus" / "chat.json")
    assert {source.dataset: source.conversation.kind for source in config.sources} == {
        "yahma/alpaca-cleaned": "alpaca",
        "databricks/databricks-dolly-15k": "dolly",
        "OpenAssistant/oasst2": "oasst_messages",
        "HuggingFaceTB/smoltalk": "messages",
    }
