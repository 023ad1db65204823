"""What each child reports about itself, in memory that all processes share; parent and monitor only read it.

One anonymous mapping, made before the first fork; one fixed slot per child, written by that child alone. Figures are
aligned 64-bit words, so a look without a lock sees whole numbers; texts may be seen half written, which a person can
live with. Counters outlive their child: the next one in the slot goes on counting, so sums never fall.
"""

from __future__ import annotations

import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import Final

import msgspec

from fastworker.errors import Reason
from fastworker.redact import redact
from fastworker.table.schema import TABLES

REASONS: Final = tuple(Reason)
LATENCY_MS: Final = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1_000, 2_000, 5_000, 10_000)
FLUSH_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000)
FLUSH_ENTRIES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
HISTOGRAMS: Final = {"latency_ms": LATENCY_MS, "flush_ms": FLUSH_MS, "flush_entries": FLUSH_ENTRIES}
"""Upper bounds of the buckets; one more is for everything above. Latency: stream append to ack."""


class State(IntEnum):
    FREE = 0  # nobody has the slot
    STARTING = 1
    RUNNING = 2
    WAITING_FOR_STORE = 3
    WAITING_FOR_STREAM = 4
    DRAINING = 5


class Gauges(msgspec.Struct):
    """Current values; they begin anew with each child. Times are `now_ms()`, 0 for never."""

    pid: int = 0
    state: int = 0
    ready: int = 0  # 1: connected, and working whenever there is something to do
    started_ms: int = 0
    tick_ms: int = 0  # when the child's loop last turned
    progress_ms: int = 0  # when its slowest pipeline last got on: a read, a flush, an attempt
    oldest_ms: int = 0  # when the oldest unsettled entry was read; 0: none is held
    held: int = 0  # entries read and not settled
    acked_per_second: int = 0
    flush_us_last: int = 0
    store_ms: int = 0  # when PostgreSQL last answered
    connections: int = 0  # to PostgreSQL, open
    connections_busy: int = 0
    error_ms: int = 0  # when `error` was written
    debts: int = 0  # what committed transactions owe, by this process' latest look
    debts_put_back: int = 0  # of these, what cannot be paid
    debts_since_ms: int = 0  # when the oldest of the others was owed; 0: there is none
    debts_at_ms: int = 0  # when it looked
    maintained_ms: int = 0  # when owed rows were last recomputed; 0: this process does not do it
    tried_first_ms: int = 0  # ids of the entries that it is trying alone (worker/suspects.py)
    tried_first_n: int = 0
    tried_last_ms: int = 0
    tried_last_n: int = 0
    tried_with_control: int = 0  # 1: it has settled others before
    tried_at_ms: int = 0


class Counters(msgspec.Struct):
    """What has happened in this slot since the supervisor started."""

    starts: int = 0
    read: int = 0
    committed: int = 0
    nothing_to_store: int = 0
    set_aside: int = 0
    claimed: int = 0
    ghosts: int = 0  # pending ids whose entry somebody trimmed
    commits: int = 0
    identities: int = 0
    accounts: int = 0
    syncs: int = 0
    rows: int = 0  # inserted, changed or removed in the primary tables
    superseded: int = 0  # ops that were not the newest
    flushes: int = 0
    flush_us_total: int = 0
    flush_entries_total: int = 0
    latency_ms_total: int = 0
    conflicts: int = 0  # transactions begun again because another writer came first
    restarts: int = 0  # after a crash, a stall or its memory ceiling; counted by the parent, as is the next
    replaced: int = 0  # as an operator asked
    store_retries: int = 0
    stream_retries: int = 0


class Snapshot(msgspec.Struct, frozen=True):
    """One look at one child."""

    slot: int
    name: str
    gauges: Gauges
    counters: Counters
    drops: dict[Reason, int]
    tables: dict[str, int]  # changes written, by table
    histograms: dict[str, tuple[int, ...]]  # by name: how many per bucket, the last one without a bound
    error: str
    consumers: str  # names, separated by spaces
    maintain_error: str
    clocks: str  # which clock is off; empty: they agree
    locked: str = ""  # a sentence about a row that another transaction has locked
    debt: str = ""  # which debt cannot be paid, and why

    @property
    def acked(self) -> int:
        return self.counters.committed + self.counters.nothing_to_store + self.counters.set_aside


_GAUGES: Final = Gauges.__struct_fields__
_COUNTERS: Final = Counters.__struct_fields__
_INDEX: Final = {name: n for n, name in enumerate(_GAUGES + _COUNTERS)}
_DROPS_AT: Final = len(_INDEX)
_TABLES_AT: Final = _DROPS_AT + len(REASONS)
_BUCKETS_AT: Final = _TABLES_AT + len(TABLES)
_BUCKETS: Final = dict(
    zip(
        HISTOGRAMS,
        accumulate((len(bounds) + 1 for bounds in HISTOGRAMS.values()), initial=_BUCKETS_AT),
        strict=False,  # accumulate() yields one more: the end of the last one
    )
)
_WORDS: Final = _BUCKETS_AT + sum(len(bounds) + 1 for bounds in HISTOGRAMS.values())
_TEXTS: Final = {  # offset and bytes
    "name": (0, 40),
    "error": (40, 400),
    "maintain_error": (440, 200),
    "clocks": (640, 160),
    "consumers": (800, 424),
    "locked": (1224, 240),
    "debt": (1464, 240),
}
_SLOT_BYTES: Final = _WORDS * 8 + 1704
_REASON_INDEX: Final = {reason: _DROPS_AT + n for n, reason in enumerate(REASONS)}
_TABLE_INDEX: Final = {table.name: _TABLES_AT + n for n, table in enumerate(TABLES)}


