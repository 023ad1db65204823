"""Which collections and whose records are kept at all, where an operator has chosen some. Collections are decided once,
when a process starts, accounts again and again. And what of a repository is looked at, where only a part is wanted.

Only what a record says is left out: deletes, `#account` and `#identity` are always taken, so that nothing outlives its
end when the choice was wider before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, NamedTuple

from fastworker.event.syntax import is_tid

DATED: Final = frozenset(f"app.bsky.feed.{name}" for name in ("post", "like", "repost", "threadgate", "postgate"))
"""Collections of which old records may be left out; the graph and the profile are always whole."""
_is_chosen: Callable[[str], object] | None = None
_accounts: frozenset[str] | None = None


def choose(patterns: Sequence[str]) -> None:
    """NSIDs, in which `*` stands for anything; none: all of them."""
    global _is_chosen  # noqa: PLW0603 - the choice of the whole process, made before its first event
    _is_chosen = _matching(tuple(patterns)) if patterns else None


def is_left_out(collection: str) -> bool:
    return _is_chosen is not None and not _is_chosen(collection)


def choose_accounts(dids: frozenset[str] | None) -> None:
    """None: everybody."""
    global _accounts  # noqa: PLW0603 - the choice of the whole process
    _accounts = dids


def chosen_accounts() -> frozenset[str] | None:
    """None: everybody."""
    return _accounts


def is_account_left_out(did: str) -> bool:
    return _accounts is not None and did not in _accounts


def added_to(before: Sequence[str], now: Sequence[str]) -> tuple[str, ...] | None:
    """Patterns of `now` that hold more than `before` (none of either: all). None: everything is added."""
    if not now:
        return None if before else ()
    is_there = _matching(tuple(before)) if before else None
    return tuple(one for one in now if is_there is not None and not is_there(one))


def is_choosing() -> bool:
    """Whether any collection is left out."""
    return _is_chosen is not None


@cache
def _matching(patterns: tuple[str, ...]) -> Callable[[str], object]:
    words = "|".join(re.escape(one).replace(r"\*", ".*") for one in patterns)
    return re.compile(words).fullmatch


class Part(NamedTuple):
    """A part of a repository: what lies outside of it is not looked at, neither written nor deleted.

    `since_rev`: a TID; of DATED records those whose key is older are outside. `collections`: NSIDs in which `*` stands
    for anything; None: all.
    """

    since_rev: str | None = None
    collections: tuple[str, ...] | None = None

    def has(self, collection: str) -> bool:
        """Whether any of its records is in it."""
        return self.collections is None or bool(_matching(self.collections)(collection))

    def covers(self, collection: str, rkey: str) -> bool:
        if not self.has(collection):
            return False
        # mutant: days ignored
        return self.since_rev is None or collection not in DATED or not is_tid(rkey) or rkey >= self.since_rev


WHOLE: Final = Part()
