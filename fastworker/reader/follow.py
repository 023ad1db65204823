"""Which relay is read, from where, and when a connection is given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC
from typing import Final, TypeVar

from fastworker.config import Config
from fastworker.errors import Reason, StreamUnavailable
from fastworker.process.backoff import Backoff, pause
from fastworker.process.outage import Outage
from fastworker.reader.dashboard import Dashboard
from fastworker.reader.gate import SEQ_JUMP
from fastworker.reader.receive import Receiver, TooFar
from fastworker.reader.relay import RelayAddress, RelayLost, RelayRefused, Subscription, subscribe
from fastworker.reader.silence import SilenceWatch
from fastworker.reader.stats import ReaderStats
from fastworker.stream.feed import Feed
from fastworker.stream.slots import Position
from fastworker.table.dates import parse_date

T = TypeVar("T")
log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # between two looks at how a connection does
FAILURES_BEFORE_NEXT_RELAY: Final = 3
PATIENCE_S: Final = 5.0
"""A relay that asks us to stay away for longer is left for the next one, if there is one."""
BEHIND_S: Final = 60.0
BEHIND_FRAMES: Final = 10
"""So many frames at or below the cursor in so long, and none beyond: the relay is called again."""


class Follower:
    def __init__(
        self,
        settings: Config,
        stop: asyncio.Event,
        feed: Feed,
        stats: ReaderStats,
        receiver: Receiver,
        dashboard: Dashboard,
        stored_seq: Callable[[str], Awaitable[int | None]],
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._feed = feed
        self._stats = stats
        self._receiver = receiver
        self._gate = receiver.gate
        self._dashboard = dashboard
        self._stored_seq = stored_seq
        self._relays = [RelayAddress.parse(url) for url in settings.relay_urls]
        self.relay = self._relays[0]
        self._silence = SilenceWatch(settings.silence_floor_s)
        self._away: dict[str, float] = {}  # host -> when it may be called again, as it asked for
        self._new_at = 0.0  # when a frame beyond the cursor came last, or the connection was made
        self._duplicates = 0  # stats.duplicates then
        self._behind_s = BEHIND_S

    async def run(self) -> None:
        """Stay connected to the relay at hand; after several failures in a row go on to the next one."""
        backoff = Backoff(0.5, 64.0)
        failures = 0
        while not self._stop.is_set():
            relay, seq, at_least, leave = self.relay, self._receiver.last_seq, 0.0, False
            try:
                await self._follow(relay)
                continue  # stopped, or redirected to another sequence space
            except RelayRefused as refused:
                error, at_least = f"{relay.host}: {refused}", refused.at_least
                leave = at_least > PATIENCE_S or refused.silent
            except RelayLost as lost:
                error = f"{relay.host}: {lost}"
                leave = lost.silent
                if lost.oversized and self._receiver.last_seq is not None and self._gate.skip < SEQ_JUMP:
                    log.warning("%s; it is passed over", error)
                    self._pass_over()
                    self._stats.connected = False
                    await pause(0.1, self._stop)
                    continue
            except TooFar:
                self._stats.connected = False
                await pause(0.1, self._stop)
                continue
            self._stats.connected = False
            self._stats.last_error = error
            if self._receiver.last_seq != seq:  # it brought something new
                backoff.reset()
                failures, self._behind_s = 0, BEHIND_S
            failures += 1
            self._away[relay.host] = time.monotonic() + at_least
            if (failures >= FAILURES_BEFORE_NEXT_RELAY or leave) and len(self._relays) > 1:
                following = (self._relays.index(relay) + 1 if relay in self._relays else 0) % len(self._relays)
                self.relay, failures = self._relays[following], 0
                at_least = self._away.get(self.relay.host, 0.0) - time.monotonic()
                log.warning("%s; going on to %s", error, self.relay.host)
            else:
                log.warning("%s; connecting again (attempt %d)", error, backoff.attempts + 1)
            self._stats.reconnects += 1
            await backoff.wait(self._stop, at_least)

    def _pass_over(self) -> None:
        if self._receiver.gap is None:
            self._receiver.note_gap("oversized")
            self._receiver.drop(Reason.OVERSIZED)
        self._gate.pass_over()

    async def _follow(self, relay: RelayAddress) -> None:
        """One connection, from the cursor, until it ends (RelayLost), is refused (RelayRefused), or we stop."""
        await until(self._stop, self._receiver.outbox.drained())  # so that the stored cursor is the newest
        if self._stop.is_set():
            return
        position = await until(self._stop, self._go_to(relay))
        if position is None:
            return
        cursor = position.seq if position.seq is None else position.seq + self._gate.skip
        subscription = await until(self._stop, subscribe(relay, cursor))
        if subscription is None:
            return
        try:
            if subscription.host != relay.host:
                log.info("%s redirects to %s", relay.host, subscription.host)
                asked, position = position.seq, await self._go_to(subscription.address)
                if position.seq != asked:
                    self.relay = subscription.address
                    return
            if position.switched_from is not None and position.seq is None:
                # Its whole window may be days; an operator who wants it sets fastworker:cursor:<host> to 0.
                self._receiver.note_gap("relay_switch", switched_from=position.switched_from)
            await self._receive_until_stop(subscription, cursor)
        finally:
            await subscription.close()

    async def _seq_without_cursor(self, host: str) -> int | None:
        """Redis has no cursor: nobody ever read from this relay, or Redis came back empty."""
        seq = await self._stored_seq(host)
        if seq is not None:
            log.info("Redis has no cursor: going on from what is known to be stored, %d", seq)
        elif self._stats.last_seq is not None and self._stats.relay == host:
            seq = self._stats.last_seq
            log.error(
                "Redis came back empty. What was unread is lost: a gap up to %d, recorded in fastworker:gaps", seq
            )
            self._receiver.note_gap("stream_lost")
            assert self._receiver.gap is not None
            self._receiver.gap["after"] = None
        return seq

    async def _seq_of_partition_lost(self, host: str, cursor: int | None) -> int | None:
        """A node of a Cluster came back empty: the others have everything up to the cursor."""
        seq = await self._stored_seq(host)
        if seq is None or cursor is None:
            log.error(
                "A partition came back empty. What was unread in it is lost: a gap up to %s, recorded in "
                "fastworker:gaps", cursor,
            )  # fmt: skip
            self._receiver.note_gap("stream_lost")
            assert self._receiver.gap is not None
            self._receiver.gap["after"] = None
            return cursor
        log.warning("A partition came back empty: going on from what is known to be stored, %d", min(seq, cursor))
        return min(seq, cursor)

    async def _go_to(self, relay: RelayAddress) -> Position:
        """Make `relay` the sequence space that is read, and say where to begin there."""
        backoff, outage = Backoff(0.1, 5.0), Outage("Redis")
        while True:
            try:
                position = await self._feed.go_to(relay.host)
                outage.look(None)
                break
            except StreamUnavailable as error:
                self._stats.last_error = str(error)
                outage.look(str(error), "the reader waits")
            await asyncio.sleep(backoff.next())
        if position.seq is None and position.switched_from is None:
            position = Position(await self._seq_without_cursor(relay.host), None)
        if position.is_partial:
            position = Position(await self._seq_of_partition_lost(relay.host, position.seq), None)
        if position.switched_from is not None:
            self._gate.no_skip()
        self._receiver.last_seq = self._stats.last_seq = position.seq
        self._receiver.places = self._feed.places
        self._stats.relay = relay.host
        return position

    async def _receive_until_stop(self, subscription: Subscription, cursor: int | None) -> None:
        self._stats.connected = True
        self._gate.doubted = None
        self._new_at, self._duplicates = time.monotonic(), self._stats.duplicates
        self._silence.opened(self._new_at)
        log.info("Connected to %s (%s)", subscription.host, "live" if cursor is None else f"cursor: {cursor}")
        receiving = asyncio.create_task(self._receiver.run(subscription), name="reader-receive")
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while not self._stop.is_set():
                events, seq = self._receiver.events, self._receiver.last_seq
                await asyncio.wait({receiving, stopping}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    receiving.result()
                self._judge_silence(self._receiver.events - events)
                self._judge_distance(came=self._receiver.last_seq != seq)
        finally:
            for task in (receiving, stopping):
                task.cancel()
            await asyncio.gather(receiving, stopping, return_exceptions=True)
            self._stats.connected = False

    def _judge_silence(self, frames: int) -> None:
        now, watch, stats = time.monotonic(), self._silence, self._stats
        if self._receiver.outbox.blocked:
            watch.deaf(now)
        watch.saw(now, frames)
        if frames:
            stats.last_frame_at = time.time()
        stats.mean_gap_s = watch.mean_gap_s
        stats.silent_s = watch.without_data_s(now)
        stats.silent = watch.is_silent(now)
        if self._dashboard.recent and (at := parse_date(self._dashboard.recent[-1][1].time or "")) is not None:
            stats.last_event_at = at.replace(tzinfo=UTC).timestamp()
        limit = watch.limit_s()
        if len(self._relays) > 1 and watch.mean_gap_s is None:
            limit = self._settings.silence_floor_s
        if watch.silent_for(now) > limit:
            silent_s = watch.silent_for(now)
            watch.gave_up(now)
            raise RelayLost(f"no events for {silent_s:.0f} s, though it is connected", silent=True)

    def _judge_distance(self, *, came: bool) -> None:
        """A relay that sends only what lies behind the cursor: it started over, or the cursor is wrong. It is called
        again, because one that keeps to the protocol then says FutureCursor; each time with twice the patience, because
        one that replays its whole window first gets there in the end."""
        now, stats = time.monotonic(), self._stats
        if came or self._receiver.outbox.blocked:
            self._new_at, self._duplicates = now, stats.duplicates
        if came:
            self._behind_s = BEHIND_S
        is_behind = stats.duplicates - self._duplicates >= BEHIND_FRAMES
        stats.behind_s = now - self._new_at if is_behind else 0.0
        if stats.behind_s > self._behind_s:
            self._behind_s *= 2
            raise RelayLost(
                f"everything it sent for {stats.behind_s:.0f} s lies behind the cursor {self._receiver.last_seq}: "
                "did it start over? Where the cursor jumped, fastworker:gaps says from where"
            )


async def until(stop: asyncio.Event, awaitable: Awaitable[T]) -> T | None:
    """The result, or None when stopped before."""
    task = asyncio.ensure_future(awaitable)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)
