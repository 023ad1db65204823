"""The closed set of metrics: name, kind, labels and why each is there. Plain numbers; no library, no clock.

Dashboards and alert rules are checked against this list. Counters come from the ledger in Redis where they can, so
that they survive the processes that count. Series with a closed set of labels exist, at zero, from the first second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final, Literal

import msgspec

from fastworker.errors import Reason
from fastworker.event.proof import Verdict
from fastworker.table.schema import TABLES

OUTCOMES: Final = ("committed", "nothing_to_store", "set_aside", "ghosts")
KINDS: Final = ("#commit", "#identity", "#account")
FRAME_KINDS: Final = (*KINDS, "#sync")


class Metric(msgspec.Struct, frozen=True):
    """`closed`: every value that the (only) label can have. `why` is the series' help text."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    why: str
    labels: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def _histogram(name: str, why: str) -> Metric:
    return Metric(f"fastworker_{name}", "histogram", why)


def _counter(name: str, why: str, *labels: str, closed: tuple[str, ...] = ()) -> Metric:
    return Metric(f"fastworker_{name}_total", "counter", why, labels, closed)


def _gauge(name: str, why: str, *labels: str, closed: tuple[str, ...] = ()) -> Metric:
    return Metric(f"fastworker_{name}", "gauge", why, labels, closed)


# Of every service.
BUILD = _gauge("build_info", "Always 1; which release runs.", "version")
READY = _gauge("ready", "1 when connected, fresh and progressing: what /readyz answers.")

MEMORY = _gauge(
    "process_memory_bytes", "Proportional set size of each process; shared pages are shared out.", "process"
)

# The stream and the group, from Redis.
REDIS_AGE = _gauge(
    "redis_answer_age_seconds", "Seconds since Redis last answered; the figures from Redis are as old as this."
)
STREAM_ENTRIES = _gauge("stream_entries", "Entries on the stream; trimming removes only what every group finished.")
STREAM_ENTRIES_MAX = _gauge("stream_entries_max", "REDIS_MAX_STREAM_LEN: at this length the reader waits.")
STREAM_BYTES = _gauge("stream_bytes", "Memory of the stream in Redis, sampled.")
STREAM_FULL_SECONDS = _gauge(
    "stream_full_seconds",
    "Seconds until the stream meets its limit at the growth of the last minute; +Inf when it does not grow.",
)
STREAM_TRIMMED = _counter("stream_trimmed", "Finished entries that this process removed from the stream.")
LAG_ENTRIES = _gauge("lag_entries", "Entries of the stream that no consumer of the group has read yet.")
LAG_SECONDS = _gauge("lag_seconds", "Age of the oldest entry of the stream that the group has not finished.")
GROUP_LAG = _gauge(
    "group_lag_entries",
    "As lag_entries, for the 20 groups with the most; a group that does not read keeps the stream from being trimmed.",
    "group",
)
PARTITION_LAG = _gauge(
    "partition_lag_entries",
    "As lag_entries, by partition of the stream, where it has several; one alone: an account writes very much.",
    "partition",
)
PENDING = _gauge("pending_entries", "Entries that a consumer of the group has read and not acknowledged yet.")
PENDING_AGE = _gauge(
    "oldest_pending_seconds",
    "Age of the oldest pending entry since its append; also high while a backlog is worked off.",
)
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
REPLACED = _counter("process_replacements", "Processes that were replaced because an operator asked (SIGHUP).")
FLUSH_SECONDS = _histogram("flush_seconds", "Time that one flush took in PostgreSQL, retries included.")
FLUSH_ENTRIES = _histogram("flush_entries", "Entries of one flush.")
LAST_FLUSH = _gauge("last_flush_seconds", "Length of the latest flush of each process.", "process")
UNSETTLED_AGE = _gauge(
    "oldest_unsettled_seconds", "Seconds since a process read the oldest entry that it has not finished.", "process"
)
HELD = _gauge("held_entries", "Entries that a process has read and not finished.", "process")
PROGRESS_AGE = _gauge(
    "progress_age_seconds", "Seconds since the slowest pipeline of a process last made progress.", "process"
)
CHANGES = _counter(
    "changes", "Records written or deleted, by table.", "table", closed=tuple(sorted(t.name for t in TABLES))
)
ROWS = _counter("rows", "Rows inserted, changed or removed in the primary tables.")
SUPERSEDED = _counter("superseded", "Ops that were not written, because a newer one of the same record is known.")
CLAIMED = _counter("claimed", "Entries claimed from consumers that died.")
RETRIES = _counter(
    "retries",
    "Attempts repeated: a server could not serve, or another writer came first (deadlocks are part of that).",
    "cause",
    closed=("postgresql", "redis", "conflict"),
)
LATENCY = _histogram("latency_seconds", "From the append of an entry to its ack.")
STORE_AGE = _gauge(
    "postgresql_answer_age_seconds", "Seconds since PostgreSQL last answered a process; asked every two seconds.",
    "process",
)  # fmt: skip
CONNECTIONS = _gauge(
    "connections", "PostgreSQL connections of the worker processes: open, and of these at work.", "state",
    closed=("open", "busy"),
)  # fmt: skip
CONNECTIONS_MAX = _gauge("connections_max", "DB_POOL_SIZE: most PostgreSQL connections of this worker.")

