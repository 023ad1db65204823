"""Each hazard that `fastworker check` knows, given the facts that show it, and not given them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from fastworker.commands import check as checks
from fastworker.commands.check import Finding, Verdict
from fastworker.config import Config
from fastworker.store.admin import Client, Facts, Past
from fastworker.stream.admin import Server
from fastworker.stream.parts import ConsumerState, Group, Pending, Stream

SERVER = Server(
    version="7.2.4",
    product="redis",
    role="master",
    cluster=False,
    used_memory_bytes=1,
    maxmemory_bytes=0,
    machine_memory_bytes=2**34,
    maxmemory_policy="noeviction",
    aof=True,
    aof_fsync="everysec",
    saves=False,
    save_failed=False,
    time_ms=1_000_000_000_000,
)
GROUP = Group("firehose-processors", 1, 0, "5-0", 5, 0, True, None, None)
STREAM = Stream(10, 10, None, "1-0", "10-0", (GROUP,))
FACTS = Facts(
    version_num=150_004,
    version="15.4",
    max_connections=100,
    reserved_connections=3,
    connections=5,
    own_connections=3,
    in_recovery=False,
    read_only=False,
    encoding="UTF8",
    role="worker",
    superuser=False,
    synchronous_commit="on",
    fsync="on",
    autovacuum="on",
    connection_limit=-1,
    clock_ahead_s=0.0,
    lacking=(),
    hidden=(),
    pooler=False,
)
CONFIG = Config()


def _consumer(
    name: str = "old-0", *, pending: int = 0, idle_ms: int = 0, leased: bool = False, ours: bool = False
) -> ConsumerState:
    return ConsumerState(name, pending, idle_ms, leased, ours)


def _said(findings: Iterator[Finding]) -> list[tuple[Verdict, str]]:
    return [(finding.verdict, finding.sentence) for finding in findings if finding.verdict is not Verdict.OK]


def _server(**changes: object) -> Server:
    return msgspec.structs.replace(SERVER, **changes)


def _reader(
    *, leased: bool = True, told: dict[str, object] | None = None, frame_age_s: float | None = 1.0
) -> Iterator[Finding]:
    told = {"connected": True} if told is None else told
    return checks.the_reader(leased=leased, told=told, frame_age_s=frame_age_s, stream=STREAM)


def _facts(**changes: object) -> Facts:
    return msgspec.structs.replace(FACTS, **changes)


def _config(**changes: object) -> Config:
    return msgspec.structs.replace(CONFIG, **changes)


OTHER = Group("osprey-consumers", 2, 0, "1-0", 1, 9, True, None, "2-0")
STALE = int(SERVER.time_ms - 3_600_000)


@pytest.mark.parametrize(
    ("findings", "verdict", "word"),
    [
        (checks.redis_version(_server(version="6.0.16")), Verdict.FAIL, "6.2 or newer"),
        (checks.redis_role(_server(role="slave")), Verdict.FAIL, "replica"),
        (checks.redis_role(_server(cluster=True)), Verdict.FAIL, "Cluster"),
        (checks.redis_eviction(_server(maxmemory_policy="allkeys-lru")), Verdict.FAIL, "noeviction"),
        (checks.redis_eviction(_server(maxmemory_policy="volatile-ttl")), Verdict.WARN, "leases may vanish"),
        (
            checks.redis_holds_a_full_stream(
                _server(maxmemory_bytes=2**30), msgspec.structs.replace(STREAM, length=1_000, bytes=10**7), CONFIG
            ),
            Verdict.WARN,
            "take 4.7 GB, and maxmemory is 1.0 GB: set REDIS_MAX_STREAM_LEN to 75,161",
        ),
        (checks.redis_memory(_server(maxmemory_bytes=100, used_memory_bytes=95)), Verdict.WARN, "95 %"),
        (checks.redis_persistence(_server(aof=False)), Verdict.WARN, "appendonly yes"),
        (checks.redis_persistence(_server(aof_fsync="no")), Verdict.WARN, "everysec"),
        (checks.redis_persistence(_server(save_failed=True)), Verdict.FAIL, "last save failed"),
        (checks.clock("redis", -12.3), Verdict.WARN, "12.3 s behind"),
        (checks.clocks(3.0, 864_000.0), Verdict.FAIL, "Clocks disagree: PostgreSQL's is 240 hours ahead"),
        (checks.clocks(-1_200.0, 0.0), Verdict.FAIL, "Clocks disagree: Redis's is 20 minutes behind"),
        (checks.clocks(7_200.0, 7_201.0), Verdict.FAIL, "Clocks disagree: this machine's is 120 minutes behind"),
        (checks.stream_kind("list", "firehose:events"), Verdict.FAIL, "REDIS_STREAM_KEY"),
        (
            checks.stream_room(
                msgspec.structs.replace(STREAM, length=95, groups=(msgspec.structs.replace(GROUP, lag=90),)),
                _config(max_stream_len=100),
            ),
            Verdict.WARN,
            "95 % full",
        ),
        (
            checks.somebody_works(
                msgspec.structs.replace(STREAM, groups=(msgspec.structs.replace(GROUP, lag=9),)),
                [_consumer(idle_ms=100_000)],
                CONFIG,
            ),
            Verdict.WARN,
            "9 entries wait and no worker is at work",
        ),
        (_reader(leased=False, told={"connected": True}), Verdict.WARN, "trims with MAXLEN"),
        (_reader(leased=False, told={}), Verdict.WARN, "No reader is at work"),
        (_reader(leased=True, told={"connected": False}), Verdict.WARN, "not connected to its relay"),
        (_reader(frame_age_s=660.0), Verdict.WARN, "last frame came 11 minutes ago"),
        (checks.old_dialect([{b"data": b'{"py_type":"x"}'}]), Verdict.WARN, "old Python reader's"),
        (checks.cursor_is_one("firehose:python_cursor", "-1"), Verdict.FAIL, "DEL it to begin at the live tip"),
        (checks.gaps(2), Verdict.WARN, "2 stretches"),
        (checks.group_exists(msgspec.structs.replace(STREAM, groups=()), CONFIG), Verdict.WARN, "no group"),
        (
            checks.groups_that_hold(
                msgspec.structs.replace(STREAM, groups=(GROUP, msgspec.structs.replace(OTHER, next_id=f"{STALE}-0"))),
                CONFIG,
                SERVER.time_ms,
            ),
            Verdict.WARN,
            "FASTWORKER_IGNORE_GROUPS=osprey-consumers",
        ),
        (checks.foreign_consumers([_consumer(idle_ms=5)], CONFIG), Verdict.WARN, "old-0"),
        (
            checks.foreign_consumers([_consumer("python-worker-4", idle_ms=5)], CONFIG),
            Verdict.WARN,
            "CONSUMER_ID=python-worker is theirs too (python-worker-4)",
        ),
        (
            checks.foreign_consumers([_consumer("worker-3-p1", idle_ms=5)], CONFIG),
            Verdict.WARN,
            "TypeScript workers also take entries",
        ),
        (
            checks.unreadable_for_others([_consumer(idle_ms=5)], [{b"n": b"\x01"}]),
            Verdict.FAIL,
            "native entries",
        ),
        (
            checks.other_groups_read_json(
                msgspec.structs.replace(STREAM, groups=(GROUP, OTHER)), _config(stream_format="frame")
            ),
            Verdict.FAIL,
            "osprey-consumers",
        ),
        (
            checks.partitions_are_read(
                msgspec.structs.replace(
                    STREAM, partitions={"s": STREAM, "s:1": msgspec.structs.replace(STREAM, length=1, groups=())}
                ),
                CONFIG,
            ),
            Verdict.FAIL,
            "Nobody reads s:1",
        ),
        (checks.partitions_as_set(1, _config(partitions=4)), Verdict.FAIL, "FASTWORKER_STREAM_FORMAT=native"),
        (
            checks.partitions_as_set(
                1,
                _config(partitions=4, stream_format="native", given=frozenset(["FASTWORKER_STREAM_PARTITIONS"])),
            ),
            Verdict.WARN,
            "The reader appends to 1 partition, and",
        ),
        (
            checks.abandoned_pending([_consumer(pending=7, idle_ms=100_000)], []),
            Verdict.WARN,
            "7 entries are pending",
        ),
        (
            checks.abandoned_pending([], [Pending("1-0", "python-worker-0", 3_600_000, 2)]),
            Verdict.WARN,
            "1-0 is pending for python-worker-0",
        ),
        (checks.trimmed_pending(["1-0"]), Verdict.FAIL, "MAXLEN"),
        (
            checks.trimmed_unread(
                msgspec.structs.replace(
                    STREAM, entries_added=50, groups=(msgspec.structs.replace(GROUP, entries_read=30, lag=10),)
                ),
                CONFIG,
            ),
            Verdict.FAIL,
            "10 entries were trimmed before",
        ),
        (checks.dead_letters(3), Verdict.WARN, "fastworker dlq list"),
        (checks.postgres_version(_facts(version_num=130_011, version="13.11")), Verdict.FAIL, "14 or newer"),
        (checks.postgres_state(_facts(in_recovery=True), CONFIG), Verdict.FAIL, "standby"),
        (checks.postgres_state(_facts(read_only=True), CONFIG), Verdict.FAIL, "read-only"),
        (checks.postgres_state(_facts(encoding="SQL_ASCII"), CONFIG), Verdict.FAIL, "UTF8"),
        (checks.postgres_state(_facts(pooler=True), CONFIG), Verdict.FAIL, "session mode"),
        (checks.postgres_state(_facts(fsync="off"), CONFIG), Verdict.WARN, "fsync"),
        (
            checks.postgres_state(_facts(synchronous_commit="off"), _config(synchronous_commit="keep")),
            Verdict.WARN,
            "=keep",
        ),
        (checks.postgres_state(_facts(autovacuum="off"), CONFIG), Verdict.WARN, "autovacuum"),
        (checks.postgres_connections(FACTS, _config(pool_size=200)), Verdict.FAIL, "lower DB_POOL_SIZE"),
        (
            checks.postgres_connections(_facts(connections=95, clients=(Client("node as app", 90),)), CONFIG),
            Verdict.WARN,
            "Others hold 92 of 97 connections (90 by node as app)",
        ),
        (checks.second_writer(["a client as app"], []), Verdict.FAIL, "python-backfill-worker"),
        (
            checks.what_was_before(Past("12345", False, 0, 0), CONFIG, None),
            Verdict.WARN,
            "SET firehose:python_cursor 12345",
        ),
        (
            checks.what_waits(Past(None, True, 0, 0, 2, "context of at://a: no")),
            Verdict.WARN,
            "the first one, context of at://a: no",
        ),
        (checks.what_waits(Past(None, True, 0, 0, refused=3)), Verdict.WARN, "3 records"),
        (checks.what_was_before(Past(None, True, 9, 2), CONFIG, "7"), Verdict.WARN, "2 of 9 avatars"),
        (checks.postgres_connections(_facts(connection_limit=4), CONFIG), Verdict.FAIL, "CONNECTION LIMIT"),
        (checks.postgres_rights(_facts(lacking=("UPDATE on posts",))), Verdict.FAIL, "UPDATE on posts"),
        (checks.postgres_rights(_facts(hidden=("posts",))), Verdict.FAIL, "hide rows of posts"),
        (checks.postgres_rights(_facts(superuser=True)), Verdict.WARN, "superuser"),
        (checks.configuration(_config(processes=4, pipelines=5)), Verdict.WARN, "want 21 connections"),
    ],
)
def test_hazard_is_seen(findings: Iterator[Finding], verdict: Verdict, word: str) -> None:
    said = _said(findings)
    assert [one for one, _ in said] == [verdict]
    assert word in said[0][1]


def test_nothing_is_said_where_all_is_well() -> None:
    leased = _consumer("python-worker-0", pending=3, idle_ms=10, leased=True, ours=True)
    findings = [
        *checks.redis_version(SERVER),
        *checks.redis_version(_server(product="valkey", version="9.0.1")),
        *checks.redis_role(SERVER),
        *checks.redis_eviction(SERVER),
        *checks.redis_memory(SERVER),
        *checks.redis_persistence(SERVER),
        *checks.clock("redis", 0.3),
        *checks.clocks(-300.0, 299.0),
        *checks.stream_kind("stream", "x"),
        *checks.stream_kind("none", "x"),
        *checks.stream_room(STREAM, CONFIG),
        *checks.group_exists(STREAM, CONFIG),
        *checks.groups_that_hold(
            msgspec.structs.replace(STREAM, groups=(GROUP, OTHER)), _config(ignore_groups=("osprey-consumers",)), 10**13
        ),
        *checks.foreign_consumers([leased, _consumer(idle_ms=100_000)], CONFIG),
        *checks.unreadable_for_others([leased], [{b"n": b""}]),
        *checks.other_groups_read_json(msgspec.structs.replace(STREAM, groups=(GROUP, OTHER)), CONFIG),
        *checks.partitions_are_read(msgspec.structs.replace(STREAM, partitions={"s": STREAM, "s:1": STREAM}), CONFIG),
        *checks.partitions_are_read(STREAM, CONFIG),
        *checks.partitions_as_set(4, _config(partitions=4, stream_format="native")),
        *checks.partitions_as_set(1, CONFIG),
        *checks.abandoned_pending([leased], [Pending("1-0", "python-worker-0", 10, 1)]),
        *checks.trimmed_pending([]),
        *checks.dead_letters(0),
        *checks.trimmed_unread(STREAM, CONFIG),
        *checks.redis_holds_a_full_stream(
            SERVER, msgspec.structs.replace(STREAM, length=10_000, bytes=5_000_000), CONFIG
        ),
        *checks.somebody_works(STREAM, [], CONFIG),
        *_reader(),
        *checks.the_reader(leased=False, told={}, frame_age_s=None, stream=None),
        *checks.old_dialect([{b"data": b"{}"}, {b"n": b""}]),
        *checks.cursor_is_one("c", None),
        *checks.cursor_is_one("c", "31527015322"),
        *checks.gaps(0),
        *checks.second_writer([], []),
        *checks.second_writer(["a client as app"], [_consumer(idle_ms=5)]),
        *checks.what_waits(Past(None, True, 0, 0)),
        *checks.what_was_before(Past("12345", True, 0, 0), CONFIG, None),
        *checks.what_was_before(Past("12345", False, 0, 0), CONFIG, "1"),
        *checks.postgres_version(FACTS),
        *checks.postgres_state(_facts(synchronous_commit="off"), CONFIG),
        *checks.postgres_connections(FACTS, CONFIG),
        *checks.postgres_rights(FACTS),
        *checks.configuration(CONFIG),
    ]
    assert _said(iter(findings)) == []


def test_foreign_workers_and_a_form_they_cannot_read() -> None:
    said = _said(checks.foreign_consumers([_consumer(idle_ms=5)], _config(stream_format="native")))
    assert [verdict for verdict, _ in said] == [Verdict.WARN, Verdict.FAIL]
