"""The monitor: one small process that watches the workers, so that they need not.

It reads the children's board and Redis every second, removes what every group has finished, logs the rate, answers
HTTP, and leaves its findings in Redis for `fastworker status`. Readiness means progress: connected, fresh, and
finishing entries while there are any. Nothing here touches an entry. What it knows at a moment is a `View`; others
render it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from fastworker import __version__
from fastworker.config import Config
from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.metrics import Figures
from fastworker.monitor.cards import page_of
from fastworker.monitor.facts import (
    Backlog,
    ProcessStatus,
    WorkerStatus,
    backlog,
    debts_of,
    told_history,
    told_repairs,
)
from fastworker.monitor.history import History
from fastworker.monitor.page import HttpSettings, listen, pss
from fastworker.monitor.prometheus import figures_of
from fastworker.monitor.rates import Rates, Sample
from fastworker.monitor.reader_port import left_in_redis, trouble
from fastworker.monitor.readiness import FRESH_S, Facts, Refused, Watch, postgres_away, process_of, readiness
from fastworker.monitor.view import Reading, View, buckets, since_s
from fastworker.process.backoff import pause
from fastworker.process.board import Heartbeats, Snapshot, State, now_ms
from fastworker.process.outage import Outage, span
from fastworker.redact import redact
from fastworker.stream.admin import STATUS_STALE_S, RedisAdmin
from fastworker.stream.client import connect
from fastworker.stream.feed import trim_finished
from fastworker.stream.keys import Keys
from fastworker.stream.letters import line_of
from fastworker.stream.repairs import told
from fastworker.stream.skipped import give_skipped

log = logging.getLogger(__name__)

READ_S: Final = 1.0
PUBLISH_EVERY: Final = 2  # readings
LOG_EVERY: Final = 5
MEASURE_EVERY: Final = 5
STUCK_S: Final = 30.0
"""Liveness: a child's loop turns at least this often; the supervisor replaces it earlier."""
LETTERS_SHOWN: Final = 5
HISTORY: Final = ("finished", "appended", "to be taken", "in work", "oldest", "median", "99 %", "stream", "age")
WORST: Final = ("oldest", "median", "99 %", "age")


async def run_monitor(
    settings: Config,
    http: HttpSettings,
    heartbeats: Heartbeats,
    stop: asyncio.Event,
    *,
    with_reader: bool,
    on_ready: Callable[[], None],
) -> None:
    """Monitor the worker's processes until `stop`. Raises Unreachable when the chosen port is taken.

    `with_reader`: the reader is one of this supervisor's children, and readiness includes it.
    """
    redis = connect(
        settings.redis_url, stream_key=settings.stream_key, client_name="fastworker-monitor", max_connections=2
    )
    admin = RedisAdmin(redis, settings.stream_key)
    try:
        await _WorkerMonitor(settings, http, heartbeats, admin, with_reader=with_reader).run(stop, on_ready)
    finally:
        await redis.aclose()


class _Outages:
    """Of both servers, for the log."""

    def __init__(self) -> None:
        self._redis, self._refused, self._postgres = Outage("Redis"), Refused(), Outage("PostgreSQL")

    def look(self, error: str, workers: list[Snapshot], what_waits: str) -> None:
        """`error`: why Redis cannot be read from here."""
        now = now_ms()
        refused = self._refused.look([process_of(one, now) for one in workers], time.monotonic())
        self._redis.look(error or refused or None, "nothing is read or written; the relay keeps one to three days")
        if error:  # nobody asks PostgreSQL meanwhile, so no answer is expected
            return
        away = next((why for one in workers if (why := postgres_away(process_of(one, now))) is not None), None)
        answered_at = max((one.gauges.store_ms for one in workers), default=0) / 1000
        self._postgres.look(away, what_waits, answered_at=answered_at)


