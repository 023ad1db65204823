"""The reader: frames of a relay onto the stream, in order, each exactly where the cursor says it is.

    receive -> decode -> encode -> Outbox -> append script (chunk, then cursor)

One task receives, one appends what has gathered meanwhile, one does what is due every second (lease, trimming,
dashboard, log). A frame is in one of three places: not yet acknowledged by the cursor (the relay still has it), in
the outbox, or on the stream. So nothing here has to outlive the process.

Loss of the lease, or a cursor that somebody else moved, ends this reader's turn: what is in the outbox is
thrown away, and the next reader starts from the cursor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

import msgspec
import orjson

from fastworker.config import Config
from fastworker.errors import (
    FastworkerError,
    StoreUnavailable,
    StreamUnavailable,
    Unreachable,
)
from fastworker.process.backoff import Backoff, pause
from fastworker.process.outage import Outage
from fastworker.reader.append import append_all
from fastworker.reader.dashboard import Dashboard
from fastworker.reader.filter import filter_of
from fastworker.reader.follow import Follower, until
from fastworker.reader.levels import Beside, verifying
from fastworker.reader.receive import Receiver
from fastworker.reader.stats import ReaderStats, figures, status_json
from fastworker.redact import redact
from fastworker.stream.client import connect
from fastworker.stream.database import GoBack
from fastworker.stream.feed import Feed, StoreWentBack
from fastworker.stream.others import other_reader
from fastworker.stream.slot import LEASE_MS, ReaderLeaseLost, StreamBroken
from fastworker.stream.slots import PartitionsMayChange

log = logging.getLogger(__name__)

DRAIN_S: Final = 3.0
"""How long a stop waits for the outbox. What stays in it is read again from the cursor."""
TICK_S: Final = 1.0
LOG_S: Final = 5.0
PAGES_S: Final = 10.0
"""Between two times that the pages of the chain's file are given back."""
SETTLE_S: Final = 12.0
"""A cursor that a foreign reader moved must stand still for this long; the predecessor saves it every 5 s."""
START_S: Final = 5.0
"""How long the first connection to Redis may take before the reader gives up with exit code 3."""


ENDS_OF_TERM: Final = (ReaderLeaseLost, StreamBroken, StoreWentBack, PartitionsMayChange)


async def run_reader(
    settings: Config,
    stop: asyncio.Event,
    *,
    stats: ReaderStats | None = None,
    fallback_seq: Callable[[str], Awaitable[int | None]] | None = None,
    note_floor: Callable[[Iterable[str], int], Awaitable[None]] | None = None,
    on_tick: Callable[[ReaderStats], None] | None = None,
) -> None:
    """Read until `stop` is set. Raises FastworkerError when going on is impossible or would do harm.

    `fallback_seq(host)` says, from PostgreSQL, how far that relay's events were stored; it is asked when Redis has no
    cursor, and asked again while it raises StoreUnavailable: to begin at the relay's tip instead would lose what came
    since. `note_floor(streams, seq)` tells PostgreSQL of partitions that begin after this seq. `on_tick` is called
    about every second.
    """
    await _Reader(settings, stop, stats or ReaderStats(), fallback_seq, note_floor, on_tick).run()


