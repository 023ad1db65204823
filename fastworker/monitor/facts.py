"""What an operator is told, put together once: structs, and `collect`, which reads them from Redis alone.

`fastworker status`, the status page, the Prometheus figures and readiness all show these. The JSON of `fastworker
status --json` is `Status` itself and stable: members are added, never renamed or given another meaning.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, get_args, get_type_hints

import msgspec
from msgspec import Meta

from fastworker import __version__
from fastworker.config import Config
from fastworker.metrics import OUTCOMES
from fastworker.monitor.rates import per_s
from fastworker.process.board import Snapshot
from fastworker.stream.admin import STATUS_STALE_S, RedisAdmin, age_s
from fastworker.stream.parts import Stream
from fastworker.stream.repairs import told
from fastworker.sync.told import HistoryStatus, Mended, RepairStatus, TableTruth

GAPS_SHOWN: Final = 3


def _is(meaning: str) -> Meta:
    """What a field of the JSON means; docs/status-json.md is made of these."""
    return Meta(description=meaning)


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a worker."""

    name: Annotated[str, _is("`worker-<n>`, `monitor` or `reader`.")]
    pid: Annotated[int, _is("Its process id.")]
    state: Annotated[
        str,
        _is(
            "`starting`, `running`, `waiting_for_store`, `waiting_for_stream` or `draining`; of a "
            "reader at its own port `connected`, `connecting` or `standby`."
        ),
    ]
    ready: Annotated[bool, _is("It is at work, or would be if there were any.")]
    consumers: Annotated[str, _is("Names of its consumers in the group, separated by spaces.")] = ""
    entries: Annotated[
        int, _is("Entries finished since the supervisor started; of a reader: appended since it started.")
    ] = 0
    entries_per_s: Annotated[float, _is("The same per second, over the last five seconds.")] = 0.0
    flushes: Annotated[int, _is("Batches written.")] = 0
    flush_ms: Annotated[float, _is("How long the latest one took.")] = 0.0
    rows: Annotated[int, _is("Rows inserted, changed or removed in the primary tables.")] = 0
    oldest_unflushed_s: Annotated[float, _is("Age since its read of the oldest entry it holds; 0 for none.")] = 0.0
    progress_age_s: Annotated[float, _is("Seconds since its slowest pipeline got on.")] = 0.0
    memory_bytes: Annotated[int | None, _is("Proportional set size; null where it is not known.")] = None
    restarts: Annotated[int, _is("How often it was started again: after a crash, a stall or its memory ceiling.")] = 0
    replaced: Annotated[int, _is("How often it was replaced because an operator asked.")] = 0
    error: Annotated[str, _is("Its latest error, also when that is long over.")] = ""
    error_age_s: Annotated[float | None, _is("Seconds since that error; null where it is not known.")] = None


class DebtStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What committed transactions owe: counters and joined rows, usually paid within a second (docs/invariants.md)."""

    owed: Annotated[int, _is("How many debts there are.")]
    oldest_s: Annotated[float, _is("Seconds since the oldest was owed, of those that are not put back; 0: none.")]
    put_back: Annotated[int, _is("Debts that PostgreSQL refuses: tried again ever more rarely, in nobody's way.")]
    error: Annotated[str, _is("Which one of these is, and why; empty: there is none.")] = ""
    age_s: Annotated[float, _is("Seconds since a process looked: half a second while it writes, else ten.")] = 0.0


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One supervisor with its processes, as its monitor last wrote it."""

    owner: Annotated[str, _is("`<host>:<pid of the supervisor>`.")]
    at: Annotated[float, _is("When this was written, Unix time.")]
    version: Annotated[str, _is("Its release.")]
    ready: Annotated[bool, _is("What its /readyz answers.")]
    why: Annotated[list[str], _is("Why it is not ready, in sentences; empty when it is.")]
    connections_max: Annotated[int, _is("DB_POOL_SIZE: the most PostgreSQL connections it may open.")]
    connections_open: Annotated[int, _is("Those that its worker processes have open.")] = 0
    stream_full_s: Annotated[
        float | None,
        _is("Seconds until the stream meets its limit at the growth of the last minute; null while it does not grow."),
    ] = None
    processes: Annotated[list[ProcessStatus], _is("Its processes.")]
    written_per_s: Annotated[
        dict[str, float], _is("Changes per second by table, lately; tables without any are left out.")
    ] = {}
    http: Annotated[str, _is("Address of its HTTP port; empty where it has none.")] = ""
    debts: Annotated[DebtStatus | None, _is("What is owed, as it last saw; null: it has not looked yet.")] = None


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer group on the stream."""

    name: Annotated[str, _is("Its name.")]
    consumers: Annotated[int, _is("Consumers that Redis knows in it.")]
    lag_entries: Annotated[int, _is("Entries not delivered to it yet.")]
    lag_is_exact: Annotated[bool, _is("False: estimated from ids, because the server does not count.")]
    pending_entries: Annotated[int, _is("Delivered and not acknowledged.")]
    last_delivered_id: Annotated[str, _is("Id of the newest entry delivered to it.")]
    holds_stream: Annotated[bool, _is("It has the oldest unfinished entry: trimming waits for it.")] = False


class PartitionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of the stream."""

    stream: Annotated[str, _is("Its key.")]
    entries: Annotated[int, _is("Entries in it.")]
    lag_entries: Annotated[int, _is("Entries not delivered to the group yet.")]
    lag_seconds: Annotated[float, _is("Age of the oldest entry that the group has not finished.")]
    pending_entries: Annotated[int, _is("Entries delivered and not acknowledged.")]


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch that a relay did not give us."""

    relay: Annotated[str, _is("Host of the relay.")]
    reason: Annotated[str, _is("`outdated_cursor`, `relay_switch` or `oversized`.")]
    after: Annotated[int | None, _is("Newest seq before it; null: none.")]
    resumed: Annotated[int | None, _is("First seq after it.")]
    at: Annotated[float, _is("When it was noticed, Unix time.")]


class ReaderStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The reader, by what it leaves in Redis every second."""

    running: Annotated[bool, _is("A reader holds the lease.")]
    connected: Annotated[bool, _is("Its WebSocket to the relay is open.")]
    url: Annotated[str, _is("The relay's URL, without secrets.")]
    cursor: Annotated[str | None, _is("Newest seq on the stream, decimal; null: none yet.")]
    cursor_age_s: Annotated[
        float | None,
        _is("Age of the newest event by the relay's clock: how far the reader is behind; null where it is not known."),
    ] = None
    frame_age_s: Annotated[float | None, _is("Seconds since the newest frame; null where it is not known.")]
    silent: Annotated[bool, _is("No frame for long against the relay's own recent rate.")] = False
    reconnects: Annotated[int, _is("Connections that ended without being asked to, since it started.")]
    gaps: Annotated[int, _is("Stretches that the relay did not give, of those kept in `fastworker:gaps`.")]
    waits_for_room: Annotated[bool, _is("The stream is full: it does not read.")]
    error: Annotated[str, _is("Why it is not connected; empty when it is.")]
    newest_gaps: Annotated[list[Gap], _is("The newest of these.")] = []


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `fastworker status --json`."""

    at: Annotated[float, _is("When it was asked, Unix time.")]
    version: Annotated[str, _is("Release of the command.")]
    redis_version: Annotated[str, _is("Product and version of the server.")]
    redis_memory_bytes: Annotated[int, _is("Memory that the server uses.")]
    redis_maxmemory_bytes: Annotated[int, _is("Its maxmemory; 0: no limit.")]
    stream_key: Annotated[str, _is("REDIS_STREAM_KEY.")]
    stream_entries: Annotated[int, _is("Entries on the stream.")]
    stream_entries_max: Annotated[int, _is("REDIS_MAX_STREAM_LEN: at this length the reader waits.")]
    stream_bytes: Annotated[int | None, _is("Memory of the stream, sampled.")]
    held_by: Annotated[str | None, _is("The group with the oldest unfinished entry: trimming waits for it.")]
    group: Annotated[str, _is("REDIS_CONSUMER_GROUP.")]
    lag_entries: Annotated[int, _is("Entries not delivered to that group yet.")]
    lag_is_exact: Annotated[bool, _is("False: estimated from ids.")]
    lag_seconds: Annotated[float, _is("Age of the oldest entry that the group has not finished.")]
    pending_entries: Annotated[int, _is("Entries delivered and not acknowledged.")]
    oldest_pending_seconds: Annotated[float, _is("Age of the oldest of them.")]
    dead_letters: Annotated[int, _is("Entries in `firehose:dead-letters`.")]
    appended_per_s: Annotated[
        float | None, _is("Entries appended per second; null where the server does not count (before Redis 7).")
    ]
    finished_per_s: Annotated[float | None, _is("Entries finished by fastworker per second.")]
    ledger: Annotated[
        dict[str, int],
        _is(
            "Entries ever finished by fastworker, by outcome: `committed`, `nothing_to_store`, "
            "`set_aside`, `ghosts` (trimmed by somebody while pending)."
        ),
    ]
    drops: Annotated[dict[str, int], _is("Ops dropped and entries set aside, by reason.")]
    unaccounted_entries: Annotated[
        int | None,
        _is(
            "Entries delivered but in no outcome and not pending: others acknowledged them; null "
            "where the server does not count."
        ),
    ]
    events: Annotated[dict[str, int], _is("`cluster:metrics`: events by kind, also those that old workers counted.")]
    groups: Annotated[list[GroupStatus], _is("Every consumer group on the stream.")]
    reader: Annotated[ReaderStatus, _is("The reader.")]
    workers: Annotated[list[WorkerStatus], _is("Workers that reported within the last 15 seconds.")]
    partitions: Annotated[
        list[PartitionStatus], _is("Of the stream, where it has several; the other members are their sums.")
    ] = []
    debts: Annotated[DebtStatus | None, _is("What is owed in PostgreSQL; null: no worker tells.")] = None
    repair: Annotated[RepairStatus | None, _is("The syncer; null when none told anything within an hour.")] = None
    history: Annotated[
        HistoryStatus | None, _is("History that backfills fetch; null when nobody worked on any within an hour.")
    ] = None


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What one consumer group has not finished: ages in seconds, 0 for nothing."""

    group: str
    lag: int  # entries not delivered to it
    lag_is_exact: bool
    undelivered_s: float  # age of the oldest of these
    pending: int
    pending_id: str | None
    pending_s: float
    unfinished_s: float  # the oldest, pending or not delivered


