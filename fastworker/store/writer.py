"""What the flushes of one process share: what is derived, which users are known, how rows are carried."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from fastworker.crashpoint import Step, crashpoint
from fastworker.errors import StoreUnavailable
from fastworker.store.rules import Rules
from fastworker.store.session import RETRYABLE

ATTEMPTS_MAX = 20  # deadlocks and serialisation failures of one transaction; each resolves one writer
CROWD = 2_000  # replies of a thread that are recomputed at once; those of a larger one in such pieces, by `maintain`
KNOWN_USERS_MAX = 32_768  # DIDs a process remembers as committed, about 6 MB
COPY_ROWS_MIN = 200  # fewer go as one array: a COPY is two round trips more; see docs/performance.md
SMALL_FLUSH = 200  # changes; a larger flush makes others wait longer, so it takes their locks later
PAUSE_MIN, PAUSE_MAX = 5, 320  # transactions without COPY after another writer was found to write the same rows
# Before each new attempt at rows that another flush has locked; after the last one they are waited for.
LATER_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
_T = TypeVar("_T")


class Copying:
    """Whether rows may go by COPY. It fails when another writer has one of them, and costs the transaction then.

    After a failure it pauses for some transactions; failures that follow each other make the pauses longer.
    """

    def __init__(self) -> None:
        self.rows_min = COPY_ROWS_MIN
        self.pause = 0  # transactions to go without COPY
        self._next_pause = PAUSE_MIN

    def may(self, rows: int) -> bool:
        return rows >= self.rows_min and not self.pause

    def failed(self) -> None:
        self.pause, self._next_pause = self._next_pause, min(PAUSE_MAX, 4 * self._next_pause)

    def committed(self) -> None:
        """A transaction ended well: the pause, or the next one, is shorter by one."""
        if self.pause:
            self.pause -= 1
        elif self._next_pause > PAUSE_MIN:
            self._next_pause = max(PAUSE_MIN, self._next_pause - 1)


class Writer:
    """State that outlives a flush, but not the process. Nothing here is needed for a right result, only for speed."""

    def __init__(self, rules: Rules) -> None:
        self.derive = rules.derive
        self.trusted = {did: place for place, did in enumerate(rules.trusted_verifiers)}
        self.verified_only = rules.verified_only
        self.many_relays = False  # seq alone orders nothing, and what has no rev is older than what has one
        self.copying = Copying()
        self.whole_rows_max = SMALL_FLUSH  # changes of a flush that may go as one call; 0: none does
        self.crowd = CROWD
        self.later_s: tuple[float, ...] = LATER_S
        self.known: dict[str, None] = {}  # DIDs whose users row is committed
        self.relays: set[str] = set()  # hosts that are in fastworker.relays
        self.conflicts = 0  # transactions begun again because another writer came first
        self.counted = (
            "reply_counts" in rules.derive,
            "quotes" in rules.derive,
        )  # counters beside those of likes, as routines ask
        self.read_before: datetime | None = None  # new notifications of records that are older come in read
        self.unread: set[str] = set()  # of these, those that are to be marked after the commit
        self.on_step: Callable[[Step], Awaitable[None]] | None = None  # for tests that hold a writer at a step

    async def reach(self, step: Step) -> None:
        crashpoint(step)
        if self.on_step is not None:
            await self.on_step(step)

    def forget(self) -> None:
        """Another server may be behind the next connection."""
        self.known.clear()
        self.relays.clear()

    def unknown(self, dids: Iterable[str]) -> list[str]:
        # mutant: unsorted users
        return sorted(did for did in dids if did not in self.known)

    def remember(self, users: Sequence[str]) -> None:
        """They are committed."""
        if len(self.known) + len(users) > KNOWN_USERS_MAX:
            self.known.clear()
        self.known.update(dict.fromkeys(users[:KNOWN_USERS_MAX]))

    async def retry(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Run a transaction again that lost a deadlock: the order of locks makes that rare, not impossible.

        Raises StoreUnavailable after `ATTEMPTS_MAX` of them.
        """
        for attempt in range(ATTEMPTS_MAX):
            try:
                return await work()
            except RETRYABLE as error:
                self.conflicts += 1
                if attempt + 1 == ATTEMPTS_MAX:
                    raise StoreUnavailable(f"PostgreSQL: {error} ({ATTEMPTS_MAX} attempts)") from error
                await asyncio.sleep(random.uniform(0, 0.01 * 2 ** min(attempt, 6)))
        raise AssertionError


def columns(rows: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows to one array per column, as unnest takes them."""
    return list(zip(*rows, strict=True))


def halves(rows: list[_T]) -> tuple[list[_T], list[_T]]:
    middle = len(rows) // 2
    return rows[:middle], rows[middle:]
