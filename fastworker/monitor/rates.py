"""What changes: rates, latency and growth, from samples that are taken once a second. No I/O."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

import msgspec

from fastworker.process.board import LATENCY_MS, quantile
from fastworker.table.schema import COLLECTIONS

WINDOW: Final = 60  # samples kept: growth and latency are over all of them
RATE_WINDOW: Final = 5  # samples that a rate is over
MINUTE_S: Final = 60.0


def per_s(before: int | None, now: int | None, seconds: float) -> float | None:
    """Of two counts; None where one is not known. A counter that began again is no negative rate."""
    if before is None or now is None or seconds <= 0:
        return None
    return max(0, now - before) / seconds


class Sample(msgspec.Struct, frozen=True):
    """Totals at one moment."""

    at: float  # monotonic
    finished: dict[str, int]  # entries, by process; one that was replaced goes on counting under its name
    latency: tuple[int, ...]
    added: int | None  # entries ever appended to the stream
    tables: Mapping[str, int]  # changes ever written

    @property
    def total(self) -> int:
        return sum(self.finished.values())


class Written(msgspec.Struct, frozen=True):
    """Changes of one table. `last_hour`: less where the monitor is younger, which SIGHUP replaces."""

    table: str
    collections: tuple[str, ...]
    per_s: float
    last_hour: int


class Rates:
    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=WINDOW)
        self._lengths: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._minutes: deque[tuple[float, Mapping[str, int]]] = deque(maxlen=60)

        self._told: Sample | None = None

    def add(self, sample: Sample) -> None:
        """The first one is where rates begin: its totals may be those of a monitor before this one."""
        self._samples.append(sample)
        self._told = self._told or sample
        if not self._minutes or sample.at - self._minutes[-1][0] > MINUTE_S:
            self._minutes.append((sample.at, sample.tables))

    def add_length(self, at: float, length: int) -> None:
        """Of the stream; only when it could be read."""
        self._lengths.append((at, length))

    @property
    def total(self) -> int:
        return self._samples[-1].total if self._samples else 0

    def since_last_told(self) -> float:
        """Entries finished per second since the last call; 0 where nothing was."""
        if self._told is None or self._told is (last := self._samples[-1]):
            return 0.0
        before, self._told = self._told, last
        return per_s(before.total, last.total, last.at - before.at) or 0.0

    def _ends(self) -> tuple[Sample, Sample] | None:
        if len(self._samples) < 2:
            return None
        return self._samples[-min(len(self._samples), RATE_WINDOW + 1)], self._samples[-1]

    def finished_per_s(self, name: str | None = None) -> float:
        """Entries per second over the last samples, by one process or by all; 0 where it is not known."""
        if (ends := self._ends()) is None:
            return 0.0
        first, last = ends
        if name is None:
            return per_s(first.total, last.total, last.at - first.at) or 0.0
        return per_s(first.finished.get(name, 0), last.finished.get(name), last.at - first.at) or 0.0

    def appended_per_s(self) -> float | None:
        """None where the server does not count (Redis 6.2)."""
        if (ends := self._ends()) is None:
            return None
        return per_s(ends[0].added, ends[1].added, ends[1].at - ends[0].at)

    def latest(self) -> dict[str, float | None]:
        """Between the last two samples: one point of the history; empty where there is none."""
        if len(self._samples) < 2 or (last := self._samples[-1]).at <= (before := self._samples[-2]).at:
            return {}
        latency = [now - then for now, then in zip(last.latency, before.latency, strict=True)]
        return {
            "finished": per_s(before.total, last.total, last.at - before.at),
            "appended": per_s(before.added, last.added, last.at - before.at),
            "median": quantile(LATENCY_MS, latency, 0.5),
            "99 %": quantile(LATENCY_MS, latency, 0.99),
        }

    def latency_below(self, share: float) -> str:
        """What that share of the last minute's entries stayed under."""
        ends = (self._samples[0], self._samples[-1]) if self._samples else None
        counts = [now - then for then, now in zip(ends[0].latency, ends[1].latency, strict=True)] if ends else []
        if not any(counts):
            return "no entry lately"
        bound = quantile(LATENCY_MS, counts, share)
        return f"over {LATENCY_MS[-1]:,} ms" if bound is None else f"under {bound:,} ms"

    def full_s(self, max_len: int, bytes_max: int | None, stream_bytes: int | None) -> float:
        """Until the stream meets its limit, in entries or in bytes, if it goes on as in the last minute.

        Not from a few samples: at a start, or while a worker catches up, the length changes in leaps.
        """
        if len(self._lengths) < WINDOW // 2:
            return math.inf
        (first_at, first), (last_at, last) = self._lengths[0], self._lengths[-1]
        growth = (last - first) / (last_at - first_at)
        limit: float = max_len
        if bytes_max is not None and stream_bytes and last:
            limit = min(limit, last * bytes_max / stream_bytes)
        return max(0.0, (limit - last) / growth) if growth > 0 else math.inf

    def written(self) -> list[Written]:
        """By table: lately, and over the last hour; the busiest table first."""
        if not self._samples:
            return []
        now = self._samples[-1].tables
        first_at, first = self._minutes[-min(2, len(self._minutes))]
        hour_ago = self._minutes[0][1]
        passed = max(self._samples[-1].at - first_at, 1.0)
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
            for name, count in Counter(now).most_common()
            if count
        ]
