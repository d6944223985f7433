"""Stage `prepare`: raw text or chat data -> a corpus folder of clean, filtered, de-duplicated documents."""

from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.conversation_filters import ConversationFilterConfig
from lumi.corpus.deduplication import DeduplicationConfig
from lumi.corpus.docstrings import Entry
from lumi.corpus.filters import FilterConfig
from lumi.corpus.folder import ConversationBatch, CorpusBatch, CorpusReader, is_corpus, read_corpus
from lumi.corpus.prepare import prepare
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.python_docs import read_entries
from lumi.corpus.sources import (
    CsvSource,
    HubDataset,
    HubSource,
    JsonFiles,
    JsonlFiles,
    JsonlSource,
    JsonSource,
    ParquetSource,
    PythonDocsSource,
    PythonQuestionsSource,
    TextFiles,
    TextSource,
)

__all__ = [
    "CleaningConfig",
    "ConversationBatch",
    "ConversationFilterConfig",
    "CorpusBatch",
    "CorpusReader",
    "CsvSource",
    "DeduplicationConfig",
    "Entry",
    "FilterConfig",
    "HubDataset",
    "HubSource",
    "JsonFiles",
    "JsonSource",
    "JsonlFiles",
    "JsonlSource",
    "ParquetSource",
    "PrepareConfig",
    "PythonDocsSource",
    "PythonQuestionsSource",
    "TextFiles",
    "TextSource",
    "clean_text",
    "is_corpus",
    "prepare",
    "read_corpus",
    "read_entries",
]
