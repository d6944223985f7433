"""Who holds which page of a paged cache, and which pages hold a beginning that is known already.

A page holds the keys and values of `PAGE_SIZE` neighbouring tokens of a sequence. A full page is known by a
hash of its tokens and of all before them, so that sequences with the same beginning share it. A page that
nobody holds keeps its content until its room is needed; the one that was free for longest goes first.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PAGE_SIZE = 16  # tokens; the least that the kernels take, so that little is left over and much can be shared


@dataclass
class Held:
    """The pages of one sequence, in the order of its tokens.

    Attributes:
        pages: their numbers.
        num_shared: tokens whose keys and values were there already.
    """

    pages: list[int]
    num_shared: int
    _names: list[bytes] = field(default_factory=list)  # of the pages that are known


class Pages:
    """The bookkeeping of `count` pages. It knows no tensor."""

    def __init__(self, count: int):
        self.count = count
        self._unused = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and held by nobody, the oldest first
        self._holders: Counter[int] = Counter()
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_held(self) -> int:
        """Pages that a sequence holds."""
        return self.count - len(self._unused) - len(self._idle)

    def hold(self, tokens: Sequence[int], length: int, may_share: bool = True) -> Held | None:
        """Pages for a sequence that will have `length` tokens.

        Args:
            tokens: its prompt. At least the last token is not shared: its result is what the sequence needs.
            may_share: False: all tokens are to be computed.

        Returns:
            None if there is no room now. Nothing changes then.
        """
        names = []
        if may_share:
            for name in _names(tokens[:-1]):
                if name not in self._page_of:
                    break
                names.append(name)
        shared = [self._page_of[name] for name in names]
        needed = num_pages(length) - len(shared)
        if needed > len(self._unused) + len(self._idle) - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
        pages = shared + [self._take() for _ in range(needed)]
        self._holders.update(pages)
        return Held(pages, len(shared) * PAGE_SIZE, names)

    def publish(self, held: Held, tokens: Sequence[int]) -> None:
        """Make known the full pages of a sequence whose first `tokens` are computed."""
        start = len(held._names)
        for index, name in enumerate(_names(tokens, held._names), start=start):
            held._names.append(name)
            if name not in self._page_of:
                page = held.pages[index]
                self._page_of[name], self._name_of[page] = page, name

    def release(self, held: Held) -> None:
        """Give back the pages of a sequence. Known ones can be shared until their room is needed."""
        for page in reversed(held.pages):  # the end of a text goes before its beginning
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._name_of:
                self._idle[page] = None
            else:
                self._unused.append(page)
        held.pages = []

    def _take(self) -> int:
        if self._unused:
            return self._unused.pop()
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._name_of.pop(page)]
        return page


def num_pages(num_tokens: int) -> int:
    """Pages for so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


def _names(tokens: Sequence[int], known: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The name of each full page, a hash of all tokens up to its end, from the first that is not known."""
    name = known[-1] if known else b""
    for start in range(len(known) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        page = array("q", tokens[start : start + PAGE_SIZE]).tobytes()
        name = hashlib.blake2b(name + page, digest_size=16).digest()
        yield name