DEBTS = _gauge("debts", "Counters and joined rows that committed transactions owe in PostgreSQL.")
DEBT_AGE = _gauge(
    "oldest_debt_seconds",
    "Seconds since the oldest of these was owed, of those that are not put back; a second unless something is wrong.",
)
DEBTS_PUT_BACK = _gauge(
    "debts_put_back", "Debts that PostgreSQL refuses: their counters are off until somebody mends the reason."
)

# The syncer (FASTWORKER_SYNC), by what it left in Redis.
GAPS_OPEN = _gauge("gaps_open", "Gaps in fastworker.gaps that are not closed: their accounts are not all repaired.")
REPAIRS_WAITING = _gauge("repairs_waiting", "Accounts that wait to be settled; backfills are not among them.")
REPAIR_OLDEST = _gauge("repair_oldest_seconds", "Seconds since the oldest repair that is not done was asked for.")
REPAIRS_REFUSED = _gauge("repairs_refused", "Repairs that were given up; fastworker.repos.error says why.")
REPAIRS_MENDED = _gauge("repair_differences", "Differences that repairs mended in the last day, by reason.", "reason")
TRUTH = _gauge(
    "truth_ratio", "Share of the rows of each table that agree with the repositories, by the samples of the last day.",
    "table",
)  # fmt: skip
TRUTH_LOW = _gauge("truth_low", "Lower end of the 95 % interval (Wilson) of truth_ratio.", "table")
TRUTH_SAMPLES = _gauge("truth_samples", "Accounts sampled in the last day.")

# History (docs/history.md), by what those who work on it left in Redis.
HISTORY_ACCOUNTS = _gauge("history_accounts", "Accounts that backfills ever asked for, by where they are.", "state")
HISTORY_ACCOUNTS_RATE = _gauge("history_accounts_per_second", "Accounts at their end, over the last five minutes.")
HISTORY_RECORDS_RATE = _gauge("history_records_per_second", "Records of these, compared and written.")
HISTORY_BYTES_RATE = _gauge("history_bytes_per_second", "Bytes of these repositories.")
HISTORY_LEFT = _gauge("history_left_seconds", "Seconds until history is done, at that rate; none where nobody knows.")
HISTORY_RESTING = _gauge("history_hosts_resting", "Hosts that asked for a pause, or failed: their accounts wait.")
HISTORY_PAUSED = _gauge("history_paused", "1 after `fastworker backfill --pause`.")

