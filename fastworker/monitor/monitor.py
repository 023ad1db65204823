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
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from fastworker import __version__, metrics
from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.metrics import Figures
from fastworker.monitor.facts import ProcessStatus, WorkerStatus
from fastworker.monitor.history import History
from fastworker.monitor.page import Card, Chart, HttpSettings, Page, Wait, Worker, Written, listen, pss
from fastworker.monitor.reader_port import cards as reader_cards
from fastworker.monitor.reader_port import left_in_redis, put_figures, trouble
from fastworker.monitor.readiness import FRESH_S, Facts, Watch, postgres_away, process_of, readiness
from fastworker.process.backoff import pause
from fastworker.process.board import (
    FLUSH_ENTRIES,
    FLUSH_MS,
    HISTOGRAMS,
    LATENCY_MS,
    Heartbeats,
    Snapshot,
    State,
    now_ms,
    quantile,
)
from fastworker.process.outage import Outage, span
from fastworker.reader.reader import ReaderStats
from fastworker.redact import redact
from fastworker.stream.admin import STATUS_STALE_S, RedisAdmin, Stream, age_s
from fastworker.stream.client import connect
from fastworker.stream.feed import trim_finished
from fastworker.stream.letters import Letter, line_of
from fastworker.table.schema import COLLECTIONS

log = logging.getLogger(__name__)

READ_S: Final = 1.0
PUBLISH_EVERY: Final = 2  # readings
LOG_EVERY: Final = 5
MEASURE_EVERY: Final = 5
STUCK_S: Final = 30.0
"""Liveness: a child's loop turns at least this often; the supervisor replaces it earlier."""
GROWTH_WINDOW: Final = 60  # readings
RATE_WINDOW: Final = 5  # readings
LETTERS_SHOWN: Final = 5
LONG_S: Final = 60.0  # what waits longer is shown in red
MINUTE_S: Final = 60.0
HISTORY: Final = ("finished", "appended", "to be taken", "in work", "oldest", "median", "99 %", "stream")
WORST: Final = ("oldest", "median", "99 %")
GROUPS_SHOWN: Final = 20
"""Series of a label that others choose: our group and those with the most lag."""
LABEL_MAX: Final = 100  # characters of it
OUTCOME_TITLES: Final = {
    "committed": "committed",
    "nothing_to_store": "nothing to store",
    "set_aside": "set aside",
    "ghosts": "trimmed while pending",
}


class MonitorSettings(msgspec.Struct, frozen=True, kw_only=True):
    redis_url: str
    stream_key: str
    group: str
    ignore_groups: tuple[str, ...] = ()
    max_stream_len: int = 500_000
    stream_bytes_max: int | None = None
    keep_s: float = 0.0
    connections_max: int = 8
    with_reader: bool = False
    """The reader is one of this supervisor's children: readiness includes it."""
    http: HttpSettings = HttpSettings()


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at Redis found."""

    at: float  # monotonic
    time_ms: int
    stream: Stream | None
    ledger: dict[str, int]
    unaccounted: int | None
    events: dict[str, int]
    dead_letters: int
    newest_letters: list[Letter]
    reader: ReaderStats | None
    """Of the stream's reader, wherever it runs."""
    reader_age_s: float


