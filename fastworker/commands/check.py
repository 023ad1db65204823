"""`fastworker check`: every hazard that can be seen from here, as a finding with the sentence that mends it.

Each hazard is one function from facts to findings, pure, so that each can be tested without a server that has it.
`preflight` is the short form that the services run before they begin: what would make them fail at once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

import msgspec
from rich.text import Text

from fastworker.commands.grants import TABLE_RIGHTS, Service
from fastworker.commands.tune import server_advice
from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, Unreachable, counted
from fastworker.process.clocks import which_is_off
from fastworker.reader.levels import require_curves
from fastworker.redact import redact
from fastworker.store.admin import Facts, Past, facts, name_of, past, writers
from fastworker.store.migrate import SchemaRefused, encoding_problem
from fastworker.store.migrate import check as check_schema
from fastworker.store.tuning import Server as PostgresServer
from fastworker.store.tuning import open_tuning
from fastworker.stream.admin import RedisAdmin, Server, age_s, open_redis
from fastworker.stream.consumer import form_of
from fastworker.stream.feed import OURS
from fastworker.stream.parts import ConsumerState, Fields, Pending, Stream
from fastworker.terminal import Terminal, write_json
from fastworker.together import together

log = logging.getLogger(__name__)

REDIS_MIN: Final = (6, 2)
POSTGRES_MIN: Final = 140_000
ACTIVE_MS: Final = 60_000
"""A consumer that ran a command within this time is at work."""
SKEW_S: Final = 2.0
"""Clamping of dates allows two minutes; more than this is a clock that nobody keeps."""
PENDING_LOOKED_AT: Final = 100
STALE_PENDING_S: Final = 600.0
HOLDS_BACK_S: Final = 600.0
SILENT_S: Final = 300.0
ENTRIES_TO_JUDGE_BY: Final = 1_000
"""Below it the mean size of an entry says little."""
SEQUENCE_SHARE: Final = 0.7
COUNTED: Final = ("post_aggregations", "feed_items")
"""Tables that only ingestion writes; the AppView's API process leaves them alone."""


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """`about` is one of configuration, redis, stream, postgresql. The sentence says what is and what mends it."""

    verdict: Verdict
    about: str
    sentence: str


def _ok(about: str, sentence: str) -> Finding:
    return Finding(Verdict.OK, about, sentence)


def _warn(about: str, sentence: str) -> Finding:
    return Finding(Verdict.WARN, about, sentence)


def _fail(about: str, sentence: str) -> Finding:
    return Finding(Verdict.FAIL, about, sentence)


# --- Redis


def redis_version(server: Server) -> Iterator[Finding]:
    if server.product == "redis" and server.version_parts < REDIS_MIN:
        yield _fail("redis", f"Redis {server.version} is too old: install 6.2 or newer, or Valkey.")
    else:
        yield _ok("redis", f"{server.product.capitalize()} {server.version}.")


def redis_role(server: Server) -> Iterator[Finding]:
    if server.role != "master":
        yield _fail("redis", "This is a replica: set REDIS_URL to the master.")
    if server.cluster:
        yield _fail("redis", "This is a node of a Redis Cluster: set REDIS_URL to redis+cluster://host,host.")


def redis_eviction(server: Server) -> Iterator[Finding]:
    if server.maxmemory_policy.startswith("volatile-"):
        yield _warn(
            "redis",
            f"maxmemory-policy is {server.maxmemory_policy}: the stream stays, but leases may vanish, so that two "
            "readers do the same work. CONFIG SET maxmemory-policy noeviction, and write it into redis.conf.",
        )
    elif server.maxmemory_policy not in ("noeviction", "unknown"):
        yield _fail(
            "redis",
            f"maxmemory-policy is {server.maxmemory_policy}: Redis may throw the stream away. "
            "CONFIG SET maxmemory-policy noeviction, and write it into redis.conf.",
        )


def redis_memory(server: Server) -> Iterator[Finding]:
    if server.maxmemory_bytes and server.used_memory_bytes > 0.9 * server.maxmemory_bytes:
        share = 100 * server.used_memory_bytes / server.maxmemory_bytes
        yield _warn(
            "redis",
            f"{share:.0f} % of maxmemory is in use; when it is full the reader waits. Raise maxmemory, or set "
            "FASTWORKER_STREAM_BYTES_MAX below it.",
        )