class _WorkerMonitor:
    """Also the `Source` of the HTTP answers."""

    def __init__(
        self, settings: Config, http: HttpSettings, heartbeats: Heartbeats, admin: RedisAdmin, *, with_reader: bool
    ) -> None:
        self._settings = settings
        self._http = http
        self._with_reader = with_reader
        self._heartbeats = heartbeats
        self._admin = admin
        self._owner = f"{socket.gethostname()}:{os.getppid()}"
        self._started = time.monotonic()
        self._reading: Reading | None = None
        self._error = ""
        self._rates = Rates()
        self._trimmed = 0
        self._bytes: int | None = None
        self._memory: dict[int, int] = {}  # pid -> PSS
        self._watch = Watch()
        self._reader_moved = (0, self._started)
        self._port: int | None = None
        self._outages = _Outages()
        self._others: dict[str, str] = {}  # what every worker on this stream last told
        self._history = History(HISTORY, worst=WORST)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        async with AsyncExitStack() as stack:
            self._port = await listen(stack, self, self._http)
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
                self._outages.look(self._error, self._workers(), self._what_waits())
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
        await give_skipped(admin.redis, Keys(settings.stream_key, settings.group), settings.group)
        trimmed = await trim_finished(
            admin.redis,
            settings.stream_key,
            settings.ignore_groups,
            group=settings.group,
            keep_s=settings.keep_s,
            max_stream_len=settings.max_stream_len,
            partitions=(await admin.parts.layout()).known,
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
        letters = await admin.letters.newest(LETTERS_SHOWN)
        self._reading = Reading(
            at=time.monotonic(),
            time_ms=await admin.time_ms(),
            stream=stream,
            ledger=count.ledger,
            unaccounted=count.unaccounted,
            events=await admin.event_counts(),
            dead_letters=await admin.letters.count() if letters else 0,
            newest_letters=[line_of(*letter) for letter in letters],
            reader=left_in_redis(left),
            reader_age_s=max(0.0, time.time() - int(left.get("at") or 0) / 1000),
            repair=told_repairs(await told(admin, admin.keys.repair_status)),
            history=told_history(await told(admin, admin.keys.history_status)),
        )
        self._rates.add_length(self._reading.at, stream.length if stream else 0)
        if measure:
            self._memory = {pid: pss(pid) for pid in (os.getppid(), *(one.gauges.pid for one in self._children()))}
        if turn % PUBLISH_EVERY == 0:
            await admin.put_status(self._owner, msgspec.json.encode(_status(self._view())))
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
        """Keep samples for rates and readiness."""
        snapshots = self._heartbeats.snapshot()
        now = time.monotonic()
        reading = self._reading
        finished: dict[str, int] = {}
        tables: Counter[str] = Counter()
        for snapshot in snapshots:
            finished[snapshot.name] = finished.get(snapshot.name, 0) + snapshot.acked
            tables.update(snapshot.tables)
        added = reading.stream.entries_added if reading and reading.stream else None
        self._rates.add(Sample(now, finished, buckets(snapshots, "latency_ms"), added, tables))
        ours = self._backlog()
        self._watch.look(
            now,
            snapshots,
            missing=self._heartbeats.missing,
            crashes=self._heartbeats.crashes,
            is_work=any(snapshot.gauges.held for snapshot in snapshots) or ours.lag > 0,
            pending_id=ours.pending_id,
            behind_s=ours.unfinished_s,
        )
        stats = self._reading.reader if self._reading else None
        if stats is not None and (stats.entries != self._reader_moved[0] or not stats.outbox_items):
            self._reader_moved = stats.entries, now

    def _backlog(self) -> Backlog:
        """Of our group, by the latest reading."""
        reading = self._reading
        return backlog(reading.stream if reading else None, self._settings.group, reading.time_ms if reading else None)

    def why_not_live(self) -> list[str]:
        return self._stuck(STUCK_S)

    def _stuck(self, longest_s: float) -> list[str]:
        ages = [(snapshot.name, (now_ms() - snapshot.gauges.tick_ms) / 1000) for snapshot in self._children()]
        return [f"{name}: its loop has not turned for {age:.0f} s" for name, age in ages if age > longest_s]

    def why_not_ready(self) -> list[str]:
        """Each condition that does not hold, as a sentence."""
        return readiness(self._facts())

    def _facts(self) -> Facts:
        now, reading = time.monotonic(), self._reading
        facts = self._watch.facts(now, self._heartbeats.snapshot(), now_ms(), self._heartbeats.missing)
        return msgspec.structs.replace(
            facts,
            redis_s=now - reading.at if reading else now - self._started + FRESH_S,
            redis_error=self._error,
            reader=self._reader_trouble(reading, now) if reading and self._with_reader else [],
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

    def _what_waits(self) -> str:
        """As of the latest reading."""
        ours, full = self._backlog(), self._full_s()
        count = ours.lag + ours.pending
        return f"{count:,} entries wait" + (f", full in {span(full)}" if math.isfinite(full) else "")

    def _log(self) -> None:
        """The line that operators grep for; nothing while nothing happens."""
        if rate := self._rates.since_last_told():
            log.info("Processed %s events (~%s events/sec)", f"{self._rates.total:,}", f"{rate:,.0f}")

    def _processes(self) -> list[ProcessStatus]:
        now = now_ms()
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
                entries_per_s=self._rates.finished_per_s(snapshot.name),
                flushes=snapshot.counters.flushes,
                flush_ms=gauges.flush_us_last / 1000,
                rows=snapshot.counters.rows,
                oldest_unflushed_s=since_s(gauges.oldest_ms, now),
                progress_age_s=since_s(gauges.progress_ms, now),
                memory_bytes=self._memory.get(gauges.pid),
                restarts=restarts[snapshot.name],
                replaced=replaced[snapshot.name],
                error=snapshot.error,
                error_age_s=since_s(gauges.error_ms, now) if gauges.error_ms else None,
            )
            for snapshot in self._children()
        ]
        stats = self._reading.reader if self._reading else None
        if stats is None:
            return shown
        reader: dict[str, Any] = {"entries": stats.entries, "entries_per_s": self._rates.appended_per_s() or 0.0}
        reader |= {"error": redact(stats.last_error) if trouble(stats) else ""}
        return [msgspec.structs.replace(one, **reader) if one.name == "reader" else one for one in shown]

    def _full_s(self) -> float:
        settings = self._settings
        return self._rates.full_s(settings.max_stream_len, settings.stream_bytes_max, self._bytes)

    def _view(self) -> View:
        now, reading, http = time.monotonic(), self._reading, self._http
        stream = reading.stream if reading else None
        return View(
            settings=self._settings,
            with_reader=self._with_reader,
            owner=self._owner,
            http=f"{http.host}:{self._port}" if self._port is not None else "",
            why=self.why_not_ready(),
            uptime_s=now - self._started,
            age_s=now - (reading.at if reading else self._started),
            reading=reading,
            ours=self._backlog(),
            groups=[backlog(stream, one.name, reading.time_ms) for one in stream.groups] if reading and stream else [],
            finished_per_s=self._rates.finished_per_s(),
            appended_per_s=self._rates.appended_per_s(),
            median=self._rates.latency_below(0.5),
            p99=self._rates.latency_below(0.99),
            full_s=self._full_s(),
            stream_bytes=self._bytes,
            trimmed=self._trimmed,
            everybody=self._heartbeats.snapshot(),
            memory=self._memory,
            processes=self._processes(),
            written=self._rates.written(),
            others=self._others,
            debts=debts_of(self._workers(), now_ms()),
        )

    def status_json(self) -> bytes:
        return msgspec.json.encode(page_of(self._view()))

    def figures(self) -> Figures:
        return figures_of(self._view())

    def history_json(self) -> bytes:
        return self._history.json()

    def _remember(self) -> None:
        """One second of history: what changed since the last one, and how things stand."""
        if not (changes := self._rates.latest()):
            return
        reading, ours = self._reading, self._backlog()
        fresh = reading is not None and time.monotonic() - reading.at < FRESH_S
        here = fresh and reading is not None and reading.stream is not None
        stands = {
            "to be taken": ours.lag if here else None,
            "in work": ours.pending if here else None,
            "oldest": ours.unfinished_s if here else None,
            "stream": reading.stream.length if reading and reading.stream else 0,
        }
        if not fresh:
            changes["appended"] = stands["stream"] = None
        stats = reading.reader if fresh and reading is not None else None
        event_at = stats.last_event_at if stats is not None else None
        stands["age"] = None if event_at is None else max(0.0, time.time() - event_at)
        self._history.add(time.time(), changes | stands)


def _status(view: View) -> WorkerStatus:
    return WorkerStatus(
        owner=view.owner,
        at=time.time(),
        version=__version__,
        ready=not view.why,
        why=view.why,
        connections_max=view.settings.pool_size,
        connections_open=sum(snapshot.gauges.connections for snapshot in view.workers),
        stream_full_s=view.full_s if math.isfinite(view.full_s) else None,
        processes=view.processes,
        written_per_s={one.table: round(one.per_s, 2) for one in view.written if one.per_s >= 0.005},
        http=view.http,
        debts=view.debts,
    )
