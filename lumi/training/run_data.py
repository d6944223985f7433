"""The data of a run: token stores, batches, and the tokenizer with the template of the conversations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lumi.chat.rendering import template_of
from lumi.chat.templates import TEMPLATES
from lumi.config import UserError
from lumi.data.batches import Batch, Batches, prefetch
from lumi.data.reading_ahead import reading_ahead
from lumi.data.rows import ConversationRows, make_rows, validation_rows
from lumi.data.token_cache import check_cache_options, open_or_tokenize
from lumi.data.token_store import TokenStore
from lumi.formats.hf_format import ends_of
from lumi.formats.pretrained import locate
from lumi.host.provenance import Parent
from lumi.host.user_cache import is_url
from lumi.parallel.world import World
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.training.preview import describe_conversations
from lumi.training.run_config import Paths, TrainConfig


@dataclass(frozen=True)
class StepInput:
    """The micro-batches of one process in one step, or the fault that kept it from reading them."""

    step: int
    loaded: Sequence[Batch]
    fault: UserError | OSError | None

    def batches(self) -> Sequence[Batch]:
        """The micro-batches. Raises the fault, if there is one."""
        if self.fault is not None:
            raise self.fault
        return self.loaded


class RunData:
    """`tokenizer`, training `batches`, and the `validation` splits of the data folders that have one.

    The main process tokenizes corpus folders and checks every hash; the others wait for it.
    """

    def __init__(self, config: TrainConfig, paths: Paths, world: World):
        self.folders = paths.data_dirs
        with world.fail_together():
            check_cache_options(paths.cache_dir, self.folders, paths.cache_bytes)
            tokenizer = load_tokenizer(paths.tokenizer_dir)
            if paths.model_path is not None:
                tokenizer = tokenizer.with_ends(ends_of(locate(paths.model_path)))
        stores: list[TokenStore] = []
        with world.fail_together(interruptible=True):
            if world.is_main:
                stores += self._stores(paths, tokenizer, "hash")
        with world.fail_together():
            self._open(config, paths, tokenizer, stores)

    def _open(
        self, config: TrainConfig, paths: Paths, tokenizer: Tokenizer, stores: list[TokenStore]
    ) -> None:
        """What each process does by itself; `stores` are those that the main one has opened already."""
        self.stores = stores or self._stores(paths, tokenizer, "size")
        self._check_pairs(config.dpo is not None)
        self.tokenizer = self._in_template(tokenizer)
        self._check_rows(config.batches.sequence_length, config.validation_tokens)
        self.batches = Batches(
            [store.split("train") for store in self.stores], paths.data_weights, config.batches, config.seed
        )
        self.validation = [
            store.split("validation") for store in self.stores if store.has_split("validation")
        ]
        if config.final == "best" and not self.validation:
            raise UserError(
                'config.final must be "last" where no data folder has a validation split, got "best"'
            )

    def _stores(
        self, paths: Paths, tokenizer: Tokenizer, verify: Literal["size", "hash"]
    ) -> list[TokenStore]:
        return [
            open_or_tokenize(
                folder,
                tokenizer,
                cache_dir=paths.cache_dir,
                cache_bytes=paths.cache_bytes,
                verify=verify,
            )
            for folder in self.folders
        ]

    def inputs(
        self, steps: Iterable[int], rows: Sequence[tuple[int, int]], prepare: Callable[[Batch], Batch]
    ) -> Iterator[StepInput]:
        """The inputs of steps. A thread reads the next one while the loop computes this one.

        Where data lies behind a URL, threads fetch what further steps read.

        Args:
            rows: [start, stop) of each micro-batch within a step.
            prepare: done to each micro-batch, in that thread.
        """

        def read(step: int) -> tuple[list[Batch], UserError | OSError | None]:
            try:
                return [prepare(self.batches.rows(step, *span)) for span in rows], None
            except (UserError, OSError) as error:
                return [], error

        if any(map(is_url, self.folders)):
            mine = [row for span in rows for row in range(*span)]
            steps = reading_ahead(steps, mine, lambda step, row: self.batches.rows(step, row, row + 1))
        return (StepInput(step, *loaded) for step, loaded in prefetch(read, steps))

    def identity(self) -> dict[str, Any]:
        """What decides which data a step sees."""
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "data": [
                {name: file.sha256 for name, file in store.manifest.splits["train"].files.items()}
                for store in self.stores
            ],
            "data_weights": self.batches.weights,
        }

    def parents(self) -> list[Parent]:
        """The tokenizer and the token stores, as what a checkpoint is made from."""
        return [*self.tokenizer.as_parents, *(store.as_parent for store in self.stores)]

    def shares(self) -> list[tuple[str, float, int]]:
        """Per data folder its path, its share of the rows and its training tokens."""
        return list(
            zip(
                self.folders,
                self.batches.weights,
                [rows.num_tokens for rows in self.batches.stores],
                strict=True,
            )
        )

    def num_validation_tokens(self) -> int:
        """Tokens of the validation splits."""
        return sum(split.num_tokens for split in self.validation)

    def describe_conversations(self) -> list[str]:
        """For each data folder of conversations: what is trained, with an example."""
        stores = zip(self.folders, self.stores, self.batches.stores, strict=True)
        return [
            describe_conversations(folder, rows, store.manifest.splits["train"], self.tokenizer)
            for folder, store, rows in stores
            if isinstance(rows, ConversationRows)
        ]

    def name_documents(self, step: int, start: int, stop: int) -> str:
        """The documents behind the rows [start, stop) of a step, in words."""
        return "; ".join(
            f"{self.folders[store]} documents {ids}"
            for store, ids in self.batches.documents(step, start, stop)
        )

    def _check_pairs(self, wanted: bool) -> None:
        """Raises UserError unless each store holds pairs, or none does, as `dpo` needs it."""
        for folder, store in zip(self.folders, self.stores, strict=True):
            if store.manifest.pairs and not wanted:
                expectation = f"must be given for the pairs of {folder}"
                raise UserError("config.dpo", expectation, got="null", remedy='add "dpo": {}')
            if wanted and not store.manifest.pairs:
                raise UserError(
                    "--data-dirs",
                    "must hold pairs where the config has dpo",
                    got=f"{folder}, which holds none",
                    remedy="prepare pairs by a source of the kind preference, or take dpo out",
                )

    def _check_rows(self, length: int, validation_tokens: int | None) -> None:
        """Make the rows of every split once, to name one without rows or targets before the first step."""
        for folder, store in zip(self.folders, self.stores, strict=True):
            for name, split in store.splits.items():
                try:
                    if name == "train":
                        make_rows(split, length, 0)
                    else:
                        validation_rows(split, length, validation_tokens)
                except UserError as error:
                    raise error.within(f"{folder}, {name} split") from error

    def _in_template(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer for `final/`, with the chat template of the stores' conversations if there are
        any."""
        names = sorted(
            {store.manifest.template for store in self.stores if store.manifest.template is not None}
        )
        if len(names) > 1:
            raise UserError(
                "--data-dirs",
                "must hold conversations of one template",
                got=", ".join(names),
                remedy="tokenize again with --template",
            )
        own = template_of(tokenizer)
        if not names or (own is not None and own.name == names[0]):
            return tokenizer.with_chat_template(own.jinja if names and own is not None else None)
        if names[0] not in TEMPLATES:
            raise UserError(
                "--data-dirs",
                "must hold conversations in the tokenizer's chat template, or one of Lumi's",
                got=f"another one, {names[0]}",
                remedy="tokenize again with this tokenizer",
            )
        return tokenizer.with_chat_template(TEMPLATES[names[0]].jinja)