def redis_holds_a_full_stream(server: Server, stream: Stream, config: Config) -> Iterator[Finding]:
    """What a stream of REDIS_MAX_STREAM_LEN entries takes, from what its entries take now."""
    limit = server.maxmemory_bytes or server.machine_memory_bytes
    if stream.bytes is None or stream.length < ENTRIES_TO_JUDGE_BY or not limit:
        return
    each = stream.bytes / stream.length
    most = min(each * config.max_stream_len, config.stream_bytes_max or float("inf"))
    if most > 0.9 * limit:
        what = "maxmemory" if server.maxmemory_bytes else "the machine's memory"
        yield _warn(
            "redis",
            f"An entry takes {each:,.0f} bytes, so {config.max_stream_len:,} of them take {most / 2**30:,.1f} GB, and "
            f"{what} is {limit / 2**30:,.1f} GB: set REDIS_MAX_STREAM_LEN to {int(0.7 * limit / each):,}, or "
            "FASTWORKER_STREAM_BYTES_MAX.",
        )


def redis_persistence(server: Server) -> Iterator[Finding]:
    if not server.aof:
        lost = "all since the last snapshot" if server.saves else "stream, group and cursor"
        yield _warn(
            "redis",
            f"appendonly is off: a crash loses {lost}. The worker resumes from PostgreSQL's progress, at the price of "
            "what the relay no longer has. CONFIG SET appendonly yes, and keep its directory on a volume.",
        )
    elif server.aof_fsync == "no":
        yield _warn("redis", "appendfsync is no: a crash loses what the system did not write yet. Set it to everysec.")
    if server.save_failed:
        yield _fail("redis", "The last save failed, and Redis may refuse writes: look at its log and its disk.")


def clock(about: str, ahead_s: float) -> Iterator[Finding]:
    if abs(ahead_s) > SKEW_S:
        which = "ahead of" if ahead_s > 0 else "behind"
        yield _warn(about, f"Its clock is {abs(ahead_s):.1f} s {which} this machine's: run NTP on both.")


def clocks(redis_ahead_s: float, postgresql_ahead_s: float) -> Iterator[Finding]:
    """Three clocks tell which of them is off."""
    now = datetime.now(UTC)
    ahead = {"Redis": redis_ahead_s, "PostgreSQL": postgresql_ahead_s, "this machine": 0.0}
    if off := which_is_off({name: now + timedelta(seconds=s) for name, s in ahead.items()}):
        yield _fail("clocks", f"{off[0].upper()}{off[1:]}: set it right; a worker prunes nothing meanwhile.")


# --- the stream and its groups


def stream_kind(kind: str, key: str) -> Iterator[Finding]:
    if kind not in ("stream", "none"):
        yield _fail("stream", f"{key} is a {kind}, not a stream: set REDIS_STREAM_KEY to another key or remove it.")


def somebody_works(stream: Stream, consumers: Iterable[ConsumerState], config: Config) -> Iterator[Finding]:
    group = stream.group(config.group)
    waiting = stream.length if group is None else group.lag
    if waiting and not any(one.leased or one.idle_ms < ACTIVE_MS for one in consumers):
        yield _warn(
            "stream",
            f"{counted(waiting, 'entry waits', 'entries wait')} and no worker is at work: start `fastworker worker`.",
        )


def the_reader(
    *, leased: bool, told: Mapping[str, object], frame_age_s: float | None, stream: Stream | None
) -> Iterator[Finding]:
    """`told`: what any reader said of itself within ten seconds; ours holds a lease while it is at work."""
    if not leased and told and told.get("reader") != OURS:
        yield _warn(
            "stream",
            "Another reader than fastworker's is at work: it trims with MAXLEN, also what nobody has read, and moves "
            "its cursor past what it could not append. Once the worker runs, stop it and start `fastworker reader`.",
        )
    elif not leased and stream is not None and stream.length:
        yield _warn("stream", "No reader is at work: start `fastworker reader`.")
    elif leased and not told.get("connected"):
        yield _warn("stream", "The reader is not connected to its relay: see its log and `fastworker status`.")
    elif leased and frame_age_s is not None and frame_age_s > SILENT_S:
        yield _warn("stream", f"The reader is connected, but the last frame came {frame_age_s / 60:,.0f} minutes ago.")


