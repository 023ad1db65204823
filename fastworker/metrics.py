"""The closed set of metrics: name, kind, labels and why each is there. Plain numbers; no library, no clock.

Dashboards and alert rules are checked against this list. Counters come from the ledger in Redis where they can, so
that they survive the processes that count. Series with a closed set of labels exist, at zero, from the first second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from fastworker.errors import Reason
from fastworker.table.schema import TABLES

OUTCOMES: Final = ("committed", "nothing_to_store", "set_aside", "ghosts")
KINDS: Final = ("#commit", "#identity", "#account")


class Metric(msgspec.Struct, frozen=True):
    """`closed`: every value that the (only) label can have. `why` is the series' help text."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    why: str
    labels: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def _counter(name: str, why: str, *labels: str, closed: tuple[str, ...] = ()) -> Metric:
    return Metric(f"fastworker_{name}_total", "counter", why, labels, closed)


def _gauge(name: str, why: str, *labels: str, closed: tuple[str, ...] = ()) -> Metric:
    return Metric(f"fastworker_{name}", "gauge", why, labels, closed)


BUILD = _gauge("build_info", "Always 1; which release runs.", "version")
READY = _gauge("ready", "1 when connected, fresh and progressing: what /readyz answers.")

# The stream and the group, from Redis.
STREAM_ENTRIES = _gauge("stream_entries", "Entries on the stream; trimming removes only what every group finished.")
STREAM_ENTRIES_MAX = _gauge("stream_entries_max", "REDIS_MAX_STREAM_LEN: at this length the reader waits.")
STREAM_BYTES = _gauge("stream_bytes", "Memory of the stream in Redis, sampled.")
STREAM_FULL_SECONDS = _gauge(
    "stream_full_seconds", "Seconds until the stream is full at the present growth; +Inf when it does not grow."
)
STREAM_TRIMMED = _counter("stream_trimmed", "Finished entries that this process removed from the stream.")
LAG_ENTRIES = _gauge("lag_entries", "Entries that no consumer of the group was given yet.")
LAG_SECONDS = _gauge("lag_seconds", "Age of the oldest entry of the stream that the group has not finished.")
GROUP_LAG = _gauge(
    "group_lag_entries", "As lag_entries, for every group on the stream: one that stands holds it.", "group"
)
PENDING = _gauge("pending_entries", "Entries that a consumer of the group has and did not ack yet.")
PENDING_AGE = _gauge("oldest_pending_seconds", "Age of the oldest of them; grows when a flush hangs or a worker died.")
DEAD_LETTERS = _gauge("dead_letters", "Entries in firehose:dead-letters; each waits for a person.")

# What became of entries, from the ledger that the ack scripts keep.
ENTRIES = _counter(
    "entries", "Entries finished by fastworker, by outcome; counted at the ack.", "outcome", closed=OUTCOMES
)
EVENTS = _counter(
    "events", "Events finished on the stream by kind, as cluster:metrics counts them.", "kind", closed=KINDS
)
DROPS = _counter("drops", "Ops dropped and entries set aside, by reason.", "reason", closed=tuple(map(str, Reason)))
UNACCOUNTED = _gauge("unaccounted_entries", "Entries delivered but in no outcome and not pending; 0 unless others ack.")

# The worker's processes, from shared memory.
PROCESSES = _gauge("processes", "Worker processes by state.", "state")
RESTARTS = _counter("process_restarts", "Processes that were replaced after a crash, a stall or their memory ceiling.")
MEMORY = _gauge(
    "process_memory_bytes", "Proportional set size of each process; shared pages are shared out.", "process"
)
FLUSHES = _counter("flushes", "Transactions that wrote a batch.")
FLUSH_TIME = _counter("flush_seconds", "Time spent in them; divided by flushes: the mean flush.")
LAST_FLUSH = _gauge("last_flush_seconds", "Length of the latest flush of each process.", "process")
UNSETTLED_AGE = _gauge("oldest_unsettled_seconds", "Age since its read of the oldest entry a process holds.", "process")
HELD = _gauge("held_entries", "Entries that a process has read and not settled.", "process")
PROGRESS_AGE = _gauge("progress_age_seconds", "Seconds since the slowest pipeline of a process got on.", "process")
CHANGES = _counter("changes", "Records written or deleted, by table.", "table", closed=tuple(t.name for t in TABLES))
ROWS = _counter("rows", "Rows inserted, changed or removed in the primary tables.")
SUPERSEDED = _counter("superseded", "Ops that were not the newest of their record.")
CLAIMED = _counter("claimed", "Entries adopted from consumers that died.")
RETRIES = _counter("retries", "Attempts repeated because of a server.", "server", closed=("postgresql", "redis"))
LATENCY = Metric("fastworker_latency_seconds", "histogram", "From the append of an entry to its ack.")
CONNECTIONS_MAX = _gauge("connections_max", "DB_POOL_SIZE: most PostgreSQL connections of this worker.")

# The reader.
READER_CONNECTED = _gauge("reader_connected", "1 while the WebSocket is open.", "relay")
READER_FRAMES = _counter("reader_frames", "Frames received.")
READER_BYTES = _counter("reader_bytes", "Bytes of frames received.")
READER_ENTRIES = _counter("reader_entries", "Entries appended to the stream.")
READER_DUPLICATES = _counter("reader_duplicates", "Frames at or below the cursor, skipped.")
READER_RECONNECTS = _counter("reader_reconnects", "Connections that ended without being asked to.")
READER_GAPS = _counter("reader_gaps", "Stretches that the relay did not give us; recorded in fastworker:gaps.")
READER_DROPS = _counter(
    "reader_drops", "Frames and ops the reader dropped, by reason.", "reason", closed=tuple(map(str, Reason))
)
READER_CURSOR = _gauge("reader_cursor", "Newest seq that is on the stream.")
READER_FRAME_AGE = _gauge("reader_frame_age_seconds", "Seconds since the newest frame.")
READER_FULL = _gauge("reader_waits_for_room", "1 while the stream is full and the reader does not read.")
READER_OUTBOX = _gauge("reader_outbox_entries", "Entries received and not appended yet.")

METRICS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class Figures:
    """One reading of all metrics. Those that nobody set have no series, except at zero where labels are closed."""

    def __init__(self, metrics: tuple[Metric, ...]) -> None:
        self._values: dict[Metric, dict[tuple[str, ...], float]] = {
            metric: {(label,): 0.0 for label in metric.closed} for metric in metrics
        }

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """For a histogram the label is a bucket's upper bound, and the value what lies at or below it."""
        self._values[metric][labels] = value

    def __iter__(self) -> Iterator[tuple[Metric, dict[tuple[str, ...], float]]]:
        return iter(self._values.items())


_READER_ONLY: Final = frozenset(metric for metric in METRICS if metric.name.startswith("fastworker_reader_"))
COMMON: Final = (BUILD, READY, STREAM_ENTRIES_MAX, STREAM_TRIMMED, MEMORY)
READER_METRICS: Final = tuple(m for m in METRICS if m in _READER_ONLY or m in COMMON)
WORKER_METRICS: Final = tuple(m for m in METRICS if m not in _READER_ONLY)
