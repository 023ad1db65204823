"""What was added to FASTWORKER_COLLECTIONS or FASTWORKER_ACCOUNTS is fetched, since it was left out before.

What is kept is compared with `fastworker.backfill` and `fastworker.kept_accounts`: collections once by each process,
since they are decided at its start; accounts whenever they change. The queue comes first, then what is kept: a killed
process's work is done once more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final

from fastworker.config import Config
from fastworker.store.chosen_accounts import READ_S, read_accounts
from fastworker.store.repos import CHOSEN, WIDENED, Queue, Wanted
from fastworker.sync.choice import PIECE, Choice, known
from fastworker.sync.history import a_turn
from fastworker.sync.many import Scene
from fastworker.sync.report import Report
from fastworker.table.chosen import Part, added_to, chosen_accounts

log = logging.getLogger(__name__)

ALL_HAVE_READ_S: Final = 2 * READ_S
"""By then every process has the new accounts, and no later event of theirs is left out."""
_KEPT: Final = "SELECT collections, is_everybody, is_widening FROM fastworker.backfill"
_NEW: Final = """
SELECT c.did FROM unnest($1::varchar[]) AS c (did)
WHERE NOT EXISTS (SELECT FROM fastworker.kept_accounts AS k WHERE k.did = c.did)
"""
_FORGET: Final = "DELETE FROM fastworker.kept_accounts WHERE did <> ALL ($1::varchar[])"
_KEEP: Final = "INSERT INTO fastworker.kept_accounts SELECT unnest($1::varchar[]) ON CONFLICT DO NOTHING"
_OPEN: Final = f"""
SELECT EXISTS (SELECT FROM fastworker.repos WHERE state IN ('waiting', 'fetching') AND reason = '{WIDENED}')
"""


class Widening:
    """Of one process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._part = Choice(days=max(0, config.backfill_days or 0) or None)
        self._has_seen_collections = False
        self._seen: tuple[frozenset[str] | None] | None = None

    async def look(self, queue: Queue) -> bool:
        """Whether something that was added waits to be fetched. Raises ConfigError, StoreUnavailable."""
        if self._config.accounts is not None:
            await read_accounts(self._config.accounts, queue.followed)
        row = (await queue.rows(_KEPT))[0]
        if not self._has_seen_collections:
            await self._collections(queue, row["collections"])
            self._has_seen_collections = True
        accounts = chosen_accounts()
        if self._seen != (accounts,):
            await self._accounts(queue, row["is_everybody"], accounts)
            self._seen = (accounts,)
        return bool(await queue.value("SELECT is_widening FROM fastworker.backfill"))

    async def _collections(self, queue: Queue, before: list[str] | None) -> None:
        now = self._config.collections
        added = () if before is None else added_to(before, now)
        if added is None or added:
            log.info("FASTWORKER_COLLECTIONS has more than before: what was left out is fetched (%s)", added or "all")
            await self._everybody(queue, self._part._replace(collections=added).part)
        if before is None or list(now) != before:
            await queue.execute("UPDATE fastworker.backfill SET collections = $1::text[]", list(now))

    async def _accounts(self, queue: Queue, was_everybody: bool | None, now: frozenset[str] | None) -> None:
        if now is None:
            if was_everybody is False:
                log.info("FASTWORKER_ACCOUNTS has everybody now: what was left out is fetched")
                await self._everybody(queue, self._part.part)
            dids: list[str] = []
        else:
            dids = sorted(now)
            new = [row[0] for row in await queue.rows(_NEW, dids)]
            if new and was_everybody is False:
                log.info("FASTWORKER_ACCOUNTS has %d more: what was left out of theirs is fetched", len(new))
                await self._put(queue, new, self._part.part, ALL_HAVE_READ_S)
        await queue.execute(_KEEP, dids)
        await queue.execute(_FORGET, dids)
        await queue.execute("UPDATE fastworker.backfill SET is_everybody = $1", now is None)

    async def _everybody(self, queue: Queue, part: Part) -> None:
        """All who are kept: of the network those who are known."""
        chosen = chosen_accounts()
        if chosen is not None:
            await self._put(queue, chosen, part)
            return
        async for piece in known(queue):
            await self._put(queue, piece, part)

    async def _put(self, queue: Queue, dids: Collection[str], part: Part, after_s: float = 0.0) -> None:
        wanted = [Wanted(did) for did in dids]
        for start in range(0, len(wanted), PIECE):
            piece = wanted[start : start + PIECE]
            await queue.put(piece, WIDENED, CHOSEN, again=True, part=part, after_s=after_s)
            await queue.execute("UPDATE fastworker.backfill SET is_widening = true")


async def fetch_widened(scene: Scene, report: Report, stop: asyncio.Event) -> None:
    """For a while, or until it is done."""
    await a_turn(scene, report, stop, CHOSEN)
    if not stop.is_set() and not await scene.queue.value(_OPEN):
        await scene.queue.execute("UPDATE fastworker.backfill SET is_widening = false")
        log.info("What was added to the choice is fetched")
