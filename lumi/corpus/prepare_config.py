"""The config of the stage `prepare`."""

from dataclasses import dataclass, field

from lumi.corpus.cleaning import CleaningConfig
from lumi.corpus.conversation_filters import ConversationFilterConfig
from lumi.corpus.deduplication import DeduplicationConfig
from lumi.corpus.documents import Attribution, Kind
from lumi.corpus.evaluation_sets import DecontaminationConfig
from lumi.corpus.filters import FilterConfig
from lumi.corpus.processing import RecordRules
from lumi.corpus.sources import RecordSource, Source


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What goes into a corpus, and how it is cleaned and filtered.

    A source is read until enough of its documents are kept: `max_documents`, or `max_tokens` by an
    estimate. All sources give texts, which `filters` judges, or all give conversations, or all give pairs,
    which `conversation_filters` judges: the one that fits has its defaults if it is not given, the other is
    None.

    Args:
        bytes_per_token: the estimate behind budgets and reports.
        shard_bytes: text in one shard, before compression.
    """

    # Where the text or the conversations come from; at least one.
    sources: tuple[Source, ...]
    # What is repaired in each text before the filters see it.
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    filters: FilterConfig | None = None
    conversation_filters: ConversationFilterConfig | None = None
    # Evaluation sets whose text must not be in the corpus; null: documents are not compared with any.
    decontamination: DecontaminationConfig | None = None
    deduplication: DeduplicationConfig = field(default_factory=DeduplicationConfig)
    bytes_per_token: float = 4.2
    shard_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must hold at least one source, got none")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"sources must have different names, got {', '.join(map(repr, twice))} more than once"
            )
        self._set_filters()
        if not self.bytes_per_token > 0:
            raise ValueError(f"bytes_per_token must be above 0, got {self.bytes_per_token}")
        if self.shard_bytes < 1024:
            raise ValueError(f"shard_bytes must be at least 1024, got {self.shard_bytes}")

    def _set_filters(self) -> None:
        names: dict[Kind, list[str]] = {}
        for source in self.sources:
            names.setdefault(source.holds, []).append(source.name)
        if len(names) > 1:
            got = " and ".join(f"{kind} from {', '.join(each)}" for kind, each in names.items())
            raise ValueError(
                "sources must all give texts, or all conversations (python_questions, and those with"
                f" `conversation`), or all pairs (`preference`), got {got}; prepare a corpus of each"
            )
        if self.holds != "texts":
            fitting, other = "conversation_filters", "filters"
            defaults: FilterConfig | ConversationFilterConfig = ConversationFilterConfig()
        else:
            fitting, other = "filters", "conversation_filters"
            defaults = FilterConfig()
        if getattr(self, other) is not None:
            raise ValueError(f"{other} must be left out for sources of {self.holds}; use {fitting}")
        if getattr(self, fitting) is None:
            object.__setattr__(self, fitting, defaults)

    @property
    def holds(self) -> Kind:
        """What the sources give."""
        return self.sources[0].holds

    @property
    def columns(self) -> list[str]:
        """The columns of an `Attribution` that the corpus has: those of which a source names the field."""
        records = [source for source in self.sources if isinstance(source, RecordSource)]
        return [
            name
            for name in Attribution._fields
            if any(getattr(source, f"{name}_field") is not None for source in records)
        ]

    @property
    def rules(self) -> RecordRules:
        """The rules for a single record, without the overlaps, for which evaluation sets must be read."""
        filters = self.filters or self.conversation_filters
        assert filters is not None
        return RecordRules(self.cleaning, filters, self.deduplication)
