"""History that the environment asks for by `BACKFILL_DAYS` and `FASTWORKER_BACKFILL`, once for each database.

What was asked for, and whether it is done, is in `fastworker.backfill`. The work itself is the queue's, with the lowest
priority: any process that works on it may do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fastworker.config import Config, asks_for_history
from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store.repos import EVERYBODY, Queue
from fastworker.sync.choice import REASON, Choice, feed_of
from fastworker.sync.many import Scene, Work, settle_all
from fastworker.sync.report import Report, unless_stopped

log = logging.getLogger(__name__)

TURN_S: Final = 60.0
"""Of history at a time; then repairs and samples have theirs."""
TRIES: Final = 5
_ASK: Final = """
UPDATE fastworker.backfill SET asked = coalesce(asked, $1), asked_at = coalesce(asked_at, now())
RETURNING asked, fed_at IS NOT NULL AS is_fed, done_at IS NOT NULL AS is_done
"""
_OPEN: Final = "SELECT count(*) FROM fastworker.repos WHERE state IN ('waiting', 'fetching') AND reason = $1"
# The row that the predecessor's backfill keeps for its dashboard: how many accounts are done.
_SHOW: Final = """
INSERT INTO public.firehose_cursor (service, cursor, last_event_time, updated_at)
SELECT 'backfill', count(*)::text, (now() AT TIME ZONE 'UTC'), (now() AT TIME ZONE 'UTC') FROM fastworker.repos
WHERE reason = $1 AND state NOT IN ('waiting', 'fetching')
ON CONFLICT (service) DO UPDATE SET cursor = excluded.cursor, last_event_time = excluded.last_event_time,
    updated_at = excluded.updated_at
"""
_said: set[str] = set()


def asked_for(config: Config) -> Choice | None:
    """What the variables ask for; None: nothing."""
    if not asks_for_history(config):
        return None
    days = config.backfill_days if config.backfill_days is not None and config.backfill_days > 0 else None
    whom = config.backfill or "known"
    if whom == "known":
        return Choice(known=True, days=days)
    return Choice(follows_of=tuple(whom.partition(":")[2].split(",")), days=days)


def words_of(config: Config) -> str:
    days = config.backfill_days
    return f"FASTWORKER_BACKFILL={config.backfill or 'known'} BACKFILL_DAYS={-1 if days is None else days}"


async def is_wanted(queue: Queue, config: Config) -> bool:
    """Whether there is history to fetch. The first time, that is recorded."""
    if asked_for(config) is None:
        return False
    row = (await queue.rows(_ASK, words_of(config)))[0]
    if row["asked"] != words_of(config):
        _say_once(
            f"{words_of(config)} has no effect: this database was asked for {row['asked']} before, and that once; "
            "`fastworker backfill` fetches more"
        )
    return not row["is_done"]


async def fetch_some(scene: Scene, report: Report, stop: asyncio.Event) -> None:
    """For a while, or until it is done. Raises what the engine raises."""
    choice = asked_for(scene.config)
    if choice is None:
        return
    row = (await scene.queue.rows(_ASK, words_of(scene.config)))[0]
    feed: Callable[[], Awaitable[None]] | None = None
    if not row["is_fed"]:
        log.info("History begins: %s", row["asked"])
        feed = _fed(scene, feed_of(scene, choice, report))
        if not choice.follows_of:  # they are only put into the queue
            if not await unless_stopped(_awaited(feed), stop):
                return
            feed = None
    await a_turn(scene, report, stop, EVERYBODY, feed)
    await _show(scene.queue)
    if not stop.is_set() and await scene.queue.value(_OPEN, REASON) == 0:
        done = await scene.queue.execute(
            "UPDATE fastworker.backfill SET done_at = now() WHERE fed_at IS NOT NULL AND done_at IS NULL"
        )
        if done.endswith(" 1"):
            log.info("History is done: %s", row["asked"])


async def a_turn(
    scene: Scene,
    report: Report,
    stop: asyncio.Event,
    priority_max: int,
    feed: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """For TURN_S, or until nothing is left that may be tried now."""
    turn = asyncio.Event()
    ending = asyncio.create_task(_end_turn(stop, turn))
    try:
        await settle_all(scene, report, Work(priority_max=priority_max, tries=TRIES, waits=False), turn, feed=feed)
    finally:
        ending.cancel()
        await asyncio.wait({ending})


def _fed(scene: Scene, everybody: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    async def feed() -> None:
        await everybody()
        await scene.queue.execute("UPDATE fastworker.backfill SET fed_at = now()")

    return feed


async def _awaited(feed: Callable[[], Awaitable[None]]) -> None:
    await feed()


async def _end_turn(stop: asyncio.Event, turn: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TURN_S):
            await stop.wait()
    turn.set()


async def _show(queue: Queue) -> None:
    try:
        await queue.execute(_SHOW, REASON)
    except (StoreUnavailable, RowRejected) as error:
        _say_once(f"The row `backfill` of firehose_cursor, for the old dashboard, is not written: {error}")


def _say_once(words: str) -> None:
    if words not in _said:
        _said.add(words)
        log.info("%s", words)