def backlog(stream: Stream | None, name: str, now_ms: int | None) -> Backlog:
    """Before there is such a group, all of the stream waits for it."""
    group = stream.group(name) if stream else None
    first_id = group.next_id if group else stream.first_id if stream else None
    return Backlog(
        group=name,
        lag=group.lag if group else stream.length if stream else 0,
        lag_is_exact=group.lag_is_exact if group else True,
        undelivered_s=age_s(first_id, now_ms),
        pending=group.pending if group else 0,
        pending_id=group.oldest_pending_id if group else None,
        pending_s=age_s(group.oldest_pending_id if group else None, now_ms),
        unfinished_s=age_s(group.unfinished_id if group else first_id, now_ms),
    )


def partitions_of(stream: Stream | None, group: str, now_ms: int | None) -> list[PartitionStatus]:
    """Empty where the stream has one only."""
    return [
        PartitionStatus(
            stream=key,
            entries=one.length,
            lag_entries=(ours := backlog(one, group, now_ms)).lag,
            lag_seconds=ours.unfinished_s,
            pending_entries=ours.pending,
        )
        for key, one in (stream.partitions.items() if stream else ())
    ]


def debts_of(snapshots: Sequence[Snapshot], now: int) -> DebtStatus | None:
    """By the newest look of all processes; all of them see the same. `now`: `process.board.now_ms()`."""
    newest = max(snapshots, key=lambda one: one.gauges.debts_at_ms, default=None)
    if newest is None or not newest.gauges.debts_at_ms:
        return None
    gauges = newest.gauges
    return DebtStatus(
        owed=gauges.debts,
        oldest_s=max(0, now - gauges.debts_since_ms) / 1000 if gauges.debts_since_ms else 0.0,
        put_back=gauges.debts_put_back,
        error=newest.debt,
        age_s=max(0, now - gauges.debts_at_ms) / 1000,
    )


