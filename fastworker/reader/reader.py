"""The reader: frames of a relay onto the stream, in order, each exactly where the cursor says it is.

    receive -> decode -> encode -> Outbox -> append script (chunk, then cursor)

One task receives, one appends what has gathered meanwhile, one does what is due every second (lease, trimming,
dashboard, log). A frame is in one of three places: not yet acknowledged by the cursor (the relay still has it), in
the outbox, or on the stream. So nothing here needs to survive a kill.

Loss of the lease, or a cursor that somebody else moved, ends a term of office: what is in the outbox belongs to the
next reader, who starts from the cursor.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC
from typing import Any, Final, Literal, TypeVar

import msgspec
import orjson

from fastworker.errors import (
    FastworkerError,
    InvalidEvent,
    Reason,
    StoppedItself,
    StoreUnavailable,
    StreamUnavailable,
    Unreachable,
)
from fastworker.event import Account, Commit, ErrorFrame, Event, Identity, Info, Sync, Unknown
from fastworker.event.entry import encode_frame_entry, encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.process.backoff import Backoff, pause
from fastworker.process.outage import Outage
from fastworker.reader.relay import RelayAddress, RelayLost, RelayRefused, Subscription, subscribe
from fastworker.redact import redact
from fastworker.stream.client import connect
from fastworker.stream.database import GoBack
from fastworker.stream.feed import (
    ABANDONED_MS,
    LEASE_MS,
    OURS,
    Chunk,
    Feed,
    LeaseLost,
    Position,
    StoreWentBack,
    StreamBroken,
)
from fastworker.table.dates import parse_date

T = TypeVar("T")
log = logging.getLogger(__name__)

LINGER_S: Final = 0.01
"""Least time between two appends: at 1,000 events/s a chunk of ten costs a tenth of ten chunks of one."""
OUTBOX_ITEMS: Final = 8_000
OUTBOX_BYTES: Final = 16_000_000
DRAIN_S: Final = 3.0
"""How long a stop waits for the outbox. What stays in it is read again from the cursor."""
TICK_S: Final = 1.0
TURN_S: Final = 0.008  # of decoding at a stretch, before the loop gets its turn
LOG_S: Final = 5.0
SETTLE_S: Final = 12.0
"""A cursor that a foreign reader moved must stand still for this long; the predecessor saves it every 5 s."""
START_S: Final = 5.0
"""How long the first connection to Redis may take before the reader gives up with exit code 3."""
FAILURES_BEFORE_NEXT_RELAY: Final = 3
PATIENCE_S: Final = 5.0
"""A relay that asks us to stay away for longer is left for the next one, if there is one."""
MALFORMED_IN_A_ROW: Final = 50
SET_ASIDE_PER_MINUTE: Final = 100
"""Malformed frames kept in the dead letters; beyond, they are counted only, so that a broken relay cannot push
the workers' dead letters out."""
SET_ASIDE_BYTES: Final = 65_536
SEQ_JUMP: Final = 10_000_000
"""Relays number events one by one, with small holes: this is hours of the whole network. A frame that jumps so far is
believed when the next one goes on from there (or the relay said OutdatedCursor before); else it is malformed."""
BEHIND_S: Final = 60.0
BEHIND_FRAMES: Final = 10
"""So many frames at or below the cursor in so long, and none beyond: the relay is called again."""
RECENT: Final = 50
BROADCAST_PER_TICK: Final = 20


class _TooFar(Exception):
    """Frames that are good may have been passed over together with one that is too large."""


class ReaderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the reader needs to know; defaults are those of the environment variables."""

    relay_urls: tuple[str, ...] = ("wss://bsky.network",)
    redis_url: str = "redis://localhost:6379"
    stream_key: str = "firehose:events"
    cursor_key: str = "firehose:python_cursor"
    group: str = "firehose-processors"
    """The workers' group: until it exists nothing is trimmed."""
    max_stream_len: int = 500_000
    stream_bytes_max: int | None = None
    stream_format: Literal["json", "native", "frame"] = "json"
    ignore_groups: tuple[str, ...] = ()
    dead_letter_maxlen: int = 10_000
    keep_s: float = 0.0
    """Seconds that finished entries stay on the stream, for `worker --reapply`."""
    silence_floor_s: float = 30.0
    """No silence shorter than this ends a connection."""
    abandoned_ms: int = ABANDONED_MS