# The reader.
READER_CONNECTED = _gauge("reader_connected", "1 while the WebSocket is open.", "relay")
READER_FRAMES = _counter("reader_frames", "Frames received.")
READER_BYTES = _counter("reader_bytes", "Bytes of frames received.")
READER_ENTRIES = _counter("reader_entries", "Entries appended to the stream.")
READER_EVENTS = _counter("reader_events", "Events received, by kind.", "kind", closed=FRAME_KINDS)
READER_DUPLICATES = _counter("reader_duplicates", "Frames at or below the cursor, skipped.")
READER_RECONNECTS = _counter(
    "reader_reconnects", "Connections to the relay that ended although the reader did not close them."
)
READER_GAPS = _counter(
    "reader_gaps", "Gaps: stretches of events that the relay no longer had; recorded in fastworker:gaps."
)
READER_DROPS = _counter(
    "reader_drops", "Frames and ops the reader dropped, by reason.", "reason", closed=tuple(map(str, Reason))
)
VERIFIED = _counter(
    "verify", "Commits by what their proofs say (docs/proofs.md).", "verdict", closed=tuple(map(str, Verdict))
)
UNVERIFIED = _gauge(
    "unverified_entries", "Commits set aside in fastworker:unverified until their account's key was asked for again."
)
READER_CURSOR = _gauge("reader_cursor", "Newest seq that is on the stream.")
READER_CURSOR_AGE = _gauge(
    "reader_cursor_age_seconds", "How far the reader is behind: age of the newest event, by the relay's clock."
)
READER_SILENT = _gauge("reader_silent", "1 when no frame came for long against the relay's own recent rate.")
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
        self._sums: dict[Metric, float] = {}

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        self._values[metric][labels] = value

    def distribute(self, metric: Metric, bounds: Iterable[float], counts: Iterable[int], total: float) -> None:
        """A histogram: how many in each bucket, the last one without a bound, and the sum of all values."""
        uppers = [*map(str, bounds), "+Inf"]
        for upper, below in zip(uppers, accumulate(counts), strict=True):
            self._values[metric][upper,] = below
        self._sums[metric] = total

    def sum_of(self, metric: Metric) -> float:
        return self._sums.get(metric, 0.0)

    def __iter__(self) -> Iterator[tuple[Metric, dict[tuple[str, ...], float]]]:
        return iter(self._values.items())


_READER_ONLY: Final = frozenset(metric for metric in METRICS if metric.name.startswith("fastworker_reader_")) | {
    VERIFIED, UNVERIFIED,
}  # fmt: skip
COMMON: Final = (BUILD, READY, MEMORY, STREAM_ENTRIES_MAX, STREAM_TRIMMED)
READER_METRICS: Final = tuple(m for m in METRICS if m in _READER_ONLY or m in COMMON)
WORKER_METRICS: Final = tuple(m for m in METRICS if m not in _READER_ONLY)
UP_METRICS: Final = METRICS

OF_SYNCER: Final = frozenset({
    HISTORY_ACCOUNTS, HISTORY_ACCOUNTS_RATE, HISTORY_RECORDS_RATE, HISTORY_BYTES_RATE, HISTORY_LEFT, HISTORY_RESTING,
    HISTORY_PAUSED,
    GAPS_OPEN, REPAIRS_WAITING, REPAIR_OLDEST, REPAIRS_REFUSED, REPAIRS_MENDED, TRUTH, TRUTH_LOW, TRUTH_SAMPLES,
})  # fmt: skip
"""Without series where no syncer, and nobody who fetches history, told anything within an hour."""

OF_STREAM: Final = _READER_ONLY | OF_SYNCER | {
    STREAM_ENTRIES, STREAM_ENTRIES_MAX, STREAM_BYTES, STREAM_FULL_SECONDS, LAG_ENTRIES, LAG_SECONDS, GROUP_LAG,
    PARTITION_LAG, PENDING, PENDING_AGE, DEAD_LETTERS, ENTRIES, EVENTS, DROPS, UNACCOUNTED,
    DEBTS, DEBT_AGE, DEBTS_PUT_BACK,
}  # fmt: skip
"""Every worker on one stream reports these of the whole stream: over several workers their `max`, never their sum."""


def markdown() -> str:
    """docs/metrics.md; a test compares them."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m fastworker.metrics`; do not edit. How to read them: [monitoring.md](monitoring.md).",
        "",
        "The port of `worker` serves those of the worker, that of `reader` those of the reader, that of `up` both.",
        "Labels with a closed set of values have a series for each, at zero, from the first second.",
        "",
        "With several workers on one stream, those of the *stream* are the whole stream's on every port: take `max`.",
        "Those of the *service* are its own: take `sum`.",
        "",
        "| metric | type | labels | served by | of the | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        if metric.closed:
            values = ", ".join(f"`{value}`" for value in metric.closed)
            labels += ": each table of records" if metric is CHANGES else f": {values}"
        served_by = "both" if metric in COMMON else "reader" if metric in _READER_ONLY else "worker"
        of_the = "stream" if metric in OF_STREAM else "service"
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {served_by} | {of_the} | {metric.why} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