def _debts_told(workers: Sequence[WorkerStatus]) -> DebtStatus | None:
    told = [(one.at - one.debts.age_s, one.debts) for one in workers if one.debts is not None]
    return max(told, key=lambda look: look[0])[1] if told else None


class RatePoint(msgspec.Struct, frozen=True):
    """What two readings are compared by, for rates."""

    at: float
    added: int | None
    finished: int

    def per_s(self, before: RatePoint | None) -> tuple[float | None, float | None]:
        """Appended and finished per second since `before`."""
        if before is None or self.at <= before.at:
            return None, None
        seconds = self.at - before.at
        return per_s(before.added, self.added, seconds), per_s(before.finished, self.finished, seconds)


def _holder(groups: list[GroupStatus], unfinished: dict[str, str | None], ignored: tuple[str, ...]) -> str | None:
    """The group with the oldest unfinished entry: trimming waits for it."""
    waiting = [(age_s(unfinished[g.name]), g.name) for g in groups if unfinished[g.name] and g.name not in ignored]
    return max(waiting)[1] if waiting else None


async def collect(admin: RedisAdmin, config: Config, before: RatePoint | None = None) -> tuple[Status, RatePoint]:
    """Everything, and the reading to hand in next time so that rates are over the time between."""
    server = await admin.server()
    stream = await admin.stream(measure=True)
    count = await admin.count(config.group)
    ledger = count.ledger
    outcomes = {outcome: ledger.get(outcome, 0) for outcome in OUTCOMES}
    drops = {name.removeprefix("drop:"): count for name, count in ledger.items() if name.startswith("drop:")}
    reading = RatePoint(time.monotonic(), stream.entries_added if stream else None, sum(outcomes.values()))
    appended_per_s, finished_per_s = reading.per_s(before)

    found = {group.name: group for group in stream.groups} if stream else {}
    groups = [
        GroupStatus(
            name=group.name,
            consumers=group.consumers,
            lag_entries=group.lag,
            lag_is_exact=group.lag_is_exact,
            pending_entries=group.pending,
            last_delivered_id=group.last_delivered_id,
        )
        for group in found.values()
    ]
    holder = _holder(groups, {name: group.unfinished_id for name, group in found.items()}, config.ignore_groups)
    groups = [msgspec.structs.replace(group, holds_stream=group.name == holder) for group in groups]
    ours = backlog(stream, config.group, server.time_ms)
    return Status(
        at=time.time(),
        version=__version__,
        redis_version=f"{server.product} {server.version}",
        redis_memory_bytes=server.used_memory_bytes,
        redis_maxmemory_bytes=server.maxmemory_bytes,
        stream_key=config.stream_key,
        stream_entries=stream.length if stream else 0,
        stream_entries_max=config.max_stream_len,
        stream_bytes=stream.bytes if stream else None,
        held_by=holder,
        group=config.group,
        lag_entries=ours.lag,
        lag_is_exact=ours.lag_is_exact,
        lag_seconds=ours.unfinished_s,
        pending_entries=ours.pending,
        oldest_pending_seconds=ours.pending_s,
        dead_letters=await admin.letters.count(),
        appended_per_s=appended_per_s,
        finished_per_s=finished_per_s,
        ledger=outcomes,
        drops=drops,
        unaccounted_entries=count.unaccounted,
        events=await admin.event_counts(),
        groups=groups,
        reader=await _reader(admin, config),
        workers=(workers := told_workers(await admin.statuses())),
        debts=_debts_told(workers),
        partitions=partitions_of(stream, config.group, server.time_ms),
        repair=told_repairs(await told(admin, admin.keys.repair_status)),
        history=told_history(await told(admin, admin.keys.history_status)),
    ), reading