def old_dialect(newest: Iterable[Fields]) -> Iterator[Finding]:
    if any(b'"py_type"' in fields.get(b"data", b"") for fields in newest):
        yield _warn(
            "stream",
            "The entries are the old Python reader's: it drops record types and records that its SDK does not accept, "
            "and old workers store wrong dates and no names of them. Nothing brings those back: replace it soon.",
        )


def cursor_is_one(key: str, cursor: str | None) -> Iterator[Finding]:
    if cursor is not None and not (cursor.isdigit() and int(cursor) < 2**53):
        yield _fail(
            "stream",
            f"{key} holds {cursor[:40]!r}, which is no cursor: the reader refuses to start. SET {key} to a seq, or DEL "
            "it to begin at the live tip.",
        )


def gaps(count: int) -> Iterator[Finding]:
    if count:
        yield _warn(
            "stream",
            f"{counted(count, 'stretch was', 'stretches were')} never given by the relay (LRANGE "
            "fastworker:gaps 0 -1 tells which): run "
            "`fastworker repair --gap`.",
        )


def stream_room(stream: Stream, config: Config) -> Iterator[Finding]:
    share = stream.length / config.max_stream_len
    group = stream.group(config.group)
    if share > 0.9 and group is not None and group.lag + group.pending > 0.5 * stream.length:
        yield _warn(
            "stream",
            f"The stream is {100 * share:.0f} % full with a backlog of {group.lag:,} entries: the reader will wait. "
            "Are the workers running?",
        )
    else:
        yield _ok("stream", f"{stream.length:,} of {config.max_stream_len:,} entries.")


def group_exists(stream: Stream, config: Config) -> Iterator[Finding]:
    if stream.group(config.group) is None:
        yield _warn("stream", f"There is no group {config.group} yet: the worker makes it at its first start.")


def groups_that_hold(stream: Stream, config: Config, now_ms: int) -> Iterator[Finding]:
    """A group that does not move keeps every entry: nothing can be trimmed."""
    for group in stream.groups:
        age = age_s(group.unfinished_id, now_ms)
        if group.name == config.group or group.name in config.ignore_groups or age < HOLDS_BACK_S:
            continue
        yield _warn(
            "stream",
            f"Group {group.name} has not finished an entry of {age / 60:,.0f} minutes ago, so nothing newer can be "
            f"trimmed. Start its consumers, or if it is forgotten: FASTWORKER_IGNORE_GROUPS={group.name}, or XGROUP "
            "DESTROY it.",
        )


_TYPESCRIPT: Final = re.compile(r"worker-\d+-p\d+")


def foreign_consumers(consumers: Iterable[ConsumerState], config: Config) -> Iterator[Finding]:
    """Old workers on the same group: allowed, with what follows from it."""
    active = [one.name for one in consumers if not one.ours and one.idle_ms < ACTIVE_MS]
    if not active:
        return
    also = ""
    if any(_TYPESCRIPT.fullmatch(name) for name in active):
        also = (
            " TypeScript workers also take entries that a worker holds for longer than 10 s (ours renews its own), and "
            "write counters from what they read before."
        )
    if shared := [name for name in active if re.fullmatch(re.escape(config.consumer_id) + r"-\d+", name)]:
        also += (
            f" CONSUMER_ID={config.consumer_id} is theirs too ({shared[0]}): give fastworker another, or what one of "
            "them leaves behind is found only when ours starts again."
        )
    yield _warn(
        "stream",
        f"Other workers are active in group {config.group}: {_some(active)}. Counters they write may be wrong until "
        "they stop; afterwards run `worker --reapply` for what they dropped, then `verify --repair`." + also,
    )
    if config.stream_format != "json":
        yield _fail(
            "stream",
            f"FASTWORKER_STREAM_FORMAT is {config.stream_format}, which they cannot read: set it to json meanwhile.",
        )


def unreadable_for_others(consumers: Iterable[ConsumerState], newest: Iterable[Fields]) -> Iterator[Finding]:
    forms = {form_of(fields) for fields in newest} & {"native", "frame"}
    if forms and any(not one.ours and one.idle_ms < ACTIVE_MS for one in consumers):
        yield _fail(
            "stream",
            f"The stream holds {' and '.join(sorted(forms))} entries, which the other workers acknowledge without "
            "storing: stop them now, then run `fastworker worker --reapply` from before they began.",
        )


