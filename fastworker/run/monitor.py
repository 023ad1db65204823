"""The monitor: one small process (or task) that looks, so that those who work need not.

It reads the children's board and Redis every second, removes what every group has finished, logs the rate, answers
HTTP, and leaves its findings in Redis for `fastworker status`. Readiness means progress: connected, fresh, and
finishing entries while there are any. Nothing here touches an entry.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from fastworker import __version__, metrics
from fastworker.edge.expose import ask, serve
from fastworker.edge.feed import trim_finished
from fastworker.edge.redis_admin import STATUS_STALE_S, RedisAdmin, Stream, age_s
from fastworker.edge.redis_client import connect
from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.metrics import Figures
from fastworker.run.heartbeat import LATENCY_MS, Heartbeats, Snapshot, State, now_ms
from fastworker.run.reader import ReaderSettings, ReaderStats
from fastworker.run.resume import read_and_resume
from fastworker.run.retry import pause
from fastworker.run.status import ProcessStatus, WorkerStatus

log = logging.getLogger(__name__)

READ_S: Final = 1.0
PUBLISH_EVERY: Final = 2  # readings
LOG_EVERY: Final = 5
MEASURE_EVERY: Final = 5
FRESH_S: Final = 10.0
"""Readiness: a reading is no older, and a waiting entry gets finished within this time."""
STUCK_S: Final = 30.0
"""Liveness: a child's loop turns at least this often; the supervisor replaces it earlier."""
GROWTH_WINDOW: Final = 60  # readings


class HttpSettings(msgspec.Struct, frozen=True):
    """`port` None: no HTTP. `chosen`: the operator named the port, so that another one will not do."""

    host: str = "127.0.0.1"
    port: int | None = None
    chosen: bool = False


class MonitorSettings(msgspec.Struct, frozen=True, kw_only=True):
    redis_url: str
    stream_key: str
    group: str
    ignore_groups: tuple[str, ...] = ()
    max_stream_len: int = 500_000
    keep_s: float = 0.0
    connections_max: int = 8
    with_reader: bool = False
    """The reader is one of this supervisor's children: readiness includes it."""
    http: HttpSettings = HttpSettings()


class Card(msgspec.Struct, frozen=True):
    """One figure of the status page."""

    title: str
    value: float | str | None
    unit: str = ""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """/status.json."""

    version: str
    at: float
    ready: bool
    why: list[str]
    cards: list[Card]
    processes: list[ProcessStatus]
    drops: dict[str, int]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at Redis found."""

    at: float  # monotonic
    time_ms: int
    stream: Stream | None
    ledger: dict[str, int]
    events: dict[str, int]
    dead_letters: int
    reader_connected: bool


async def run_monitor(
    settings: MonitorSettings, heartbeats: Heartbeats, stop: asyncio.Event, *, on_ready: Callable[[], None]
) -> None:
    """Monitor the worker's processes until `stop`. Raises Unreachable when the chosen port is taken."""
    redis = connect(settings.redis_url, client_name="fastworker-monitor", max_connections=2)
    try:
        await _WorkerMonitor(settings, heartbeats, RedisAdmin(redis, settings.stream_key)).run(stop, on_ready)
    finally:
        await redis.aclose()