class ReaderStats(msgspec.Struct):
    """What the reader did since it started, and how it is; written by the reader only."""

    started_at: float = msgspec.field(default_factory=time.time)
    standby: bool = True
    """Another reader is at work, or Redis cannot be reached: this one waits."""
    connected: bool = False
    relay: str = ""
    last_seq: int | None = None
    """The cursor: the newest seq that is on the stream (or had nothing to store)."""
    last_frame_at: float | None = None
    """Unix time, to about a second."""
    last_event_at: float | None = None
    """Unix time, by the relay's clock, of the newest event: how old the cursor is."""
    last_error: str = ""
    frames: int = 0
    bytes: int = 0
    entries: int = 0
    """Entries that are on the stream."""
    commits: int = 0
    identities: int = 0
    accounts: int = 0
    syncs: int = 0
    duplicates: int = 0
    """Frames at or below the cursor: an inclusive replay brings at least one."""
    empty: int = 0
    """Commits without any op."""
    set_aside: int = 0
    reconnects: int = 0
    gaps: int = 0
    waits_full: int = 0
    """Times that the stream was full."""
    full: bool = False
    held_by: str = ""
    """The group that keeps the stream's oldest entries."""
    trimmed: int = 0
    outbox_items: int = 0
    mean_gap_s: float | None = None
    behind_s: float = 0.0
    """Since when the relay sent only what lies behind the cursor; 0 when it does not."""
    silent_s: float = 0.0
    silent: bool = False
    """No frame for long against the relay's own rate, though connected; a quiet relay is not silent.

    A new connection does not end it, only data do."""
    drops: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(map(str, Reason), 0))
    """Whole frames, by reason. The drops of single ops travel with their entry and are counted by the worker."""