def partitions_as_set(written: int, config: Config) -> Iterator[Finding]:
    if config.partitions > 1 and config.stream_format == "json":
        yield _fail("stream", f"{config.partitions_need_another_form}.")
    elif "FASTWORKER_STREAM_PARTITIONS" in config.given and written != config.partitions:
        yield _warn(
            "stream",
            f"The reader appends to {counted(written, 'partition')}, and FASTWORKER_STREAM_PARTITIONS is "
            f"{config.partitions}: restart the reader with this setting.",
        )


def partitions_are_read(stream: Stream, config: Config) -> Iterator[Finding]:
    """Of several, some by nobody, though others are: release 0.1.0 reads the first one only."""
    unread = [
        key
        for key, one in stream.partitions.items()
        if one.length and ((group := one.group(config.group)) is None or (group.lag and not group.consumers))
    ]
    if unread and len(unread) < len(stream.partitions):
        yield _fail(
            "stream",
            f"Nobody reads {_some(unread)}: a worker of a release that does not know partitions reads the first one "
            "only. Replace it.",
        )


def other_groups_read_json(stream: Stream, config: Config) -> Iterator[Finding]:
    others = [group.name for group in stream.groups if group.name != config.group and group.consumers]
    if others and config.stream_format != "json":
        yield _fail(
            "stream",
            f"FASTWORKER_STREAM_FORMAT is {config.stream_format}, but {_some(others)} read the stream too and know "
            "json only: set it to json.",
        )


def abandoned_pending(consumers: Iterable[ConsumerState], oldest: Iterable[Pending]) -> Iterator[Finding]:
    dead = [one for one in consumers if one.pending and not one.leased and one.idle_ms >= ACTIVE_MS]
    if dead:
        count = sum(one.pending for one in dead)
        yield _warn(
            "stream",
            f"{counted(count, 'entry is', 'entries are')} pending for consumers that are gone "
            f"({_some([one.name for one in dead])}): a "
            "running worker adopts them.",
        )
    stale = [one for one in oldest if one.idle_ms > STALE_PENDING_S * 1000]
    if stale and not dead:
        yield _warn(
            "stream",
            f"Entry {stale[0].entry_id} is pending for {stale[0].consumer} since {stale[0].idle_ms / 60_000:,.0f} "
            "minutes: look at the worker's log.",
        )


def trimmed_pending(missing: list[str]) -> Iterator[Finding]:
    if missing:
        yield _fail(
            "stream",
            f"{len(missing)} of the oldest pending entries are not on the stream any more, the first {missing[0]}: a "
            "reader that trims with MAXLEN has removed them unread. Replace it with `fastworker reader`.",
        )


def trimmed_unread(stream: Stream, config: Config) -> Iterator[Finding]:
    """From Redis 7 on: how many entries were removed ahead of what the group has read."""
    group = stream.group(config.group)
    if group is None or group.entries_read is None or stream.entries_added is None:
        return
    removed = stream.entries_added - stream.length
    if group.lag and removed > group.entries_read:
        yield _fail(
            "stream",
            f"{removed - group.entries_read:,} entries were trimmed before group {config.group} was given them. A "
            "reader that trims with MAXLEN does that: replace it with `fastworker reader`, which waits instead.",
        )


def dead_letters(count: int) -> Iterator[Finding]:
    if count:
        yield _warn("stream", f"{counted(count, 'dead letter')}: see `fastworker dlq list`.")


# --- PostgreSQL


def postgres_version(found: Facts) -> Iterator[Finding]:
    if found.version_num < POSTGRES_MIN:
        yield _fail("postgresql", f"PostgreSQL {found.version} is too old: 14 or newer is needed.")
    else:
        yield _ok("postgresql", f"PostgreSQL {found.version}.")


def postgres_state(found: Facts, config: Config) -> Iterator[Finding]:
    if found.in_recovery:
        yield _fail("postgresql", "This is a standby: set DATABASE_URL to the primary.")
    elif found.read_only:
        yield _fail(
            "postgresql",
            "Transactions are read-only by default: ALTER ROLE ... SET default_transaction_read_only = off.",
        )
    if problem := encoding_problem(found.encoding):
        yield _fail("postgresql", problem)
    if found.pooler:
        yield _fail(
            "postgresql",
            "Session settings are not kept: a pooler in transaction mode is in between. Connect to PostgreSQL itself, "
            "or use session mode.",
        )
    if found.fsync != "on":
        yield _warn("postgresql", "fsync is off: after a crash of the machine acknowledged rows may be lost.")
    if found.synchronous_commit == "off" and config.synchronous_commit == "keep":
        yield _warn(
            "postgresql",
            "synchronous_commit is off, and FASTWORKER_SYNCHRONOUS_COMMIT=keep leaves it so: a crash may lose rows "
            "whose entries were acknowledged. Unset that variable.",
        )
    elif found.synchronous_commit == "off":
        yield _ok("postgresql", "synchronous_commit is off; the worker's own sessions turn it on.")
    if found.autovacuum != "on":
        yield _warn("postgresql", "autovacuum is off: counters and versions bloat. Turn it on.")