async def _reader(admin: RedisAdmin, config: Config) -> ReaderStatus:
    told, stats = await admin.reader_status(), await admin.reader_stats()
    running = await admin.reader_is_leased()
    frame_at, event_at = stats.get("last_frame_at", ""), stats.get("last_event_at", "")
    return ReaderStatus(
        running=running,
        connected=bool(told.get("connected")),
        url=str(told.get("url", "")),
        cursor=await admin.cursor(config.cursor_key),
        cursor_age_s=max(0.0, time.time() - float(event_at)) if event_at else None,
        frame_age_s=max(0.0, time.time() - float(frame_at)) if frame_at and running else None,
        silent=running and stats.get("silent") == "1",
        reconnects=int(stats.get("reconnects", 0)),
        gaps=await admin.gaps(),
        newest_gaps=_gaps(await admin.newest_gaps(GAPS_SHOWN)),
        waits_for_room=running and stats.get("full") == "1",
        error=stats.get("last_error", "") if running and not told.get("connected") else "",
    )


def _gaps(texts: list[bytes]) -> list[Gap]:
    found = []
    for text in texts:
        try:
            gap = msgspec.json.decode(text, type=Gap)
        except msgspec.MsgspecError:
            continue
        found.append(msgspec.structs.replace(gap, at=gap.at / 1000))
    return found


def told_repairs(text: bytes | None) -> RepairStatus | None:
    """What a syncer told lately. What is not understood is of another release."""
    try:
        return None if text is None else msgspec.json.decode(text, type=RepairStatus)
    except msgspec.MsgspecError:
        return None


def told_history(text: bytes | None) -> HistoryStatus | None:
    """How far history is, as somebody who works on it told lately."""
    try:
        return None if text is None else msgspec.json.decode(text, type=HistoryStatus)
    except msgspec.MsgspecError:
        return None


def told_workers(statuses: Mapping[str, str]) -> list[WorkerStatus]:
    """Workers that told something lately, by owner. What is not understood is of another release and is left out."""
    workers = []
    for text in statuses.values():
        try:
            worker = msgspec.json.decode(text, type=WorkerStatus)
        except msgspec.MsgspecError:
            continue  # it says what it can through the ledger
        if time.time() - worker.at <= STATUS_STALE_S:
            workers.append(worker)
    return sorted(workers, key=lambda worker: worker.owner)


def markdown() -> str:
    """docs/status-json.md; a test compares them."""
    lines = [
        "# The JSON of `fastworker status --json`",
        "",
        "Generated by `python -m fastworker.monitor.facts`; do not edit.",
        "",
        "One object; with `--watch` one a second, each on its own line. Members are added, never renamed or given",
        "another meaning. Ages and lags are seconds, sizes bytes; rates are per second, over the last half second or,",
        "with `--watch`, over the last five.",
    ]
    for struct in (
        Status,
        ReaderStatus,
        Gap,
        GroupStatus,
        PartitionStatus,
        WorkerStatus,
        DebtStatus,
        ProcessStatus,
        RepairStatus,
        Mended,
        TableTruth,
        HistoryStatus,
    ):
        assert struct.__doc__ is not None
        lines += ["", f"## {struct.__name__}", "", struct.__doc__, "", "| member | type | meaning |", "|---|---|---|"]
        for name, hint in get_type_hints(struct, include_extras=True).items():
            kind, meta = get_args(hint)
            words = (
                (kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind))
                .replace(f"{__name__}.", "")
                .replace(f"{RepairStatus.__module__}.", "")
            )
            lines.append(f"| `{name}` | {words.replace(' | ', ' or ').replace('None', 'null')} | {meta.description} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(markdown())
