"""Stage 1: raw text -> a corpus folder of cleaned, filtered, de-duplicated documents."""

from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.deduplication import DeduplicationConfig
from lumi.corpus.docstrings import Entry
from lumi.corpus.filters import FilterConfig
from lumi.corpus.folder import CorpusBatch, CorpusReader, is_corpus, read_corpus
from lumi.corpus.prepare import PrepareConfig, prepare
from lumi.corpus.python_docs import read_entries
from lumi.corpus.sources import HubSource, JsonlSource, ParquetSource, PythonDocsSource, TextSource

__all__ = [
    "CleaningConfig",
    "CorpusBatch",
    "CorpusReader",
    "DeduplicationConfig",
    "Entry",
    "FilterConfig",
    "HubSource",
    "JsonlSource",
    "ParquetSource",
    "PrepareConfig",
    "PythonDocsSource",
    "TextSource",
    "clean_text",
    "is_corpus",
    "prepare",
    "read_corpus",
    "read_entries",
]