def postgres_connections(found: Facts, config: Config) -> Iterator[Finding]:
    room = found.max_connections - found.reserved_connections
    others = found.connections - found.own_connections
    if config.pool_size > room:
        yield _fail(
            "postgresql",
            f"DB_POOL_SIZE={config.pool_size} exceeds max_connections less the reserved ones ({room}): lower "
            "DB_POOL_SIZE; more connections than cores do not make it faster.",
        )
    elif others + config.pool_size > room:
        held = ", ".join(f"{client.sessions} by {client.name}" for client in found.clients[:3])
        yield _warn(
            "postgresql",
            f"Others hold {others} of {room} connections ({held}), and DB_POOL_SIZE={config.pool_size} may not fit. "
            "Lower theirs: each of the old stack's processes takes its own DB_POOL_SIZE.",
        )
    if 0 <= found.connection_limit < config.pool_size:
        yield _fail(
            "postgresql",
            f"This role or database allows {found.connection_limit} connections, less than "
            f"DB_POOL_SIZE={config.pool_size}: lower DB_POOL_SIZE, or ALTER ROLE ... CONNECTION LIMIT.",
        )


def postgres_sequences(found: Facts) -> Iterator[Finding]:
    for one in found.sequences:
        if one.last > SEQUENCE_SHARE * one.limit:
            words = "are used up" if one.last >= one.limit else f"are used up to {100 * one.last / one.limit:.0f} %"
            yield (_fail if one.last >= one.limit else _warn)(
                "postgresql",
                f"The ids of {one.table}.{one.column} {words}: ALTER SEQUENCE {one.name} AS bigint; ALTER TABLE "
                f"{one.table} ALTER COLUMN {one.column} TYPE bigint (it writes the table anew under a lock).",
            )


def postgres_settings(server: PostgresServer) -> Iterator[Finding]:
    for sentence in server_advice(server):
        yield _warn("tuning", sentence)
    if not server.counters_tuned:
        yield _warn(
            "tuning",
            "post_aggregations has no vacuum of its own: counters are updated all the time, and dead rows make up a "
            "fifth of the table before autovacuum comes. `fastworker migrate --tune` changes that.",
        )


def second_writer(writing: list[str], consumers: Iterable[ConsumerState]) -> Iterator[Finding]:
    """Another client writes tables that only ingestion writes, and is no consumer of the group."""
    if writing and not any(not one.ours and one.idle_ms < ACTIVE_MS for one in consumers):
        yield _fail(
            "postgresql",
            f"Somebody else writes {' or '.join(COUNTED)} and does not read the stream: {_some(writing)}. Every event "
            "is counted twice: stop it (the old compose file has python-backfill-worker), then `verify --repair`.",
        )


def what_was_before(found: Past, config: Config, cursor: str | None) -> Iterator[Finding]:
    if cursor is None and found.relay_cursor and not found.has_progress:
        yield _warn(
            "postgresql",
            f"The TypeScript reader stopped at {found.relay_cursor[:20]} (table firehose_cursor), and "
            f"{config.cursor_key} is not set, so `fastworker reader` would begin at the live tip: "
            f"SET {config.cursor_key} {found.relay_cursor[:20]} first.",
        )
    if found.avatars_old:
        yield _warn(
            "postgresql",
            f"{found.avatars_old:,} of {found.avatars:,} avatars that were looked at are hexadecimal or b'...', which "
            "the API cannot show. The next profile event of an account mends its own; a backfill mends all.",
        )


def what_waits(found: Past) -> Iterator[Finding]:
    if found.late:
        yield _warn(
            "postgresql",
            f"{found.late:,} pieces of maintenance fail and are tried again ever more rarely; the first one, "
            f"{found.late_error}",
        )
    if found.refused:
        yield _warn(
            "postgresql",
            f"{found.refused:,} records that were refused are kept by name in fastworker.refused: mend their reason, "
            "then repair their accounts.",
        )


