"""All that a worker's monitor knows at one moment; status.json, /metrics and `fastworker status` render it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fastworker.config import Config
from fastworker.monitor.facts import Backlog, DebtStatus, ProcessStatus
from fastworker.monitor.rates import Written
from fastworker.process.board import HISTOGRAMS, Snapshot, State
from fastworker.reader.stats import ReaderStats
from fastworker.stream.letters import Letter
from fastworker.stream.parts import Stream
from fastworker.sync.told import HistoryStatus, RepairStatus


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
    repair: RepairStatus | None = None
    history: HistoryStatus | None = None


class View(msgspec.Struct, frozen=True, kw_only=True):
    settings: Config
    with_reader: bool
    """The reader is one of this supervisor's children: readiness includes it."""
    owner: str
    http: str  # address of the port; empty: none
    why: list[str]  # it is not ready
    uptime_s: float
    age_s: float  # of the reading
    reading: Reading | None
    ours: Backlog
    groups: Sequence[Backlog]
    finished_per_s: float
    appended_per_s: float | None
    median: str
    p99: str
    full_s: float  # inf: the stream does not grow
    stream_bytes: int | None
    trimmed: int
    everybody: Sequence[Snapshot]  # also the slots of processes that are gone
    memory: Mapping[int, int]  # pid -> PSS
    processes: list[ProcessStatus]
    written: list[Written]
    others: Mapping[str, str]  # what every worker on this stream last told
    debts: DebtStatus | None = None  # what is owed in PostgreSQL; None: nobody has looked yet

    @property
    def children(self) -> list[Snapshot]:
        return [snapshot for snapshot in self.everybody if snapshot.gauges.state != State.FREE]

    @property
    def workers(self) -> list[Snapshot]:
        """Those that process entries: not the monitor itself, nor the reader."""
        return [snapshot for snapshot in self.children if snapshot.name.startswith("worker")]


def buckets(snapshots: Sequence[Snapshot], histogram: str) -> tuple[int, ...]:
    """The sum over all processes; empty buckets where there is none yet."""
    empty = (0,) * (len(HISTOGRAMS[histogram]) + 1)
    return tuple(map(sum, zip(empty, *(snapshot.histograms[histogram] for snapshot in snapshots), strict=True)))


def since_s(at_ms: int, now: int) -> float:
    return max(0, now - at_ms) / 1000 if at_ms else 0.0
