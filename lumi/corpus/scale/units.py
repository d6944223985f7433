"""The pieces into which the input is cut for tasks: a file, or a source that cannot be cut."""

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lumi.config import UserError
from lumi.corpus.oasst import OasstMessagesFormat
from lumi.corpus.sources import Files, HubSource, RecordSource, Source
from lumi.host.file_patterns import matching_files


class Unit(NamedTuple):
    """A piece of the source with the number `source_index`: one of its files, or (None) all of it."""

    source_index: int
    path: str | None

    def source(self, sources: Sequence[Source]) -> Source:
        """The source that gives this piece alone."""
        whole = sources[self.source_index]
        if self.path is None:
            return whole
        assert isinstance(whole, Files)
        return dataclasses.replace(whole, paths=(glob.escape(self.path),))


def list_units(sources: Sequence[Source]) -> list[Unit]:
    """The pieces of all sources, in the order of their documents.

    Raises:
        UserError: a pattern matches no file; a dataset of the hub has a budget, which would end its download
            only after all of it had been read.
    """
    return [Unit(index, path) for index, source in enumerate(sources) for path in _cut(source)]


def _cut(source: Source) -> Iterator[str | None]:
    if isinstance(source, HubSource) and (source.max_tokens or source.max_documents):
        raise UserError(
            f"source {source.name!r}",
            "must be without max_tokens and max_documents with --executor, or of files",
            got="a dataset of the hub with a budget, which only one process can stop at",
            remedy="run without --executor, or download its files first",
        )
    is_tree = isinstance(source, RecordSource) and isinstance(source.conversation, OasstMessagesFormat)
    if isinstance(source, Files) and not is_tree:  # the messages of a tree may lie in several files
        yield from matching_files(source.paths)
    else:
        yield None