def postgres_rights(found: Facts) -> Iterator[Finding]:
    if found.lacking:
        yield _fail(
            "postgresql",
            f"The role {found.role} lacks {_some(list(found.lacking), 5)}: GRANT it, or run what `fastworker grants "
            "worker` prints.",
        )
    if found.hidden:
        yield _fail(
            "postgresql",
            f"Row-level security would hide rows of {_some(list(found.hidden), 5)} from {found.role}: ALTER TABLE ... "
            f"DISABLE ROW LEVEL SECURITY for each, or ALTER ROLE {found.role} BYPASSRLS.",
        )
    for remark in found.remarks:
        yield _warn("postgresql", remark)
    if found.superuser:
        yield _warn(
            "postgresql",
            f"{found.role} is a superuser: the worker needs far less; `fastworker grants worker` prints it.",
        )


# --- all of it


def configuration(config: Config) -> Iterator[Finding]:
    yield _ok("configuration", f"{len(config.given)} variables are set.")
    needed = config.processes * config.pipelines + 1
    if needed > config.pool_size:
        yield _warn(
            "configuration",
            f"{config.processes} processes x {config.pipelines} pipelines and the monitor want {needed} connections, "
            f"DB_POOL_SIZE is {config.pool_size}: pipelines shrink to it.",
        )


class _Seen(msgspec.Struct):
    """Facts from Redis that the checks of PostgreSQL need."""

    consumers: list[ConsumerState] = []
    cursor: str | None = None
    redis_ahead_s: float | None = None


async def _redis_findings(config: Config, seen: _Seen) -> list[Finding]:
    try:
        async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-check") as admin:
            return await _ask_redis(admin, config, seen)
    except (Unreachable, ConfigError) as error:
        return [_fail("redis", f"{error}.")]


async def _ask_redis(admin: RedisAdmin, config: Config, seen: _Seen) -> list[Finding]:
    server = await admin.server()
    kind = await admin.kind()
    found = [
        finding
        for hazard in (redis_version, redis_role, redis_eviction, redis_memory, redis_persistence)
        for finding in hazard(server)
    ]
    seen.redis_ahead_s = server.time_ms / 1000 - time.time()
    found += clock("redis", seen.redis_ahead_s)
    found += stream_kind(kind, config.stream_key)
    seen.cursor = await admin.cursor(config.cursor_key)
    found += cursor_is_one(config.cursor_key, seen.cursor)
    stream = await admin.stream(measure=True) if kind == "stream" else None
    if stream is not None:
        consumers = seen.consumers = await admin.consumers(config.group)
        exists = stream.group(config.group) is not None
        oldest = await admin.pending(config.group, PENDING_LOOKED_AT) if exists else []
        missing = await admin.missing(oldest)
        newest = await admin.newest_fields(20)
        found += [
            *redis_holds_a_full_stream(server, stream, config),
            *stream_room(stream, config),
            *group_exists(stream, config),
            *somebody_works(stream, consumers, config),
            *groups_that_hold(stream, config, server.time_ms),
            *foreign_consumers(consumers, config),
            *unreadable_for_others(consumers, newest),
            *other_groups_read_json(stream, config),
            *partitions_are_read(stream, config),
            *partitions_as_set((await admin.parts.layout()).written, config),
            *old_dialect(newest),
            *abandoned_pending(consumers, oldest),
            *trimmed_pending(missing),
            *trimmed_unread(stream, config),
        ]
    stats = await admin.reader_stats()
    frame_at = stats.get("last_frame_at")
    found += the_reader(
        leased=await admin.reader_is_leased(),
        told=await admin.reader_status(),
        frame_age_s=time.time() - float(frame_at) if frame_at else None,
        stream=stream,
    )
    return [*found, *gaps(await admin.gaps()), *dead_letters(await admin.letters.count())]