def quantile(bounds: Sequence[int], counts: Sequence[int], share: float) -> int | None:
    """The upper bound of the bucket that holds the share; None where nothing was counted or none is that high."""
    wanted, seen = share * sum(counts), 0
    for bound, count in zip(bounds, counts, strict=False):  # the last bucket has no bound
        seen += count
        if seen >= wanted and count:
            return bound
    return None


def now_ms() -> int:
    """The clock of all slots: one for all processes of a machine, and it never goes back."""
    return time.monotonic_ns() // 1_000_000


class Slot:
    """One child's part of the board. The child writes; `snapshot` may be taken by anybody, at any time."""

    def __init__(self, number: int, memory: memoryview) -> None:
        self.number = number
        self._words = memory[: _WORDS * 8].cast("q")
        self._texts = memory[_WORDS * 8 :]

    def open(self, name: str) -> None:
        """Take the slot for this process: gauges start anew, counters go on."""
        for field in _GAUGES:
            self._words[_INDEX[field]] = 0
        self.text("error", "")
        self.text("maintain_error", "")
        self.text("clocks", "")
        self.text("consumers", "")
        self.text("locked", "")
        self.text("debt", "")
        self.text("name", name)
        now = now_ms()
        self.set(pid=os.getpid(), state=State.STARTING, started_ms=now, tick_ms=now, progress_ms=now)
        self.add(starts=1)

    def close(self) -> None:
        """The parent's part, once the child is gone."""
        for field in _GAUGES:
            self._words[_INDEX[field]] = 0

    def set(self, **figures: int) -> None:
        for name, value in figures.items():
            self._words[_INDEX[name]] = value

    def add(self, **figures: int) -> None:
        for name, value in figures.items():
            self._words[_INDEX[name]] += value

    def get(self, name: str) -> int:
        return self._words[_INDEX[name]]

    def drop(self, reason: Reason, count: int = 1) -> None:
        self._words[_REASON_INDEX[reason]] += count

    def wrote(self, table: str, count: int) -> None:
        self._words[_TABLE_INDEX[table]] += count

    def observe(self, histogram: str, value: int, count: int = 1) -> None:
        self._words[_BUCKETS[histogram] + bisect_left(HISTOGRAMS[histogram], value)] += count

    def text(self, name: str, value: str) -> None:
        at, size = _TEXTS[name]
        self._texts[at : at + size] = value.encode(errors="replace")[:size].ljust(size, b"\0")

    def failed(self, error: BaseException) -> None:
        """Its latest error, for operators. Secrets go before it is cut: half a URL is not seen to be one."""
        self.text("error", redact(f"{type(error).__name__}: {error}"))
        self.set(error_ms=now_ms())

    def snapshot(self) -> Snapshot:
        words = self._words.tolist()
        texts = {
            name: bytes(self._texts[at : at + size]).rstrip(b"\0").decode(errors="replace")
            for name, (at, size) in _TEXTS.items()
        }
        return Snapshot(
            slot=self.number,
            name=texts["name"],
            gauges=Gauges(*words[: len(_GAUGES)]),
            counters=Counters(*words[len(_GAUGES) : _DROPS_AT]),
            drops=dict(zip(REASONS, words[_DROPS_AT:_TABLES_AT], strict=True)),
            tables=dict(zip(_TABLE_INDEX, words[_TABLES_AT:_BUCKETS_AT], strict=True)),
            histograms={name: tuple(words[at : at + len(HISTOGRAMS[name]) + 1]) for name, at in _BUCKETS.items()},
            error=texts["error"],
            consumers=texts["consumers"],
            maintain_error=texts["maintain_error"],
            clocks=texts["clocks"],
            locked=texts["locked"],
            debt=texts["debt"],
        )


class Heartbeats:
    """The board: made by the parent before it forks, inherited by everybody."""

    def __init__(self, slots_max: int = 64) -> None:
        self._memory = memoryview(mmap.mmap(-1, slots_max * _SLOT_BYTES + 16))
        self._parents = self._memory[slots_max * _SLOT_BYTES :].cast("q")
        self._slots = [Slot(n, self._memory[n * _SLOT_BYTES : (n + 1) * _SLOT_BYTES]) for n in range(slots_max)]

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def missing(self) -> int:
        """Processes that should run and do not; written by the parent."""
        return self._parents[0]

    @missing.setter
    def missing(self, count: int) -> None:
        self._parents[0] = count

    @property
    def crashes(self) -> int:
        """Events in which processes ended by themselves, however many at once; written by the parent."""
        return self._parents[1]

    @crashes.setter
    def crashes(self, count: int) -> None:
        self._parents[1] = count

    def snapshot(self) -> list[Snapshot]:
        """Every slot that was ever used, the free ones too: their counters are part of the sums."""
        return [slot.snapshot() for slot in self._slots if slot.get("starts")]