class _WorkerMonitor:
    """Also the `Source` of the HTTP answers."""

    def __init__(self, settings: MonitorSettings, heartbeats: Heartbeats, admin: RedisAdmin) -> None:
        self._settings = settings
        self._heartbeats = heartbeats
        self._admin = admin
        self._owner = f"{socket.gethostname()}:{os.getppid()}"
        self._started = time.monotonic()
        self._reading: Reading | None = None
        self._error = ""
        self._lengths: deque[tuple[float, int]] = deque(maxlen=GROWTH_WINDOW)
        self._trimmed = 0
        self._bytes: int | None = None
        self._memory: dict[int, int] = {}  # pid -> PSS
        self._acked = 0
        self._acked_at = self._started
        self._work_since: float | None = None
        self._logged = (self._started, 0)
        self._port: int | None = None

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        async with AsyncExitStack() as stack:
            self._port = await _serve(stack, self, self._settings.http)
            on_ready()
            turn = 0
            while True:
                try:
                    await self._read(turn)
                    self._error = ""
                except (StreamUnavailable, Unreachable) as error:
                    if str(error) != self._error:
                        log.warning("Monitor: %s", error)
                    self._error = str(error)
                self._judge()
                if turn % LOG_EVERY == LOG_EVERY - 1:
                    self._log()
                turn += 1
                if await pause(READ_S, stop):
                    break
            self._log()
            try:
                async with asyncio.timeout(1):
                    await self._admin.remove_status(self._owner)
            except (StreamUnavailable, Unreachable, TimeoutError) as error:
                log.debug("The status field goes stale by itself: %s", error)

    async def _read(self, turn: int) -> None:
        settings, admin = self._settings, self._admin
        trimmed = await trim_finished(
            admin.redis,
            settings.stream_key,
            settings.ignore_groups,
            group=settings.group,
            keep_s=settings.keep_s,
            max_stream_len=settings.max_stream_len,
        )
        self._trimmed += trimmed.trimmed
        measure = turn % MEASURE_EVERY == 0
        stream = await admin.stream(measure=measure)
        if stream is not None and measure:
            self._bytes = stream.bytes
        self._reading = Reading(
            at=time.monotonic(),
            time_ms=await admin.time_ms(),
            stream=stream,
            ledger=await admin.ledger(),
            events=await admin.event_counts(),
            dead_letters=await admin.dead_letters(),
            reader_connected=not settings.with_reader or bool((await admin.reader_status()).get("connected")),
        )
        self._lengths.append((self._reading.at, stream.length if stream else 0))
        if measure:
            self._memory = {snapshot.gauges.pid: _pss(snapshot.gauges.pid) for snapshot in self._children()}
        if turn % PUBLISH_EVERY == 0:
            await admin.put_status(self._owner, msgspec.json.encode(self._status()))
            if turn % 60 == 0:
                await self._forget_the_gone()

    async def _forget_the_gone(self) -> None:
        """Status fields of workers that were killed would stay for ever."""
        gone = []
        for owner, text in (await self._admin.statuses()).items():
            try:
                at = float(msgspec.json.decode(text)["at"])
            except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
                at = 0.0
            if time.time() - at > 4 * STATUS_STALE_S:
                gone.append(owner)
        if gone:
            await self._admin.remove_status(*gone)

    # --- judgement

    def _children(self) -> list[Snapshot]:
        return [snapshot for snapshot in self._heartbeats.snapshot() if snapshot.gauges.state != State.FREE]

    def _workers(self) -> list[Snapshot]:
        """Those that process entries: not the monitor itself, nor the reader."""
        return [snapshot for snapshot in self._children() if snapshot.name.startswith("worker")]

    def _judge(self) -> None:
        """Keep the times that readiness is told by: since when there is work, and when some was last finished."""
        snapshots = self._heartbeats.snapshot()
        now = time.monotonic()
        acked = sum(snapshot.acked for snapshot in snapshots)
        if acked != self._acked:
            self._acked, self._acked_at = acked, now
        group = self._reading.stream.group(self._settings.group) if self._reading and self._reading.stream else None
        is_work = any(snapshot.gauges.held for snapshot in snapshots) or (group is not None and group.lag > 0)
        self._work_since = (self._work_since or now) if is_work else None

    def why_not_live(self) -> list[str]:
        now = now_ms()
        ages = [(snapshot.name, (now - snapshot.gauges.tick_ms) / 1000) for snapshot in self._children()]
        return [f"{name}: its loop has not turned for {age:.0f} s" for name, age in ages if age > STUCK_S]

    def why_not_ready(self) -> list[str]:
        now = time.monotonic()
        why = self.why_not_live()
        if not any(snapshot.gauges.ready for snapshot in self._workers()):
            why.append("no worker process is ready")
        waits = {State.WAITING_FOR_STORE: "PostgreSQL", State.WAITING_FOR_STREAM: "Redis"}
        for snapshot in self._workers():
            if (server := waits.get(State(snapshot.gauges.state))) is not None:
                why.append(f"{snapshot.name} waits for {server}: {snapshot.error or 'no error yet'}")
        read_at = self._reading.at if self._reading else self._started
        if now - read_at > FRESH_S or self._reading is None:
            why.append(f"Redis was not read for {now - read_at:.0f} s: {self._error or 'no answer yet'}")
        elif not self._reading.reader_connected:
            why.append("the reader is not connected to the relay")
        if self._work_since is not None and now - max(self._work_since, self._acked_at) > FRESH_S:
            why.append(f"entries wait, but none was finished for {now - self._acked_at:.0f} s")
        return why

    # --- what others see

    def _log(self) -> None:
        """The line that operators grep for; nothing while nothing happens."""
        at, count = self._logged
        now = time.monotonic()
        if self._acked != count:
            rate = (self._acked - count) / max(now - at, 1e-9)
            log.info("Processed %s events (~%s events/sec)", f"{self._acked:,}", f"{rate:,.0f}")
        self._logged = (now, self._acked)

    def _processes(self) -> list[ProcessStatus]:
        now = now_ms()
        return [
            ProcessStatus(
                name=snapshot.name,
                pid=(gauges := snapshot.gauges).pid,
                state=State(gauges.state).name.lower(),
                ready=bool(gauges.ready),
                consumers=snapshot.consumers,
                entries=snapshot.acked,
                entries_per_s=float(gauges.acked_per_second),
                flushes=snapshot.counters.flushes,
                flush_ms=gauges.flush_us_last / 1000,
                rows=snapshot.counters.rows,
                oldest_unflushed_s=_since(gauges.oldest_ms, now),
                progress_age_s=_since(gauges.progress_ms, now),
                memory_bytes=self._memory.get(gauges.pid),
                restarts=max(0, snapshot.counters.starts - 1),
                error=snapshot.error,
            )
            for snapshot in self._children()
        ]

    def _status(self) -> WorkerStatus:
        why = self.why_not_ready()
        return WorkerStatus(
            owner=self._owner,
            at=time.time(),
            version=__version__,
            ready=not why,
            why=why,
            connections_max=self._settings.connections_max,
            processes=self._processes(),
            http=f"{self._settings.http.host}:{self._port}" if self._port is not None else "",
        )

    def status_json(self) -> bytes:
        why = self.why_not_ready()
        cards: list[Card] = []
        drops: dict[str, int] = {}
        if (reading := self._reading) is not None:
            stream = reading.stream
            group = stream.group(self._settings.group) if stream else None
            ledger = reading.ledger
            drops = {name[5:]: count for name, count in ledger.items() if name.startswith("drop:")}
            age = age_s(group.unfinished_id if group else None, reading.time_ms)
            rate = sum(process.entries_per_s for process in self._processes())
            cards = [
                Card("finished", rate, "events/s"),
                Card("lag", group.lag if group else None, "entries"),
                Card("oldest unfinished", age, "s"),
                Card("pending", group.pending if group else None, "entries"),
                Card("stream", stream.length if stream else 0, f"of {self._settings.max_stream_len:,}"),
                Card("stream memory", self._bytes, "bytes"),
                Card("committed", ledger.get("committed", 0)),
                Card("nothing to store", ledger.get("nothing_to_store", 0)),
                Card("set aside", ledger.get("set_aside", 0)),
                Card("dead letters", reading.dead_letters),
            ]
        page = Page(
            version=__version__,
            at=time.time(),
            ready=not why,
            why=why,
            cards=cards,
            processes=self._processes(),
            drops=drops,
        )
        return msgspec.json.encode(page)

    def figures(self) -> Figures:
        m, figures = metrics, Figures(metrics.WORKER_METRICS)
        figures.set(m.BUILD, 1, __version__)
        figures.set(m.READY, not self.why_not_ready())
        figures.set(m.CONNECTIONS_MAX, self._settings.connections_max)
        figures.set(m.STREAM_ENTRIES_MAX, self._settings.max_stream_len)
        figures.set(m.STREAM_TRIMMED, self._trimmed)
        if self._reading is not None:
            self._redis_figures(figures, self._reading)
        self._process_figures(figures)
        return figures

    def _redis_figures(self, figures: Figures, reading: Reading) -> None:
        m, stream = metrics, reading.stream
        figures.set(m.DEAD_LETTERS, reading.dead_letters)
        figures.set(m.STREAM_ENTRIES, stream.length if stream else 0)
        figures.set(m.STREAM_FULL_SECONDS, self._full_seconds())
        if self._bytes is not None:
            figures.set(m.STREAM_BYTES, self._bytes)
        for outcome in m.OUTCOMES:
            figures.set(m.ENTRIES, reading.ledger.get(outcome, 0), outcome)
        for reason in m.DROPS.closed:
            figures.set(m.DROPS, reading.ledger.get(f"drop:{reason}", 0), reason)
        for kind in m.KINDS:
            figures.set(m.EVENTS, reading.events.get(kind, 0), kind)
        for group in stream.groups if stream else ():
            figures.set(m.GROUP_LAG, group.lag, group.name)
            if group.name == self._settings.group:
                figures.set(m.LAG_ENTRIES, group.lag)
                figures.set(m.LAG_SECONDS, age_s(group.unfinished_id, reading.time_ms))
                figures.set(m.PENDING, group.pending)
                figures.set(m.PENDING_AGE, age_s(group.oldest_pending_id, reading.time_ms))
                if group.entries_read is not None:
                    finished = sum(reading.ledger.get(outcome, 0) for outcome in m.OUTCOMES)
                    figures.set(m.UNACCOUNTED, group.entries_read - group.pending - finished)

    def _process_figures(self, figures: Figures) -> None:
        m, now = metrics, now_ms()
        workers = self._workers()
        states = [State(snapshot.gauges.state).name.lower() for snapshot in workers]
        for state in State:
            if state is not State.FREE:
                figures.set(m.PROCESSES, states.count(state.name.lower()), state.name.lower())
        for snapshot in workers:
            gauges, name = snapshot.gauges, snapshot.name
            figures.set(m.LAST_FLUSH, gauges.flush_us_last / 1e6, name)
            figures.set(m.UNSETTLED_AGE, _since(gauges.oldest_ms, now), name)
            figures.set(m.PROGRESS_AGE, _since(gauges.progress_ms, now), name)
            figures.set(m.HELD, gauges.held, name)
        for snapshot in self._children():
            if snapshot.gauges.pid in self._memory:
                figures.set(m.MEMORY, self._memory[snapshot.gauges.pid], snapshot.name)
        everybody = self._heartbeats.snapshot()
        counters = [snapshot.counters for snapshot in everybody]
        figures.set(m.RESTARTS, sum(max(0, counter.starts - 1) for counter in counters))
        figures.set(m.FLUSHES, sum(counter.flushes for counter in counters))
        figures.set(m.FLUSH_TIME, sum(counter.flush_us_total for counter in counters) / 1e6)
        figures.set(m.ROWS, sum(counter.rows for counter in counters))
        figures.set(m.SUPERSEDED, sum(counter.superseded for counter in counters))
        figures.set(m.CLAIMED, sum(counter.claimed for counter in counters))
        figures.set(m.RETRIES, sum(counter.store_retries for counter in counters), "postgresql")
        figures.set(m.RETRIES, sum(counter.stream_retries for counter in counters), "redis")
        for table in m.CHANGES.closed:
            figures.set(m.CHANGES, sum(snapshot.tables.get(table, 0) for snapshot in everybody), table)
        below = 0
        for n, bound in enumerate([*(str(ms / 1000) for ms in LATENCY_MS), "+Inf"]):
            below += sum(snapshot.latency[n] for snapshot in everybody)
            figures.set(m.LATENCY, below, bound)

    def _full_seconds(self) -> float:
        if len(self._lengths) < 2:
            return math.inf
        (first_at, first), (last_at, last) = self._lengths[0], self._lengths[-1]
        growth = (last - first) / (last_at - first_at)
        return max(0.0, (self._settings.max_stream_len - last) / growth) if growth > 0 else math.inf