async def _postgres_findings(config: Config, url: str, seen: _Seen) -> list[Finding]:
    try:
        found = await facts(url, TABLE_RIGHTS["worker"])
        writing = await writers(url, COUNTED)
        async with open_tuning(url) as tuning:
            server = await tuning.read_server()
        if found.may_read_schema:
            problems = await check_schema(url)
            before = None if problems or found.lacking else await past(url, config.stream_key)
        else:
            problems, before = ["What is in the schema fastworker cannot be seen: GRANT USAGE, then check again."], None
    except (Unreachable, ConfigError, SchemaRefused) as error:
        return [_fail("postgresql", f"{redact(str(error))}.")]
    return [
        *postgres_version(found),
        *postgres_state(found, config),
        *postgres_connections(found, config),
        *postgres_rights(found),
        *clock("postgresql", found.clock_ahead_s),
        *postgres_settings(server),
        *(clocks(seen.redis_ahead_s, found.clock_ahead_s) if seen.redis_ahead_s is not None else ()),
        *second_writer(writing, seen.consumers),
        *((*what_was_before(before, config, seen.cursor), *what_waits(before)) if before is not None else ()),
        *postgres_sequences(found),
        *(
            [_fail("postgresql", problem) for problem in problems if problem != encoding_problem(found.encoding)]
            or [_ok("postgresql", "The schema is complete.")]
        ),
    ]


async def check(config: Config, *, as_json: bool) -> ExitCode:
    """Print every finding; NO when one of them is a failure."""
    seen = _Seen()
    findings = [*configuration(config), *await _redis_findings(config, seen)]
    if config.database_url is None:
        findings.append(_warn("postgresql", "DATABASE_URL is not set, so PostgreSQL was not looked at."))
    else:
        findings += await _postgres_findings(config, config.database_url, seen)
    if as_json:
        write_json(msgspec.json.encode(findings))
    else:
        _print(findings)
    return ExitCode.NO if any(finding.verdict is Verdict.FAIL for finding in findings) else ExitCode.DONE


def _print(findings: list[Finding]) -> None:
    console = Terminal()
    styles = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
    for finding in findings:
        line = Text(f"{finding.verdict:<4} ", style=styles[finding.verdict])
        line.append(f"{finding.about}: {finding.sentence}", style="")
        console.print(line)
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    console.print(f"{counts[Verdict.FAIL]} to mend, {counts[Verdict.WARN]} to look at, {counts[Verdict.OK]} ok")


async def preflight(config: Config, service: Service) -> None:
    """Refuse what cannot work, in one sentence, before a service begins. Raises Unreachable, and ConfigError for a role
    that lacks rights: another try would not help."""
    if service == "worker":
        postgres = _worker_preflight(config.require_database_url("worker"))
    else:
        require_curves(config)
        postgres = _reader_preflight(config.database_url)
    log.info(", ".join(await together(_redis_preflight(config), postgres)))


async def _redis_preflight(config: Config) -> str:
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-check") as admin:
        server = await admin.server()
        kind = await admin.kind()
    for finding in (*redis_version(server), *redis_role(server), *stream_kind(kind, config.stream_key)):
        if finding.verdict is Verdict.FAIL:
            raise Unreachable(f"{redact(config.redis_url)}: {finding.sentence}")
    return f"{server.product.capitalize()} {server.version} at {redact(config.redis_url)}"


async def _reader_preflight(database_url: str | None) -> str:
    """The reader may do without PostgreSQL: it is asked only when Redis has lost the cursor."""
    if database_url is None:
        return "no PostgreSQL"
    try:
        found = await facts(database_url, TABLE_RIGHTS["reader"])
    except Unreachable as error:
        log.warning("%s. The reader asks it only when Redis has lost the cursor", error)
        return name_of(database_url)
    if found.lacking:
        log.warning(
            "The role %s lacks %s: when Redis loses the cursor nobody tells the reader where it was. Run `fastworker "
            "migrate`, then what `fastworker grants reader` prints",
            found.role,
            _some(list(found.lacking), 5),
        )
    return _with_version(database_url, found.version)


async def _worker_preflight(database_url: str) -> str:
    problems = await check_schema(database_url)
    if problems:
        more = f" And {len(problems) - 1} more: `fastworker check` tells them." if len(problems) > 1 else ""
        raise Unreachable(f"{name_of(database_url)}: the schema is not ready: {problems[0]}{more}")
    found = await facts(database_url, TABLE_RIGHTS["worker"])
    for finding in postgres_rights(found):
        if finding.verdict is Verdict.FAIL:
            raise ConfigError(f"{name_of(database_url)}: {finding.sentence}")
    return _with_version(database_url, found.version)


def _with_version(database_url: str, version: str) -> str:
    return name_of(database_url).replace("PostgreSQL", f"PostgreSQL {version}", 1)


def _some(names: list[str], count: int = 3) -> str:
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