class SilenceWatch:
    """Judges silence by the stream's own rate: a busy relay is silent after seconds, a quiet one after hours.

    The rate is a moving average over the stretches in which data came. A silence that ended a connection counts as a
    gap, too, so that a relay which fell quiet is left in peace after one or two reconnections.
    """

    WEIGHT: Final = 0.1
    UNKNOWN_S: Final = 300.0
    NOTICE_S: Final = 6.0
    """A silence that people are told of: well below what ends a connection."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._since = 0.0
        self._data_at: float | None = None
        self._usual_gap_s: float | None = None  # of data alone: no silence makes a longer one usual
        self.mean_gap_s: float | None = None

    def opened(self, now: float) -> None:
        self._since = now
        if self._data_at is None:
            self._data_at = now

    def saw(self, now: float, frames: int) -> None:
        if frames:
            self._sample((now - self._since) / frames)
            self._usual_gap_s = self.mean_gap_s
            self._since = self._data_at = now

    def deaf(self, now: float) -> None:
        """It is we who do not listen."""
        self._since = self._data_at = now

    def without_data_s(self, now: float) -> float:
        """Seconds since the newest data, over all connections."""
        return 0.0 if self._data_at is None else now - self._data_at

    def is_silent(self, now: float) -> bool:
        usual = self.UNKNOWN_S if self._usual_gap_s is None else max(self.NOTICE_S, 100 * self._usual_gap_s)
        return self.without_data_s(now) > usual

    def gave_up(self, now: float) -> None:
        self._sample(now - self._since)

    def silent_for(self, now: float) -> float:
        return now - self._since

    def limit_s(self) -> float:
        """Seconds without data that end a connection."""
        if self.mean_gap_s is None:
            return max(self._floor_s, self.UNKNOWN_S)
        return max(self._floor_s, 100 * self.mean_gap_s)

    def _sample(self, gap_s: float) -> None:
        known = self.mean_gap_s
        self.mean_gap_s = gap_s if known is None else known + self.WEIGHT * (gap_s - known)


class Outbox:
    """Chunks between the receiver and the appender, bounded; the last one is still being filled."""

    def __init__(self, chunk_items: int, chunk_bytes: int) -> None:
        self._chunk_items = chunk_items
        self._chunk_bytes = chunk_bytes
        self._sealed: deque[Chunk] = deque()
        self._sealed_items = 0
        self._sealed_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.filling = Chunk()
        self.blocked = False

    @property
    def items(self) -> int:
        return self._sealed_items + self.filling.items

    async def put(self) -> None:
        """To be called after something was added to `filling`; waits while there is no room for more."""
        chunk = self.filling
        if not self._wake.is_set():
            self._wake.set()
            self._idle.clear()
        if chunk.items < self._chunk_items and chunk.bytes < self._chunk_bytes:
            return
        self._sealed.append(chunk)
        self._sealed_items += chunk.items
        self._sealed_bytes += chunk.bytes
        self.filling = Chunk()
        if self._sealed_items >= OUTBOX_ITEMS or self._sealed_bytes >= OUTBOX_BYTES:
            self._room.clear()
            self.blocked = True
            await self._room.wait()
            self.blocked = False

    async def take(self) -> Chunk:
        """The oldest chunk, as full as it is by now; waits for the first item."""
        if not self._sealed and self.filling.seq is None and not self.filling.items:
            self._wake.clear()
            self._idle.set()
            await self._wake.wait()
        if not self._sealed:
            chunk, self.filling = self.filling, Chunk()
            return chunk
        chunk = self._sealed.popleft()
        self._sealed_items -= chunk.items
        self._sealed_bytes -= chunk.bytes
        self._room.set()
        return chunk

    @property
    def waiting(self) -> bool:
        """A whole chunk is ready."""
        return bool(self._sealed)

    async def drained(self) -> None:
        """Until everything that was put has been taken and `take` was called again."""
        await self._idle.wait()


async def run_reader(
    settings: ReaderSettings,
    stop: asyncio.Event,
    *,
    stats: ReaderStats | None = None,
    fallback_seq: Callable[[str], Awaitable[int | None]] | None = None,
    on_tick: Callable[[ReaderStats], None] | None = None,
) -> None:
    """Read until `stop` is set. Raises FastworkerError when going on is impossible or would do harm.

    `fallback_seq(host)` says, from PostgreSQL, how far that relay's events were stored; it is asked when Redis has no
    cursor, and asked again while it raises StoreUnavailable: to begin at the relay's tip instead would lose what came
    since. `on_tick` is called about every second.
    """
    await _Reader(settings, stop, stats or ReaderStats(), fallback_seq, on_tick).run()


class _Reader:
    def __init__(
        self,
        settings: ReaderSettings,
        stop: asyncio.Event,
        stats: ReaderStats,
        fallback_seq: Callable[[str], Awaitable[int | None]] | None,
        on_tick: Callable[[ReaderStats], None] | None,
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._stats = stats
        self._outage = Outage("Redis")
        self._fallback_seq = fallback_seq
        self._on_tick = on_tick
        self._relays = [RelayAddress.parse(url) for url in settings.relay_urls]
        self._redis = connect(settings.redis_url, client_name="fastworker-reader")
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
        self._silence = SilenceWatch(settings.silence_floor_s)
        self._outbox = self._new_outbox()
        self._relay = self._relays[0]
        self._last_seq: int | None = None  # newest in the outbox or beyond it
        self._gap: dict[str, Any] | None = None  # to be recorded with the next seq
        # The next connection begins so many seqs further, because of a frame too large to receive: with `low` it still
        # came, with `high` it did not. Between them lie frames that are good.
        self._skip = self._skip_low = self._skip_high = 0
        self._away: dict[str, float] = {}  # host -> when it may be called again, as it asked for
        self._events = 0  # frames with a seq: what else comes is no sign of life
        self._malformed = 0  # in a row
        self._malformed_limit = MALFORMED_IN_A_ROW
        self._doubted: tuple[int, bytes] | None = None  # seq and bytes of a frame that jumped too far
        self._new_at = 0.0  # when a frame beyond the cursor came last, or the connection was made
        self._duplicates = 0  # stats.duplicates then
        self._behind_s = BEHIND_S
        self._set_aside_until = 0.0
        self._set_aside_left = 0
        self._recent: deque[tuple[float, Event]] = deque(maxlen=RECENT)
        self._noted = 0  # events ever put into _recent
        self._broadcast = 0  # of them, at the last broadcast
        self._run_id = ""

    def _new_outbox(self) -> Outbox:
        return Outbox(self._feed.chunk_items, 2_000_000)

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
                    await self._until_stop(self._go_back())
                except StoreWentBack as told:
                    settle = False
                    await self._until_stop(self._go_back(told.request))
                except LeaseLost as lost:
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
                    self._run_id = await self._feed.run_id()
                    self._outage.look(None)
                    self._outbox = self._new_outbox()
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

    async def _cursor_stands_still(self) -> bool:
        """True when no foreign reader (one that takes no lease) moves the cursor.

        A Redis that restarted or failed over lost some writes, and that explains a cursor by itself.
        """
        if await self._feed.run_id() != self._run_id:
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
                await self._feed.publish(self._status(), *self._dashboard(), stats=self._figures())
            await self._feed.release()
        except (StreamUnavailable, Unreachable) as error:
            log.warning("%s; the lease runs out by itself in %d s", error, LEASE_MS // 1000)

    # A term of office: three tasks.

    async def _serve(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                ticking = tasks.create_task(self._tick(), name="reader-tick")
                appending = tasks.create_task(self._append(), name="reader-append")
                await self._follow_relays()
                draining = tasks.create_task(self._outbox.drained(), name="reader-drain")
                await asyncio.wait({draining, appending}, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
                for task in (draining, appending, ticking):
                    task.cancel()
        except ExceptionGroup as group:
            for error in group.exceptions:
                if isinstance(error, LeaseLost | StreamBroken | StoreWentBack | FastworkerError):
                    raise error from None
            raise

    async def _append(self) -> None:
        """Chunk by chunk. A chunk that cannot be put down now is kept and tried again: order is never broken."""
        backoff = Backoff(0.1, 5.0)
        while True:
            chunk = await self._outbox.take()
            begun = time.monotonic()
            while True:
                try:
                    if await self._feed.append(chunk):
                        break
                    await self._make_room()
                except StreamUnavailable as error:
                    self._stats.last_error = str(error)
                    self._outage.look(str(error), f"{self._outbox.items:,} entries wait here, and then at the relay")
                    await asyncio.sleep(backoff.next())
            backoff.reset()
            self._outage.look(None)
            self._stats.full = False
            self._stats.entries += chunk.entries
            if chunk.seq is not None:
                self._stats.last_seq = chunk.seq
            if not self._outbox.waiting:
                await asyncio.sleep(max(0.0, begun + LINGER_S - time.monotonic()))

    async def _make_room(self) -> None:
        """The stream is full: trim what is finished; when nothing is, wait. The outbox fills and receiving stops.

        What dead workers left at its head, while others read on, would hold it full for ever: that is set aside first.
        """
        result = await self._feed.trim(make_room=True)
        self._stats.trimmed += result.trimmed
        self._stats.held_by = result.held_by
        if result.trimmed:
            return
        if not self._stats.full:
            self._stats.full = True
            self._stats.waits_full += 1
            held = f"group {result.held_by!r} is not done with its oldest entries" if result.held_by else "no group"
            log.warning("The stream %s is full (%s): the reader waits", self._settings.stream_key, held)
        if result.held_by == self._settings.group:
            moved, ghosts = await self._feed.set_aside_abandoned(self._settings.abandoned_ms)
            if moved or ghosts:
                self._stats.set_aside += moved
                self._stats.drops[Reason.ABANDONED] += moved
                log.warning("Set aside %d abandoned entries of dead consumers (%d more were trimmed)", moved, ghosts)
                return
        await asyncio.sleep(0.2)

    async def _tick(self) -> None:
        logged, count = time.monotonic(), self._stats.entries
        while True:
            await asyncio.sleep(TICK_S)
            self._stats.outbox_items = self._outbox.items
            try:
                await self._feed.renew()
                await self._feed.watch()
                result = await self._feed.trim()
                self._stats.trimmed += result.trimmed
                self._stats.held_by = result.held_by
                await self._feed.publish(self._status(), *self._dashboard(), stats=self._figures())
                self._stats.standby = False
            except StreamUnavailable as error:
                self._stats.standby = True
                self._stats.last_error = str(error)
            if self._on_tick is not None:
                self._on_tick(self._stats)
            now = time.monotonic()
            if now - logged >= LOG_S and self._stats.entries != count:
                rate = (self._stats.entries - count) / (now - logged)
                log.info(
                    "Processed %s events (~%s events/sec, cursor: %s)",
                    f"{self._stats.entries:,}",
                    f"{rate:,.0f}",
                    self._stats.last_seq,
                )
                logged, count = now, self._stats.entries

    # Relays.

    async def _follow_relays(self) -> None:
        """Stay connected to the relay at hand; after several failures in a row go on to the next one."""
        backoff = Backoff(0.5, 64.0)
        failures = 0
        while not self._stop.is_set():
            relay, seq, at_least, leave = self._relay, self._last_seq, 0.0, False
            try:
                await self._follow(relay)
                continue  # stopped, or redirected to another sequence space
            except RelayRefused as refused:
                error, at_least = f"{relay.host}: {refused}", refused.at_least
                leave = at_least > PATIENCE_S
            except RelayLost as lost:
                error = f"{relay.host}: {lost}"
                leave = lost.silent
                if lost.oversized and self._last_seq is not None and self._skip < SEQ_JUMP:
                    log.warning("%s; it is passed over", error)
                    self._pass_over()
                    self._stats.connected = False
                    await pause(0.1, self._stop)
                    continue
            except _TooFar:
                self._stats.connected = False
                await pause(0.1, self._stop)
                continue
            self._stats.connected = False
            self._stats.last_error = error
            if self._last_seq != seq:  # it brought something new
                backoff.reset()
                failures = 0
            failures += 1
            self._away[relay.host] = time.monotonic() + at_least
            if (failures >= FAILURES_BEFORE_NEXT_RELAY or leave) and len(self._relays) > 1:
                following = (self._relays.index(relay) + 1 if relay in self._relays else 0) % len(self._relays)
                self._relay, failures = self._relays[following], 0
                at_least = self._away.get(self._relay.host, 0.0) - time.monotonic()
                log.warning("%s; going on to %s", error, self._relay.host)
            else:
                log.warning("%s; connecting again (attempt %d)", error, backoff.attempts + 1)
            self._stats.reconnects += 1
            await backoff.wait(self._stop, at_least)

    def _pass_over(self) -> None:
        """A frame too large to receive came: begin further on, and find out how far without losing what is good."""
        if self._gap is None:
            self._note_gap("oversized")
            self._drop(Reason.OVERSIZED)
        self._skip_low = self._skip
        if self._skip_high:
            self._skip = max((self._skip_low + self._skip_high) // 2, self._skip_low + 1)
        else:
            self._skip = max(1, self._skip * 2)

    def _is_too_far(self) -> bool:
        """Whether frames that are good may lie before where we began; if so, begin nearer."""
        if self._skip - self._skip_low <= 1:
            return False
        self._skip_high = self._skip
        self._skip = (self._skip_low + self._skip_high) // 2
        return True

    async def _follow(self, relay: RelayAddress) -> None:
        """One connection, from the cursor, until it ends (RelayLost), is refused (RelayRefused), or we stop."""
        await self._until_stop(self._outbox.drained())  # so that the stored cursor is the newest
        if self._stop.is_set():
            return
        position = await self._until_stop(self._go_to(relay))
        if position is None:
            return
        cursor = position.seq if position.seq is None else position.seq + self._skip
        subscription = await self._until_stop(subscribe(relay, cursor))
        if subscription is None:
            return
        try:
            if subscription.host != relay.host:
                log.info("%s redirects to %s", relay.host, subscription.host)
                asked, position = position.seq, await self._go_to(subscription.address)
                if position.seq != asked:
                    self._relay = subscription.address
                    return
            if position.switched_from is not None and position.seq is None:
                # Its whole window may be days; an operator who wants it sets fastworker:cursor:<host> to 0.
                self._note_gap("relay_switch", switched_from=position.switched_from)
            await self._receive_until_stop(subscription, cursor)
        finally:
            await subscription.close()

    async def _go_back(self, request: bytes = b"") -> None:
        """Unread entries are gone from the stream: the relay may still have them, and what was in the outbox.

        `request`: they were read, and PostgreSQL lost them.
        """
        host, cursor = self._stats.relay, self._stats.last_seq
        gap: dict[str, Any] = {}
        if request:
            back = msgspec.json.decode(request, type=GoBack)
            seq = back.seq if back.relay in ("", host) else None
            reason, what = "store_lost", "PostgreSQL went back, and the stream no longer has all that it lost"
        else:
            seq = await self._stored_seq(host)
            reason = "stream_lost"
            what = (
                f"Unread entries are gone from {self._settings.stream_key}: it was deleted, renamed, evicted or trimmed"
            )
        if cursor is None:
            log.error("%s, and there is no cursor either", what)
        elif seq is None:
            self._stats.gaps += 1
            gap = {
                "relay": host,
                "reason": reason,
                "after": None,
                "resumed": cursor,
                "at": int(time.time() * 1000),
            }
            log.error("%s. It is not known from where on: a gap up to %s, recorded in fastworker:gaps", what, cursor)
        elif seq < cursor:
            log.error("%s. The reader goes back from %d to %d, up to where they were stored", what, cursor, seq)
        else:
            seq = cursor
            log.error("%s. They were stored, as far as the cursor %s", what, cursor)
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                await self._feed.go_back(seq, orjson.dumps(gap) if gap else b"", request)
            except StreamUnavailable as error:
                self._stats.last_error = str(error)
                log.warning("%s; waiting", error)
                await asyncio.sleep(backoff.next())
            else:
                return

    async def _stored_seq(self, host: str) -> int | None:
        """Up to which seq this relay's events are stored: as PostgreSQL says, if it can be asked, and as we saw."""
        told = None
        backoff = Backoff(0.1, 5.0)
        while self._fallback_seq is not None:
            try:
                told = await self._fallback_seq(host)
                break
            except StoreUnavailable as error:
                self._stats.last_error = f"The cursor is lost, and PostgreSQL cannot be asked: {error}"
                log.warning("%s; waiting (without DATABASE_URL the reader begins at the tip)", self._stats.last_error)
                await asyncio.sleep(backoff.next())
        return min((seq for seq in (told, self._feed.finished_seq()) if seq is not None), default=None)

    async def _seq_without_cursor(self, host: str) -> int | None:
        """Redis has no cursor: nobody ever read from this relay, or Redis came back empty."""
        seq = await self._stored_seq(host)
        if seq is not None:
            whose = "PostgreSQL's" if self._fallback_seq is not None else "what the workers had finished"
            log.info("Redis has no cursor: going on from %s, %d", whose, seq)
        elif self._stats.last_seq is not None and self._stats.relay == host:
            seq = self._stats.last_seq
            log.error(
                "Redis came back empty. What was unread is lost: a gap up to %d, recorded in fastworker:gaps", seq
            )
            self._note_gap("stream_lost")
            assert self._gap is not None
            self._gap["after"] = None
        return seq

    async def _go_to(self, relay: RelayAddress) -> Position:
        """Make `relay` the sequence space that is read, and say where to begin there."""
        backoff = Backoff(0.1, 5.0)
        while True:
            try:
                position = await self._feed.go_to(relay.host)
                break
            except StreamUnavailable as error:
                self._stats.last_error = str(error)
                log.warning("%s; waiting", error)
            await asyncio.sleep(backoff.next())
        if position.seq is None and position.switched_from is None:
            position = Position(await self._seq_without_cursor(relay.host), None)
        if position.switched_from is not None:
            self._skip = self._skip_low = self._skip_high = 0
        self._last_seq = self._stats.last_seq = position.seq
        self._stats.relay = relay.host
        return position

    async def _receive_until_stop(self, subscription: Subscription, cursor: int | None) -> None:
        self._stats.connected = True
        self._doubted = None
        self._new_at, self._duplicates = time.monotonic(), self._stats.duplicates
        self._silence.opened(self._new_at)
        log.info("Connected to %s (%s)", subscription.host, "live" if cursor is None else f"cursor: {cursor}")
        receiving = asyncio.create_task(self._receive(subscription), name="reader-receive")
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while not self._stop.is_set():
                events, seq = self._events, self._last_seq
                await asyncio.wait({receiving, stopping}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    receiving.result()
                self._judge_silence(self._events - events)
                self._judge_distance(came=self._last_seq != seq)
        finally:
            for task in (receiving, stopping):
                task.cancel()
            await asyncio.gather(receiving, stopping, return_exceptions=True)
            self._stats.connected = False

    def _judge_silence(self, frames: int) -> None:
        now, watch, stats = time.monotonic(), self._silence, self._stats
        if self._outbox.blocked:
            watch.deaf(now)
        watch.saw(now, frames)
        if frames:
            stats.last_frame_at = time.time()
        stats.mean_gap_s = watch.mean_gap_s
        stats.silent_s = watch.without_data_s(now)
        stats.silent = watch.is_silent(now)
        if self._recent and (at := parse_date(self._recent[-1][1].time or "")) is not None:
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
        if came or self._outbox.blocked:
            self._new_at, self._duplicates = now, stats.duplicates
        is_behind = stats.duplicates - self._duplicates >= BEHIND_FRAMES
        stats.behind_s = now - self._new_at if is_behind else 0.0
        if stats.behind_s > self._behind_s:
            self._behind_s *= 2
            raise RelayLost(
                f"everything it sent for {stats.behind_s:.0f} s lies behind the cursor {self._last_seq}: did it start "
                "over? Where the cursor jumped, fastworker:gaps says from where"
            )

    async def _until_stop(self, awaitable: Awaitable[T]) -> T | None:
        """The result, or None when stopped before."""
        task = asyncio.ensure_future(awaitable)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, stopping):
                each.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    # Frames.

    async def _receive(self, subscription: Subscription) -> None:
        """The hot path: every frame of one connection, in order."""
        stats, outbox, host = self._stats, self._outbox, subscription.host
        form = self._settings.stream_format
        receive, put, clock = subscription.receive, outbox.put, time.perf_counter
        worked_s, began = 0.0, clock()
        while True:
            # While there are frames and room, nothing below gives the loop its turn: lease and heartbeat need it.
            worked_s += clock() - began
            if worked_s >= TURN_S:
                await asyncio.sleep(0)
                worked_s = 0.0
            data = await receive()
            began = clock()
            stats.frames += 1
            stats.bytes += len(data)
            try:
                frame = decode_frame(data, host)
                if isinstance(frame, Info | ErrorFrame):
                    self._told(frame, host)
                    continue
                seq, last = frame.seq, self._last_seq
                if seq is not None:
                    self._events += 1
                    if self._gap is not None and self._is_too_far():
                        raise _TooFar
                if seq is not None and last is not None:
                    if seq <= last:
                        stats.duplicates += 1
                        continue
                    if self._doubted is not None or (last and seq - last > SEQ_JUMP):  # 0: all there is
                        self._judge_jump(seq, last, data, form, host)
                        if self._doubted is not None:
                            continue
                if isinstance(frame, Unknown):
                    self._drop(Reason.UNKNOWN_KIND)
                else:
                    self._put_event(frame, data, form)
            except InvalidEvent as invalid:
                self._put_malformed(data, invalid)
                seq = None
            else:
                self._malformed = 0
            chunk = outbox.filling
            if seq is not None:
                self._last_seq = chunk.seq = seq
                if self._gap is not None:
                    chunk.gap(orjson.dumps({**self._gap, "resumed": seq}))
                    self._gap = None
                    self._skip = self._skip_low = self._skip_high = 0
                self._malformed_limit = MALFORMED_IN_A_ROW
                self._behind_s = BEHIND_S
            await put()
            if self._malformed >= self._malformed_limit:
                # The same ones will come again: next time bear with more of them, or we would never get past.
                self._malformed, self._malformed_limit = 0, self._malformed_limit * 2
                raise RelayLost("too many malformed frames in a row")

    def _judge_jump(self, seq: int, last: int, data: bytes, form: str, host: str) -> None:
        """One absurd seq must not make everything after it a duplicate. The doubted frame waits for the next one; until
        then the cursor stays before it, so that a connection that ends meanwhile loses nothing."""
        if self._doubted is None:
            if self._gap is None:  # else the relay, or we ourselves, have said that something is missing
                self._doubted = (seq, data)
            return
        (high, doubted), self._doubted = self._doubted, None
        if seq <= high:
            log.error("A frame of %s jumps from seq %d to %d, and the next one is %d: malformed", host, last, high, seq)
            self._put_malformed(doubted, InvalidEvent(Reason.BAD_FRAME, f"seq {high} between {last} and {seq}"))
            if seq - last > SEQ_JUMP:
                self._doubted = (seq, data)
            return
        log.error("%s jumps from seq %d to %d and goes on there: a gap, recorded in fastworker:gaps", host, last, high)
        self._note_gap("seq_jump")
        self._outbox.filling.gap(orjson.dumps({**(self._gap or {}), "resumed": high}))
        self._gap = None
        frame = decode_frame(doubted, host)
        assert not isinstance(frame, Info | ErrorFrame)
        if isinstance(frame, Unknown):
            self._drop(Reason.UNKNOWN_KIND)
        else:
            self._put_event(frame, doubted, form)

    def _put_event(self, event: Event, data: bytes, form: str) -> None:
        stats, chunk = self._stats, self._outbox.filling
        if isinstance(event, Commit):
            stats.commits += 1
            if not event.ops and not event.drops:
                stats.empty += 1
                return
            if event.ops:
                self._note(event)
        elif isinstance(event, Sync):
            stats.syncs += 1
        else:
            if isinstance(event, Identity):
                stats.identities += 1
            else:
                stats.accounts += 1
            self._note(event)
        if form == "native":
            chunk.entry(encode_native(event))
        elif form == "frame":
            chunk.entry(encode_frame_entry(data, event.relay))
        elif isinstance(event, Sync):
            told = {"rev": event.rev, "seq": event.seq, "relay": event.relay, "time": event.time}
            chunk.repair(event.did, orjson.dumps(told))
        else:
            fields = encode_json(event)
            assert fields is not None  # only a #sync has no JSON form
            chunk.entry(fields)

    def _note(self, event: Event) -> None:
        self._recent.append((time.time(), event))
        self._noted += 1

    def _put_malformed(self, data: bytes, invalid: InvalidEvent) -> None:
        self._malformed += 1
        self._drop(invalid.reason)
        now = time.monotonic()
        if now > self._set_aside_until:
            self._set_aside_until, self._set_aside_left = now + 60, SET_ASIDE_PER_MINUTE
        if not self._set_aside_left:
            return
        self._set_aside_left -= 1
        self._stats.set_aside += 1
        kept = base64.b64encode(data[:SET_ASIDE_BYTES])
        cut = f" (the first {SET_ASIDE_BYTES} of {len(data)} bytes)" if len(data) > SET_ASIDE_BYTES else ""
        log.debug("Malformed frame of %d bytes set aside: %s", len(data), invalid)
        self._outbox.filling.dead_letter(
            [
                (b"type", b"frame"),
                (b"data", kept),
                (b"seq", b""),
                (b"origId", b""),
                (b"deliveries", b"0"),
                (b"reason", invalid.reason.encode()),
                (b"error", f"{invalid.detail}{cut}".encode("utf-8", "replace")),
                (b"form", b"frame"),
                (b"consumer", b"reader"),
                (b"setAsideAt", str(int(time.time() * 1000)).encode()),
            ]
        )

    def _told(self, frame: Info | ErrorFrame, host: str) -> None:
        """What the relay says about the stream itself."""
        if isinstance(frame, Info):
            if frame.name == "OutdatedCursor":
                log.warning("%s no longer has the events from our cursor on: a gap, recorded in fastworker:gaps", host)
                self._note_gap("outdated_cursor")
            else:
                log.info("%s says %s: %s", host, frame.name, frame.message or "")
            return
        if frame.error == "FutureCursor" and not self._skip:
            keys = f"{self._settings.cursor_key} and {self._feed.cursor_of(host)}"
            raise StoppedItself(
                f"{host} says that the cursor {self._last_seq} lies in its future: is this another relay, or was it "
                f"rebuilt? To start at its live tip, run `fastworker reader --from live` "
                f"once, or delete {keys}"
            )
        self._skip = self._skip_low = self._skip_high = 0
        raise RelayLost(f"{frame.error}: {frame.message or 'the relay gave no message'}")

    def _note_gap(self, reason: str, **more: str) -> None:
        """Recorded on the way to the stream together with the next seq, which says where the gap ends."""
        if self._gap is None:
            self._stats.gaps += 1
            at = int(time.time() * 1000)
            self._gap = {"relay": self._stats.relay, "reason": reason, "after": self._last_seq, "at": at, **more}

    def _drop(self, reason: Reason) -> None:
        self._stats.drops[reason] += 1

    # What others see.

    def _status(self) -> bytes:
        seq = self._stats.last_seq
        return orjson.dumps(
            {
                "connected": self._stats.connected,
                "url": redact(self._relay.url),
                "currentCursor": None if seq is None else str(seq),
                "reader": OURS,  # this key outlives us by ten seconds, and `check` must know whose it is
            }
        )

    def _dashboard(self) -> tuple[bytes | None, Sequence[bytes]]:
        """The recent events, newest first, and those of them to broadcast, oldest first."""
        new = min(self._noted - self._broadcast, BROADCAST_PER_TICK)
        self._broadcast = self._noted
        shown = [orjson.dumps(_shown(at, event)) for at, event in reversed(self._recent)]
        return b"[" + b",".join(shown) + b"]", shown[:new][::-1]

    def _figures(self) -> dict[str, str | int | float]:
        figures: dict[str, str | int | float] = {"at": int(time.time() * 1000), "pid": os.getpid()}
        for name, value in msgspec.structs.asdict(self._stats).items():
            if name == "drops":
                figures.update({f"drop:{reason}": count for reason, count in value.items()})
            elif value is None:
                figures[name] = ""
            else:
                figures[name] = int(value) if isinstance(value, bool) else value
        return figures


def _shown(at: float, event: Event) -> dict[str, str]:
    """The dashboard's object for one event (docs/compatibility.md)."""
    clock = time.strftime("%H:%M:%S", time.gmtime(at))
    if isinstance(event, Commit):
        op = event.ops[0]
        kind, lexicon, did, action = "#commit", op.collection, event.repo, str(op.action)
    elif isinstance(event, Identity):
        action = f"\N{RIGHTWARDS ARROW} {event.handle}" if event.handle else "update"
        kind, lexicon, did = "#identity", "com.atproto.identity", event.did
    else:
        assert isinstance(event, Account)
        action = "active" if event.active else "inactive"
        kind, lexicon, did = "#account", "com.atproto.account", event.did
    return {"type": kind, "lexicon": lexicon, "did": did, "action": action, "timestamp": clock}
