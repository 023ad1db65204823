"""FASTWORKER_COLLECTIONS and FASTWORKER_ACCOUNTS before the stream: what workers would leave out takes no place there.

Only on streams that nobody else reads, by their groups and the consumers of ours; until that is known nothing is left
out. Deletes stay, and every event that is no commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

import msgspec

from fastworker.config import Config
from fastworker.errors import Reason, StoreUnavailable, Unreachable
from fastworker.event import Commit
from fastworker.reader.stats import ReaderStats
from fastworker.store.admin import followed
from fastworker.store.chosen_accounts import FOLLOWS, keep_reading, read_accounts
from fastworker.table.chosen import is_account_left_out, is_choosing, is_left_out

log = logging.getLogger(__name__)

UNKNOWN: Final = "it is not known yet who reads it"


class Filter:
    """`others`: who reads the stream beside the workers, None for nobody."""

    def __init__(self, settings: Config, others: Callable[[], Awaitable[str | None]], stats: ReaderStats) -> None:
        self._settings = settings
        self._others = others
        self._stats = stats
        self.why_not: str | None = UNKNOWN  # nothing is left out

    def kept(self, commit: Commit) -> Commit:
        """The commit itself where nothing of it is left out; else what is kept of it, maybe no op."""
        # mutant: the reader filters what others read
        if self.why_not is not None:
            return commit
        is_stranger = is_account_left_out(commit.repo)
        # mutant: the reader leaves deletes out
        ops = [op for op in commit.ops if op.action == "delete" or not (is_stranger or is_left_out(op.collection))]
        if len(ops) == len(commit.ops):
            return commit
        reason = Reason.FILTERED_ACCOUNT if is_stranger else Reason.FILTERED
        self._stats.drops[reason] += len(commit.ops) - len(ops)
        return msgspec.structs.replace(commit, ops=ops)

    async def look(self) -> None:
        """Who reads the stream. Raises StreamUnavailable."""
        why_not = await self._others()
        if why_not != self.why_not:
            so = "what they leave out is not put on" if why_not is None else f"everything is put on: {why_not}"
            log.info("FASTWORKER_COLLECTIONS and FASTWORKER_ACCOUNTS: %s %s", so, self._settings.stream_key)
        self.why_not = why_not


def filter_of(settings: Config, others: Callable[[], Awaitable[str | None]], stats: ReaderStats) -> Filter | None:
    """None: everything is kept."""
    return Filter(settings, others, stats) if is_choosing() or settings.accounts is not None else None


@contextlib.asynccontextmanager
async def choosing(settings: Config) -> AsyncIterator[None]:
    """The accounts are read, and read again. Raises ConfigError for a file that is none."""
    chosen, url = settings.accounts, settings.database_url
    if chosen is None:
        yield
        return
    if chosen.startswith(FOLLOWS) and url is None:
        log.warning("FASTWORKER_ACCOUNTS=%s has no effect here: the reader knows it with DATABASE_URL only", chosen)
        yield
        return

    async def ask(dids: Sequence[str]) -> list[str]:
        try:
            return await followed(url or "", dids)
        except Unreachable as error:
            raise StoreUnavailable(str(error)) from error

    try:
        await read_accounts(chosen, ask)
    except StoreUnavailable as error:
        log.warning("FASTWORKER_ACCOUNTS: nothing is left out until PostgreSQL answers: %s", error)
    reading = asyncio.create_task(keep_reading(chosen, ask))
    try:
        yield
    finally:
        reading.cancel()
