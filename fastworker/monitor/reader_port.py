"""What a reader's figures mean: whether it is well, its metrics, its part of the status page, and its own port.

`up` shows the same of a reader that is another process: its figures come from Redis then, where the reader leaves them
every second.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from fastworker import __version__, metrics
from fastworker.config import Config
from fastworker.metrics import Figures
from fastworker.monitor.facts import ProcessStatus
from fastworker.monitor.history import History
from fastworker.monitor.page import Card, Chart, HttpSettings, Page, Wait, listen, own_pss
from fastworker.monitor.readiness import FRESH_S
from fastworker.reader.resume import read_and_resume
from fastworker.reader.stats import ReaderStats

RATE_TICKS: Final = 5
CHARTS: Final = (
    Chart(title="Frames", unit="/s", lines=("frames", "appended")),
    Chart(title="Cursor's age", unit="s", lines=("age",)),
    Chart(title="Outbox", unit="entries", lines=("outbox",)),
)


def left_in_redis(fields: Mapping[str, str]) -> ReaderStats | None:
    """The figures that a reader left; None when it never did. What is not understood keeps its default."""
    if not fields:
        return None
    names = ReaderStats.__struct_fields__
    given: dict[str, Any] = {name: text for name, text in fields.items() if name in names and text != ""}
    for counts, prefix in (("drops", "drop:"), ("verdicts", "verdict:")):
        given[counts] = {name.removeprefix(prefix): text for name, text in fields.items() if name.startswith(prefix)}
    try:
        return msgspec.convert(given, ReaderStats, strict=False)
    except msgspec.ValidationError:
        return None  # of another release


def trouble(stats: ReaderStats) -> list[str]:
    """Why this reader is not connected, fresh and able to append; empty when it is."""
    if stats.standby:
        return [f"waiting: {stats.last_error or 'another reader is at work, or Redis did not answer yet'}"]
    why = []
    if not stats.connected:
        why.append(f"not connected to the relay: {stats.last_error or 'connecting'}")
    elif stats.silent:
        why.append(f"connected, but no data for {stats.silent_s:.0f} s, which is long for this relay")
    elif stats.behind_s > FRESH_S:
        why.append(f"connected, but for {stats.behind_s:.0f} s all that came lies behind the cursor {stats.last_seq}")
    if stats.full:
        held_by = f", held back by the group {stats.held_by}" if stats.held_by else ""
        why.append(f"the stream is full{held_by}: the reader does not read")
    return why


def cards(stats: ReaderStats, rate: float | None, relays: str = "") -> list[Card]:
    """`rate`: entries appended per second, lately; None where somebody else shows it."""
    now = time.time()
    rates = [] if rate is None else [Card("appended", rate, "entries/s")]
    frame_age = None if stats.last_frame_at is None else max(0.0, now - stats.last_frame_at)
    cursor_age = None if stats.last_event_at is None else max(0.0, now - stats.last_event_at)
    return [
        *rates,
        Card("relay", stats.relay or relays, bad=not stats.connected),
        Card("cursor", str(stats.last_seq) if stats.last_seq is not None else "none"),
        Card("cursor's age", cursor_age, "s"),
        Card("last frame", frame_age, "s ago", bad=stats.silent),
        Card("frames", stats.frames),
        Card("received", stats.bytes, "bytes"),
        Card("entries appended", stats.entries),
        Card("waiting to be appended", stats.outbox_items, bad=stats.full),
        Card("reconnects", stats.reconnects),
        Card("gaps", stats.gaps, bad=stats.gaps > 0),
    ]


def put_figures(figures: Figures, stats: ReaderStats) -> None:
    m, now = metrics, time.time()
    figures.set(m.READER_CONNECTED, stats.connected, stats.relay)
    figures.set(m.READER_SILENT, stats.silent)
    figures.set(m.READER_FRAMES, stats.frames)
    figures.set(m.READER_BYTES, stats.bytes)
    figures.set(m.READER_ENTRIES, stats.entries)
    counts = (stats.commits, stats.identities, stats.accounts, stats.syncs)
    for kind, count in zip(m.FRAME_KINDS, counts, strict=True):
        figures.set(m.READER_EVENTS, count, kind)
    figures.set(m.READER_DUPLICATES, stats.duplicates)
    figures.set(m.READER_RECONNECTS, stats.reconnects)
    figures.set(m.READER_GAPS, stats.gaps)
    figures.set(m.READER_FULL, stats.full)
    figures.set(m.READER_OUTBOX, stats.outbox_items)
    if stats.last_seq is not None:
        figures.set(m.READER_CURSOR, stats.last_seq)
    if stats.last_event_at is not None:
        figures.set(m.READER_CURSOR_AGE, max(0.0, now - stats.last_event_at))
    if stats.last_frame_at is not None:
        figures.set(m.READER_FRAME_AGE, max(0.0, now - stats.last_frame_at))
    figures.set(m.UNVERIFIED, stats.unverified)
    for verdict, count in stats.verdicts.items():
        if verdict in m.VERIFIED.closed:
            figures.set(m.VERIFIED, count, verdict)
    for reason, count in stats.drops.items():
        if reason in m.READER_DROPS.closed:  # else of another release, or of whoever writes to Redis
            figures.set(m.READER_DROPS, count, reason)


async def serve_reader(settings: Config, http: HttpSettings, stop: asyncio.Event) -> None:
    """The reader with its own HTTP port."""
    view = _ReaderView(settings)
    async with AsyncExitStack() as stack:
        await listen(stack, view, http)
        await read_and_resume(settings, stop, stats=view.stats, on_tick=view.tick)


class _ReaderView:
    """The `Source` of the reader's port."""

    def __init__(self, settings: Config) -> None:
        self._settings = settings
        self.stats = ReaderStats()
        self._ticked = self._moved = time.monotonic()
        self._counts: deque[tuple[float, int]] = deque([(self._ticked, 0)], maxlen=RATE_TICKS + 1)
        self._started = self._ticked
        self._frames = (self._ticked, 0)
        self._history = History(("frames", "appended", "outbox", "age"), worst=("outbox", "age"))

    def tick(self, stats: ReaderStats) -> None:
        now = time.monotonic()
        if stats.entries != self._counts[-1][1] or not stats.outbox_items:
            self._moved = now
        self._ticked = now
        last, entries = self._counts[-1]
        self._counts.append((now, stats.entries))
        if now > last:
            (frames_at, frames), self._frames = self._frames, (now, stats.frames)
            age = None if stats.last_event_at is None else max(0.0, time.time() - stats.last_event_at)
            self._history.add(
                time.time(),
                {
                    "frames": (stats.frames - frames) / (now - frames_at),
                    "appended": (stats.entries - entries) / (now - last),
                    "outbox": stats.outbox_items,
                    "age": age,
                },
            )

    @property
    def _rate(self) -> float:
        """Entries appended per second over the last ticks."""
        (first_at, first), (last_at, last) = self._counts[0], self._counts[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0

    def why_not_live(self) -> list[str]:
        return []  # it answers, so its only loop turns

    def why_not_ready(self) -> list[str]:
        stats, now = self.stats, time.monotonic()
        why = trouble(stats)
        if not stats.standby and now - self._moved > FRESH_S:
            why.append(f"frames wait, but none was appended for {now - self._moved:.0f} s: {stats.last_error}")
        if now - self._ticked > FRESH_S:
            why.append(f"Redis did not answer for {now - self._ticked:.0f} s")
        return why

    def status_json(self) -> bytes:
        stats, why = self.stats, self.why_not_ready()
        process = ProcessStatus(
            name="reader",
            pid=os.getpid(),
            state="standby" if stats.standby else "connected" if stats.connected else "connecting",
            ready=not why,
            entries=stats.entries,
            entries_per_s=self._rate,
            memory_bytes=own_pss(),
            error=stats.last_error if why else "",
        )
        return msgspec.json.encode(
            Page(
                version=__version__,
                service="reader",
                at=time.time(),
                uptime_s=time.monotonic() - self._started,
                age_s=time.monotonic() - self._ticked,
                ready=not why,
                why=why,
                charts=CHARTS,
                waits=[Wait("entries to be appended", stats.outbox_items, None, bad=stats.full)],
                cards={"Now": cards(stats, self._rate, ", ".join(self._settings.relay_urls))},
                processes=[process],
                drops=stats.drops,
            )
        )

    def history_json(self) -> bytes:
        return self._history.json()

    def figures(self) -> Figures:
        m, figures, stats = metrics, Figures(metrics.READER_METRICS), self.stats
        figures.set(m.BUILD, 1, __version__)
        figures.set(m.READY, not self.why_not_ready())
        figures.set(m.MEMORY, own_pss(), "reader")
        figures.set(m.STREAM_ENTRIES_MAX, self._settings.max_stream_len)
        figures.set(m.STREAM_TRIMMED, stats.trimmed)
        put_figures(figures, stats)
        return figures