# --- the reader as a service


async def serve_reader(
    settings: ReaderSettings, http: HttpSettings, stop: asyncio.Event, *, database_url: str | None
) -> None:
    """The reader with its own HTTP port."""
    view = _ReaderView(settings)
    async with AsyncExitStack() as stack:
        await _serve(stack, view, http)
        await read_and_resume(settings, stop, database_url=database_url, stats=view.stats, on_tick=view.tick)


class _ReaderView:
    """What the reader's figures mean; the `Source` of its port."""

    def __init__(self, settings: ReaderSettings) -> None:
        self._settings = settings
        self.stats = ReaderStats()
        self._ticked = self._moved = time.monotonic()
        self._entries = 0
        self._rate = 0.0

    def tick(self, stats: ReaderStats) -> None:
        now = time.monotonic()
        if stats.entries != self._entries or not stats.outbox_items:
            self._moved = now
        self._rate = (stats.entries - self._entries) / max(now - self._ticked, 1e-9)
        self._entries, self._ticked = stats.entries, now

    def why_not_live(self) -> list[str]:
        return []  # it answers, so its only loop turns

    def why_not_ready(self) -> list[str]:
        stats, now = self.stats, time.monotonic()
        if stats.standby:
            return [f"waiting: {stats.last_error or 'another reader is at work, or Redis did not answer yet'}"]
        why = []
        if not stats.connected:
            why.append(f"not connected to the relay: {stats.last_error or 'connecting'}")
        elif stats.silent:
            why.append(f"connected, but no data for {stats.silent_s:.0f} s, which is long for this relay")
        elif stats.behind_s > FRESH_S:
            why.append(
                f"connected, but for {stats.behind_s:.0f} s all that came lies behind the cursor {stats.last_seq}"
            )
        if stats.full:
            held_by = f", held back by the group {stats.held_by}" if stats.held_by else ""
            why.append(f"the stream is full{held_by}: the reader does not read")
        if now - self._moved > FRESH_S:
            why.append(f"frames wait, but none was appended for {now - self._moved:.0f} s: {stats.last_error}")
        if now - self._ticked > FRESH_S:
            why.append(f"nothing was done for {now - self._ticked:.0f} s")
        return why

    def status_json(self) -> bytes:
        stats, why = self.stats, self.why_not_ready()
        frame_age = max(0.0, time.time() - stats.last_frame_at) if stats.last_frame_at else None
        cards = [
            Card("relay", stats.relay or ", ".join(self._settings.relay_urls)),
            Card("appended", self._rate, "entries/s"),
            Card("cursor", str(stats.last_seq) if stats.last_seq is not None else "none"),
            Card("last frame", frame_age, "s ago"),
            Card("frames", stats.frames),
            Card("received", stats.bytes, "bytes"),
            Card("entries", stats.entries),
            Card("waiting to be appended", stats.outbox_items),
            Card("duplicates", stats.duplicates),
            Card("reconnects", stats.reconnects),
            Card("gaps", stats.gaps),
        ]
        process = ProcessStatus(
            name="reader",
            pid=os.getpid(),
            state="standby" if stats.standby else "connected" if stats.connected else "connecting",
            ready=not why,
            entries=stats.entries,
            entries_per_s=self._rate,
            memory_bytes=_pss(os.getpid()),
            error=stats.last_error if why else "",
        )
        return msgspec.json.encode(
            Page(
                version=__version__,
                at=time.time(),
                ready=not why,
                why=why,
                cards=cards,
                processes=[process],
                drops=stats.drops,
            )
        )

    def figures(self) -> Figures:
        m, figures, stats = metrics, Figures(metrics.READER_METRICS), self.stats
        figures.set(m.BUILD, 1, __version__)
        figures.set(m.READY, not self.why_not_ready())
        figures.set(m.MEMORY, _pss(os.getpid()), "reader")
        figures.set(m.STREAM_ENTRIES_MAX, self._settings.max_stream_len)
        figures.set(m.STREAM_TRIMMED, stats.trimmed)
        figures.set(m.READER_CONNECTED, stats.connected, stats.relay)
        figures.set(m.READER_FRAMES, stats.frames)
        figures.set(m.READER_BYTES, stats.bytes)
        figures.set(m.READER_ENTRIES, stats.entries)
        figures.set(m.READER_DUPLICATES, stats.duplicates)
        figures.set(m.READER_RECONNECTS, stats.reconnects)
        figures.set(m.READER_GAPS, stats.gaps)
        figures.set(m.READER_FULL, stats.full)
        figures.set(m.READER_OUTBOX, stats.outbox_items)
        if stats.last_seq is not None:
            figures.set(m.READER_CURSOR, stats.last_seq)
        if stats.last_frame_at is not None:
            figures.set(m.READER_FRAME_AGE, max(0.0, time.time() - stats.last_frame_at))
        for reason, count in stats.drops.items():
            figures.set(m.READER_DROPS, count, reason)
        return figures


async def _serve(stack: AsyncExitStack, source: _WorkerMonitor | _ReaderView, http: HttpSettings) -> int | None:
    """The port that is served, None for none. Where nobody chose the port, another one will do."""
    if http.port is None:
        return None
    try:
        return await stack.enter_async_context(serve(source, http.host, http.port))
    except Unreachable as error:
        if http.chosen:
            raise
        log.warning("%s; taking a free one", error)
        return await stack.enter_async_context(serve(source, http.host, 0))


async def ask_health(host: str, ports: Sequence[int], path: str) -> tuple[bool, str]:
    """Whether every service that answers on these ports is well (at least one must), and what they say."""
    answers = [answer for port in ports if (answer := await ask(host, port, path)) is not None]
    if not answers:
        return False, f"nobody answers on {host}, port {' or '.join(map(str, ports))}"
    return all(well for well, _ in answers), "; ".join(words for _, words in answers)


def _since(at_ms: int, now: int) -> float:
    return max(0, now - at_ms) / 1000 if at_ms else 0.0


def _pss(pid: int) -> int:
    """Proportional set size in bytes; 0 when the process is gone or the kernel does not tell."""
    try:
        lines: Sequence[str] = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