class Count(msgspec.Struct, frozen=True):
    """Totals at one moment, to tell rates from."""

    at: float
    finished: dict[str, int]  # entries, by process; one that was replaced goes on counting under its name
    latency: tuple[int, ...]
    added: int | None  # entries ever appended to the stream

    @property
    def total(self) -> int:
        return sum(self.finished.values())


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
        self._watch = Watch()
        self._reader_moved = (0, self._started)
        self._logged = (self._started, 0)
        self._counts: deque[Count] = deque(maxlen=GROWTH_WINDOW)
        self._port: int | None = None
        self._redis_outage, self._postgres_outage = Outage("Redis"), Outage("PostgreSQL")
        self._others: dict[str, str] = {}  # what every worker on this stream last told
        self._history = History(HISTORY, worst=WORST)
        self._minutes: deque[tuple[float, Counter[str]]] = deque([(self._started, Counter())], maxlen=60)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        async with AsyncExitStack() as stack:
            self._port = await listen(stack, self, self._settings.http)
            on_ready()
            turn = 0
            while True:
                try:
                    await self._read(turn)
                    self._error = ""
                except (StreamUnavailable, Unreachable) as error:
                    self._error = str(error)
                self._judge()
                self._remember()
                self._tell_of_outages()
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
        if measure:
            self._others = await admin.statuses()
        count = await admin.count(settings.group)
        left = await admin.reader_stats()
        letters = await admin.newest_letters(LETTERS_SHOWN)
        self._reading = Reading(
            at=time.monotonic(),
            time_ms=await admin.time_ms(),
            stream=stream,
            ledger=count.ledger,
            unaccounted=count.unaccounted,
            events=await admin.event_counts(),
            dead_letters=await admin.dead_letters() if letters else 0,
            newest_letters=[line_of(*letter) for letter in letters],
            reader=left_in_redis(left),
            reader_age_s=max(0.0, time.time() - int(left.get("at") or 0) / 1000),
        )
        self._lengths.append((self._reading.at, stream.length if stream else 0))
        if measure:
            self._memory = {pid: pss(pid) for pid in (os.getppid(), *(one.gauges.pid for one in self._children()))}
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
        """Keep what rates and readiness are told by."""
        snapshots = self._heartbeats.snapshot()
        now = time.monotonic()
        stream = self._reading.stream if self._reading else None
        added = stream.entries_added if stream else None
        finished: dict[str, int] = {}
        for snapshot in snapshots:
            finished[snapshot.name] = finished.get(snapshot.name, 0) + snapshot.acked
        self._counts.append(Count(now, finished, _latency(snapshots), added))
        self._acked = self._counts[-1].total
        group = stream.group(self._settings.group) if stream else None
        is_work = any(snapshot.gauges.held for snapshot in snapshots) or (group is not None and group.lag > 0)
        self._watch.look(
            now,
            snapshots,
            missing=self._heartbeats.missing,
            crashes=self._heartbeats.crashes,
            is_work=is_work,
            pending_id=group.oldest_pending_id if group else None,
            behind_s=age_s(group.unfinished_id if group else None, self._reading.time_ms) if self._reading else 0.0,
        )
        stats = self._reading.reader if self._reading else None
        if stats is not None and (stats.entries != self._reader_moved[0] or not stats.outbox_items):
            self._reader_moved = stats.entries, now

    def _rate(self, name: str | None = None) -> float:
        """Entries finished per second over the last readings, by one process or by all."""
        if len(self._counts) < 2:
            return 0.0
        first, last = self._counts[-min(len(self._counts), RATE_WINDOW + 1)], self._counts[-1]
        count = last.total - first.total if name is None else last.finished[name] - first.finished.get(name, 0)
        return max(0, count) / (last.at - first.at)

    def why_not_live(self) -> list[str]:
        return self._stuck(STUCK_S)

    def _stuck(self, longest_s: float) -> list[str]:
        now = now_ms()
        ages = [(snapshot.name, (now - snapshot.gauges.tick_ms) / 1000) for snapshot in self._children()]
        return [f"{name}: its loop has not turned for {age:.0f} s" for name, age in ages if age > longest_s]

    def why_not_ready(self) -> list[str]:
        """Whatever does not hold, in a sentence each."""
        return readiness(self._facts())

    def _facts(self) -> Facts:
        now, reading = time.monotonic(), self._reading
        facts = self._watch.facts(now, self._heartbeats.snapshot(), now_ms(), self._heartbeats.missing)
        return msgspec.structs.replace(
            facts,
            redis_s=now - reading.at if reading else now - self._started + FRESH_S,
            redis_error=self._error,
            reader=self._reader_trouble(reading, now) if reading and self._settings.with_reader else [],
        )

    def _reader_trouble(self, reading: Reading, now: float) -> list[str]:
        stats, age = reading.reader, reading.reader_age_s
        if stats is None:
            return ["the reader has not reported yet"]
        if age > FRESH_S:
            return [f"the reader has not reported for {age:.0f} s"]
        why = [f"reader: {reason}" for reason in trouble(stats)]
        still_s = now - self._reader_moved[1]
        if not stats.standby and still_s > FRESH_S:
            why.append(f"reader: frames wait, but none was appended for {still_s:.0f} s: {stats.last_error}")
        return why

    # --- what others see

    def _tell_of_outages(self) -> None:
        self._redis_outage.look(self._error or None, "nothing is read or written; the relay keeps one to three days")
        if self._error:  # nobody asks PostgreSQL meanwhile: its silence says nothing
            return
        now, workers = now_ms(), self._workers()
        away = next((why for one in workers if (why := postgres_away(process_of(one, now))) is not None), None)
        answered_at = max((one.gauges.store_ms for one in workers), default=0) / 1000
        self._postgres_outage.look(away, self._what_waits(), answered_at=answered_at)

    def _what_waits(self) -> str:
        """As of the latest reading."""
        stream = self._reading.stream if self._reading else None
        group = stream.group(self._settings.group) if stream else None
        count = group.lag + group.pending if group else stream.length if stream else 0
        full = self._full_seconds()
        return f"{count:,} entries wait" + (f", full in {span(full)}" if math.isfinite(full) else "")

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
        known = self._counts[-1].finished if self._counts else {}
        restarts, replaced = Counter[str](), Counter[str]()
        for snapshot in self._heartbeats.snapshot():
            restarts[snapshot.name] += snapshot.counters.restarts
            replaced[snapshot.name] += snapshot.counters.replaced
        shown = [
            ProcessStatus(
                name=snapshot.name,
                pid=(gauges := snapshot.gauges).pid,
                state=State(gauges.state).name.lower(),
                ready=bool(gauges.ready),
                consumers=snapshot.consumers,
                entries=snapshot.acked,
                entries_per_s=self._rate(snapshot.name) if snapshot.name in known else 0.0,
                flushes=snapshot.counters.flushes,
                flush_ms=gauges.flush_us_last / 1000,
                rows=snapshot.counters.rows,
                oldest_unflushed_s=_since(gauges.oldest_ms, now),
                progress_age_s=_since(gauges.progress_ms, now),
                memory_bytes=self._memory.get(gauges.pid),
                restarts=restarts[snapshot.name],
                replaced=replaced[snapshot.name],
                error=snapshot.error,
                error_age_s=_since(gauges.error_ms, now) if gauges.error_ms else None,
            )
            for snapshot in self._children()
        ]
        stats = self._reading.reader if self._reading else None
        if stats is None:
            return shown
        reader: dict[str, Any] = {"entries": stats.entries, "entries_per_s": self._appended_per_s() or 0.0}
        reader |= {"error": redact(stats.last_error) if trouble(stats) else ""}
        return [msgspec.structs.replace(one, **reader) if one.name == "reader" else one for one in shown]

    def _status(self) -> WorkerStatus:
        why = self.why_not_ready()
        return WorkerStatus(
            owner=self._owner,
            at=time.time(),
            version=__version__,
            ready=not why,
            why=why,
            connections_max=self._settings.connections_max,
            connections_open=sum(snapshot.gauges.connections for snapshot in self._workers()),
            stream_full_s=full if math.isfinite(full := self._full_seconds()) else None,
            processes=self._processes(),
            written_per_s={one.table: round(one.per_s, 2) for one in self._written() if one.per_s >= 0.005},
            http=f"{self._settings.http.host}:{self._port}" if self._port is not None else "",
        )

    def status_json(self) -> bytes:
        why, reading = self.why_not_ready(), self._reading
        ledger = reading.ledger if reading else {}
        page = Page(
            version=__version__,
            service="up" if self._settings.with_reader else "worker",
            at=time.time(),
            uptime_s=time.monotonic() - self._started,
            age_s=time.monotonic() - (reading.at if reading else self._started),
            ready=not why,
            why=why,
            charts=_charts(self._settings.max_stream_len),
            cards=self._cards(reading) if reading else {},
            waits=self._waiting(reading) if reading else [],
            processes=self._processes(),
            workers=_workers_told(self._others),
            written=self._written(),
            drops={name.removeprefix("drop:"): count for name, count in ledger.items() if name.startswith("drop:")},
            dead_letters=reading.newest_letters if reading else [],
        )
        return msgspec.json.encode(page)

    def _cards(self, reading: Reading) -> dict[str, list[Card]]:
        settings, stream, ledger = self._settings, reading.stream, reading.ledger
        group = stream.group(settings.group) if stream else None
        length = stream.length if stream else 0
        unfinished_s = age_s(group.unfinished_id if group else None, reading.time_ms)
        full = self._full_seconds()
        p50, p99 = (self._latency_below(share) for share in (0.5, 0.99))
        workers = self._workers()
        busy = sum(snapshot.gauges.connections_busy for snapshot in workers)
        cards = {
            "Now": [
                Card("finished", self._rate(), "events/s"),
                Card("appended", self._appended_per_s(), "events/s"),
                Card("lag", group.lag if group else length, "entries"),
                Card("oldest unfinished", unfinished_s, "s", bad=unfinished_s > 60),
                Card("latency, median", p50),
                Card("latency, 99 %", p99),
                Card("in work", group.pending if group else 0, "entries"),
                Card("dead letters", reading.dead_letters, bad=reading.dead_letters > 0),
            ],
            "Stream and connections": [
                Card("stream", length, f"of {settings.max_stream_len:,}", bad=length > 0.8 * settings.max_stream_len),
                Card("stream is full in", full if math.isfinite(full) else "does not grow", "s", bad=full < 3_600),
                Card("stream memory", self._bytes, "bytes"),
                Card("PostgreSQL connections", busy, f"at work, at most {settings.connections_max}"),
            ],
            "Since the stream began": [
                *(
                    Card(title, count := ledger.get(name, 0), bad=name == "ghosts" and count > 0)
                    for name, title in OUTCOME_TITLES.items()
                ),
                Card("not accounted for", reading.unaccounted, bad=(reading.unaccounted or 0) < 0),
            ],
        }
        if reading.reader is not None:
            told_s = reading.reader_age_s + time.monotonic() - reading.at
            cards["Reader"] = [*reader_cards(reading.reader, None), Card("told", told_s, "s ago", bad=told_s > FRESH_S)]
        return cards

    def _waiting(self, reading: Reading) -> list[Wait]:
        """What is not done yet, wherever it is, and for how long."""
        stream, now = reading.stream, reading.time_ms
        waits = []
        for group in stream.groups if stream else ():
            whose = "" if group.name == self._settings.group else f" by {group.name}"
            undelivered_s, pending_s = age_s(group.next_id, now), age_s(group.oldest_pending_id, now)
            waits += [
                Wait(f"entries to be taken{whose}", group.lag, undelivered_s, bad=undelivered_s > LONG_S),
                Wait(f"entries in work{whose}", group.pending, pending_s, bad=pending_s > LONG_S),
            ]
        if reading.reader is not None:
            waits.append(Wait("entries that the reader has to append", reading.reader.outbox_items, None))
        letters = reading.newest_letters
        oldest = Wait("dead letters, for a person", reading.dead_letters, None, bad=bool(letters))
        return [*waits, oldest]

    def _written(self) -> list[Written]:
        """By table: lately, and over the last hour."""
        now, hour_ago = self._tables(), self._minutes[0][1]
        first_at, first = self._minutes[-min(2, len(self._minutes))]
        passed = max(time.monotonic() - first_at, 1.0)
        of_table: dict[str, list[str]] = {}
        for collection, table in COLLECTIONS.items():
            of_table.setdefault(table.name, []).append(collection)
        return [
            Written(
                name,
                tuple(of_table.get(name, ())),
                (count - first.get(name, 0)) / passed,
                count - hour_ago.get(name, 0),
            )
            for name, count in sorted(now.items(), key=lambda one: one[1], reverse=True)
            if count
        ]

    def _tables(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for snapshot in self._heartbeats.snapshot():
            counts.update(snapshot.tables)
        return counts

    def history_json(self) -> bytes:
        return self._history.json()

    def _remember(self) -> None:
        """One second of history: the difference between the last two counts, and how things stand."""
        if len(self._counts) > 1 and (last := self._counts[-1]).at > (before := self._counts[-2]).at:
            passed = last.at - before.at
            latency = [now - then for now, then in zip(last.latency, before.latency, strict=True)]
            reading, known = self._reading, last.added is not None and before.added is not None
            fresh = reading is not None and last.at - reading.at < FRESH_S
            group = reading.stream.group(self._settings.group) if reading and reading.stream else None
            self._history.add(
                time.time(),
                {
                    "finished": max(0, last.total - before.total) / passed,
                    "appended": max(0, (last.added or 0) - (before.added or 0)) / passed if known and fresh else None,
                    "to be taken": group.lag if group and fresh else None,
                    "in work": group.pending if group and fresh else None,
                    "oldest": age_s(group.unfinished_id, reading.time_ms) if group and reading and fresh else None,
                    "median": quantile(LATENCY_MS, latency, 0.5),
                    "99 %": quantile(LATENCY_MS, latency, 0.99),
                    "stream": self._lengths[-1][1] if self._lengths and fresh else None,
                },
            )
        if time.monotonic() - self._minutes[-1][0] > MINUTE_S:
            self._minutes.append((time.monotonic(), self._tables()))

    def _appended_per_s(self) -> float | None:
        """Over the last readings; None where the server does not count (Redis 6.2)."""
        if not self._counts:
            return None
        first, last = self._counts[-min(len(self._counts), RATE_WINDOW + 1)], self._counts[-1]
        if first.added is None or last.added is None or last.at <= first.at:
            return None
        return max(0, last.added - first.added) / (last.at - first.at)

    def _latency_below(self, share: float) -> str:
        """What that share of the last minute's entries stayed under."""
        first, last = self._counts[0].latency, self._counts[-1].latency
        counts = [now - then for now, then in zip(last, first, strict=True)]
        if not any(counts):
            return "no entry lately"
        bound = quantile(LATENCY_MS, counts, share)
        return f"over {LATENCY_MS[-1]:,} ms" if bound is None else f"under {bound:,} ms"

    def figures(self) -> Figures:
        m = metrics
        figures = Figures(m.UP_METRICS if self._settings.with_reader else m.WORKER_METRICS)
        figures.set(m.BUILD, 1, __version__)
        figures.set(m.READY, not self.why_not_ready())
        figures.set(m.CONNECTIONS_MAX, self._settings.connections_max)
        figures.set(m.STREAM_ENTRIES_MAX, self._settings.max_stream_len)
        figures.set(m.STREAM_TRIMMED, self._trimmed)
        figures.set(m.REDIS_AGE, time.monotonic() - (self._reading.at if self._reading else self._started))
        if self._reading is not None:
            self._redis_figures(figures, self._reading)
            if self._reading.reader is not None and self._settings.with_reader:
                put_figures(figures, self._reading.reader)
        self._process_figures(figures)
        return figures

    def _redis_figures(self, figures: Figures, reading: Reading) -> None:
        m, stream, settings = metrics, reading.stream, self._settings
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
        if reading.unaccounted is not None:
            figures.set(m.UNACCOUNTED, reading.unaccounted)
        groups = sorted(stream.groups if stream else (), key=lambda one: (one.name != settings.group, -one.lag))
        for group in groups[:GROUPS_SHOWN]:
            figures.set(m.GROUP_LAG, group.lag, group.name[:LABEL_MAX])
            if group.name == settings.group:
                figures.set(m.LAG_ENTRIES, group.lag)
                figures.set(m.LAG_SECONDS, age_s(group.unfinished_id, reading.time_ms))
                figures.set(m.PENDING, group.pending)
                figures.set(m.PENDING_AGE, age_s(group.oldest_pending_id, reading.time_ms))

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
            if gauges.store_ms:
                figures.set(m.STORE_AGE, _since(gauges.store_ms, now), name)
        figures.set(m.CONNECTIONS, sum(snapshot.gauges.connections for snapshot in workers), "open")
        figures.set(m.CONNECTIONS, sum(snapshot.gauges.connections_busy for snapshot in workers), "busy")
        names = {snapshot.gauges.pid: snapshot.name for snapshot in self._children()} | {os.getppid(): "supervisor"}
        for pid, size in self._memory.items():
            if pid in names:
                figures.set(m.MEMORY, size, names[pid])
        everybody = self._heartbeats.snapshot()
        counters = [snapshot.counters for snapshot in everybody]
        figures.set(m.RESTARTS, sum(counter.restarts for counter in counters))
        figures.set(m.REPLACED, sum(counter.replaced for counter in counters))
        figures.set(m.ROWS, sum(counter.rows for counter in counters))
        figures.set(m.SUPERSEDED, sum(counter.superseded for counter in counters))
        figures.set(m.CLAIMED, sum(counter.claimed for counter in counters))
        figures.set(m.RETRIES, sum(counter.store_retries for counter in counters), "postgresql")
        figures.set(m.RETRIES, sum(counter.stream_retries for counter in counters), "redis")
        for table in m.CHANGES.closed:
            figures.set(m.CHANGES, sum(snapshot.tables.get(table, 0) for snapshot in everybody), table)
        figures.set(m.RETRIES, sum(counter.conflicts for counter in counters), "conflict")
        total_ms = sum(counter.latency_ms_total for counter in counters)
        figures.distribute(m.LATENCY, _seconds(LATENCY_MS), _latency(everybody), total_ms / 1e3)
        total_us = sum(counter.flush_us_total for counter in counters)
        figures.distribute(m.FLUSH_SECONDS, _seconds(FLUSH_MS), _buckets(everybody, "flush_ms"), total_us / 1e6)
        total = sum(counter.flush_entries_total for counter in counters)
        figures.distribute(m.FLUSH_ENTRIES, FLUSH_ENTRIES, _buckets(everybody, "flush_entries"), total)

    def _full_seconds(self) -> float:
        """Until the stream meets its limit, in entries or in bytes, if it goes on as in the last minute.

        Not from a few readings: whoever starts or catches up moves the stream in leaps.
        """
        if len(self._lengths) < GROWTH_WINDOW // 2:
            return math.inf
        (first_at, first), (last_at, last) = self._lengths[0], self._lengths[-1]
        growth = (last - first) / (last_at - first_at)
        limit: float = self._settings.max_stream_len
        if self._settings.stream_bytes_max is not None and self._bytes and last:
            limit = min(limit, last * self._settings.stream_bytes_max / self._bytes)
        return max(0.0, (limit - last) / growth) if growth > 0 else math.inf


def _charts(max_stream_len: int) -> tuple[Chart, ...]:
    return (
        Chart(title="Events", unit="/s", lines=("appended", "finished")),
        Chart(title="Latency", unit="ms", band=("median", "99 %")),
        Chart(title="Not finished", unit="entries", lines=("to be taken", "in work")),
        Chart(title="Oldest unfinished", unit="s", lines=("oldest",)),
        Chart(title="Stream", unit="entries", lines=("stream",), limit=max_stream_len),
    )


def _workers_told(statuses: Mapping[str, str]) -> list[Worker]:
    """What is not understood is of another release and is left out."""
    found = []
    for owner, text in sorted(statuses.items()):
        try:
            told = msgspec.json.decode(text, type=WorkerStatus)
        except msgspec.MsgspecError:
            continue
        age = time.time() - told.at
        if age < STATUS_STALE_S:
            at_work = [one for one in told.processes if one.name.startswith("worker")]
            rate = sum(one.entries_per_s for one in at_work)
            found.append(Worker(owner, told.version, told.ready, rate, len(at_work), max(0.0, age)))
    return found


def _buckets(snapshots: Sequence[Snapshot], histogram: str) -> tuple[int, ...]:
    """The sum over all processes; empty buckets where there is none yet."""
    empty = (0,) * (len(HISTOGRAMS[histogram]) + 1)
    return tuple(map(sum, zip(empty, *(snapshot.histograms[histogram] for snapshot in snapshots), strict=True)))


def _latency(snapshots: Sequence[Snapshot]) -> tuple[int, ...]:
    return _buckets(snapshots, "latency_ms")


def _seconds(bounds_ms: Sequence[int]) -> list[float]:
    return [ms / 1000 for ms in bounds_ms]


def _since(at_ms: int, now: int) -> float:
    return max(0, now - at_ms) / 1000 if at_ms else 0.0