class _Reader:
    def __init__(
        self,
        settings: Config,
        stop: asyncio.Event,
        stats: ReaderStats,
        fallback_seq: Callable[[str], Awaitable[int | None]] | None,
        note_floor: Callable[[Iterable[str], int], Awaitable[None]] | None,
        on_tick: Callable[[ReaderStats], None] | None,
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._stats = stats
        self._outage = Outage("Redis")
        self._fallback_seq = fallback_seq
        self._note_floor = note_floor
        self._on_tick = on_tick
        self._redis = connect(settings.redis_url, stream_key=settings.stream_key, client_name="fastworker-reader")
        self._feed = Feed(
            self._redis,
            stream_key=settings.stream_key,
            cursor_key=settings.cursor_key,
            max_stream_len=settings.max_stream_len,
            stream_bytes_max=settings.stream_bytes_max,
            dead_letter_maxlen=settings.dead_letter_maxlen,
            group=settings.group,
            ignore_groups=settings.ignore_groups,
            keep_s=settings.keep_s,
        )
        self._dashboard = Dashboard()
        self._receiver = Receiver(settings, self._feed, stats, self._dashboard)
        others = partial(other_reader, self._redis, settings.stream_key, settings.group)
        self._receiver.filter = filter_of(settings, others, stats)
        self._follower = Follower(settings, stop, self._feed, stats, self._receiver, self._dashboard, self._stored_seq)
        self._changes = 0

    # A reader's life: wait for the lease, serve a term, again.

    async def run(self) -> None:
        started = time.monotonic()
        try:
            await self._reach_redis()
            settle = False
            while await self._take_office(settle=settle):
                try:
                    await self._serve()
                    break
                except StreamBroken:
                    settle = False
                    await until(self._stop, self._go_back())
                except StoreWentBack as told:
                    settle = False
                    await until(self._stop, self._go_back(told.request))
                except PartitionsMayChange:
                    settle = False
                except ReaderLeaseLost as lost:
                    settle = self._stats.standby = True
                    self._stats.last_error = str(lost)
                    log.warning("Stepping back: %s", lost)
        finally:
            self._stats.connected = False
            await self._leave_office()
            await self._redis.aclose()
        seconds = max(time.monotonic() - started, 1e-9)
        log.info(
            "Stopped. Total events: %s (~%s events/sec over %.0fs)",
            f"{self._stats.entries:,}",
            f"{self._stats.entries / seconds:,.0f}",
            seconds,
        )

    async def _reach_redis(self) -> None:
        backoff = Backoff(0.1, 1.0)
        while True:
            try:
                await self._feed.check()
            except StreamUnavailable as error:
                if backoff.elapsed > START_S:
                    raise Unreachable(f"{redact(self._settings.redis_url)}: {error}") from error
                if await backoff.wait(self._stop):
                    return
            else:
                return

    async def _take_office(self, *, settle: bool) -> bool:
        """Wait for the lease (and for a foreign reader to be gone); False when stopped instead."""
        told = False
        backoff = Backoff(0.1, 5.0)
        while not self._stop.is_set():
            try:
                if await self._feed.acquire() and (not settle or await self._cursor_stands_still()):
                    await self._feed.own_cursor()
                    await self._feed.begin_term()
                    await self._open_partitions()
                    self._changes = self._feed.changes
                    self._outage.look(None)
                    self._receiver.empty()
                    self._stats.standby = False
                    return not self._stop.is_set()
                if not told:
                    log.info("Another reader is at work on %s: waiting for it to end", self._settings.stream_key)
                    told = True
                await pause(TICK_S, self._stop)
                backoff.reset()
            except StreamUnavailable as error:
                self._stats.last_error = str(error)
                self._outage.look(str(error), "the reader waits")
                await backoff.wait(self._stop)
        return False

    async def _open_partitions(self) -> None:
        """New ones are known to PostgreSQL before anything is in them: it says from where to resume."""
        partitions = self._settings.partitions
        new, lowest = await self._feed.new_partitions(partitions), await self._feed.lowest_cursor()
        if new and lowest is not None and self._note_floor is not None:
            try:
                await self._note_floor(new, lowest)
            except StoreUnavailable as error:
                log.warning(
                    "PostgreSQL does not know of the new partitions yet (%s): if Redis is lost in the next seconds, "
                    "what is in them is not found", error,
                )  # fmt: skip
        await self._feed.open_partitions(partitions)

    async def _cursor_stands_still(self) -> bool:
        """True when no foreign reader (one that takes no lease) moves the cursor.

        A Redis that restarted or failed over lost some writes, and that explains a cursor by itself.
        """
        if self._feed.changes != self._changes:
            return True
        cursor = await self._feed.peek_cursor()
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            if await pause(TICK_S, self._stop) or not await self._feed.acquire():
                return False
            if await self._feed.peek_cursor() != cursor:
                return False
        return True

    async def _leave_office(self) -> None:
        try:
            if not self._stats.standby:
                await self._feed.publish(
                    status_json(self._stats, self._follower.relay.url),
                    *self._dashboard.take(),
                    stats=figures(self._stats),
                )
            await self._feed.release()
        except (StreamUnavailable, Unreachable) as error:
            log.warning("%s; the lease runs out by itself in %d s", error, LEASE_MS // 1000)

    # While this reader holds the lease: three tasks.

    async def _serve(self) -> None:
        async with verifying(self._settings, self._feed, self._receiver, self._stats) as beside:
            await self._serve_with(beside)

    async def _serve_with(self, beside: Beside) -> None:
        verifier = self._receiver.verifier
        try:
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(work()) for work in beside]
                ticking = tasks.create_task(self._tick(), name="reader-tick")
                appending = tasks.create_task(
                    append_all(self._settings, self._feed, self._receiver.outbox, self._stats, self._outage, verifier),
                    name="reader-append",
                )
                await self._follower.run()
                draining = tasks.create_task(self._receiver.outbox.drained(), name="reader-drain")
                await asyncio.wait({draining, appending}, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
                for task in (draining, appending, ticking, *others):
                    task.cancel()
        except ExceptionGroup as group:
            for error in group.exceptions:
                if isinstance(error, (*ENDS_OF_TERM, FastworkerError)):
                    raise error from None
            raise

    async def _publish(self) -> None:
        shown = self._dashboard.take()
        await self._feed.publish(status_json(self._stats, self._follower.relay.url), *shown, stats=figures(self._stats))

    async def _tick(self) -> None:
        logged = released = time.monotonic()
        count = self._stats.entries
        while True:
            await asyncio.sleep(TICK_S)
            self._stats.outbox_items = self._receiver.outbox.items
            if self._receiver.verifier is not None:
                self._stats.unverified = self._receiver.verifier.aside
            try:
                await self._feed.renew()
                await self._feed.watch()
                if self._receiver.filter is not None:
                    await self._receiver.filter.look()
                result = await self._feed.trim()
                self._stats.trimmed += result.trimmed
                self._stats.held_by = result.held_by
                await self._feed.publish(
                    status_json(self._stats, self._follower.relay.url),
                    *self._dashboard.take(),
                    stats=figures(self._stats),
                )
                self._stats.standby = False
            except StreamUnavailable as error:
                self._stats.standby = True
                self._stats.last_error = str(error)
            if self._on_tick is not None:
                self._on_tick(self._stats)
            now = time.monotonic()
            if self._receiver.verifier is not None and now - released >= PAGES_S:
                released = now
                self._receiver.verifier.chain.release_pages()
            if now - logged >= LOG_S and self._stats.entries != count:
                rate = (self._stats.entries - count) / (now - logged)
                log.info(
                    "Processed %s events (~%s events/sec, cursor: %s)",
                    f"{self._stats.entries:,}",
                    f"{rate:,.0f}",
                    self._stats.last_seq,
                )
                logged, count = now, self._stats.entries

    async def _go_back(self, request: bytes = b"") -> None:
        """Unread entries are gone from the stream: read them, and what was in the outbox, from the relay again.

        `request`: PostgreSQL asked for it: the entries were finished, and it lost them. Or a worker did.
        """
        host, cursor = self._stats.relay, self._stats.last_seq
        gap: dict[str, Any] = {}
        back = msgspec.json.decode(request, type=GoBack) if request else GoBack(None, "", lost=True)
        if not back.lost:
            seq = back.seq if back.relay in ("", host) else None
            reason, what = "store_lost", "PostgreSQL went back, and the stream no longer has all that it lost"
        else:
            seq = await self._stored_seq(host)
            stream, reason = self._settings.stream_key, "stream_lost"
            whose = "Entries that nobody had stored" if request else "Unread entries"
            what = f"{whose} are gone from {stream}: it was deleted, renamed, evicted or trimmed"
        if cursor is None:
            so = ", and there is no cursor either"
        elif seq is None:
            gap = {
                "relay": host,
                "reason": reason,
                "after": None,
                "resumed": cursor,
                "at": int(time.time() * 1000),
            }
            so = f". It is not known from where on: a gap up to {cursor}, recorded in fastworker:gaps"
        elif seq < cursor:
            so = f". The reader goes back from {cursor} to {seq}, up to where they were stored"
        else:
            seq = cursor
            so = f". They were stored, as far as the cursor {cursor}"
        backoff, outage = Backoff(0.1, 5.0), self._outage
        while True:
            try:
                is_done = await self._feed.go_back(seq, orjson.dumps(gap) if gap else b"", request)
            except StreamUnavailable as error:
                self._stats.last_error = str(error)
                outage.look(str(error), "the reader waits")
                await asyncio.sleep(backoff.next())
            else:
                outage.look(None)
                break
        if is_done:  # else the cursor is another reader's, or gone too: the next reader handles it
            log.error("%s%s", what, so)
            self._stats.gaps += bool(gap)

    async def _stored_seq(self, host: str) -> int | None:
        """Up to which seq this relay's events are stored: as PostgreSQL says, if it can be asked, and as we saw."""
        told = None
        backoff, outage = Backoff(0.1, 5.0), Outage("PostgreSQL")
        so = "the cursor is lost, and only PostgreSQL knows it (without DATABASE_URL the reader begins at the tip)"
        while self._fallback_seq is not None:
            try:
                told = await self._fallback_seq(host)
                outage.look(None)
                break
            except StoreUnavailable as error:
                self._stats.last_error = f"The cursor is lost, and PostgreSQL cannot be asked: {error}"
                outage.look(f"{error}; {so}", so)
                await asyncio.sleep(backoff.next())
        return min((seq for seq in (told, self._feed.finished_seq()) if seq is not None), default=None)
