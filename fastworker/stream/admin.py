"""Redis as an operator sees it: facts about the server, the stream, its groups, the ledger, the dead letters.

What `status`, `check`, `dlq`, `replay` and the monitor ask and change. Reads only, except for dead letters, replayed
entries and the worker's own status field. Decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.metrics import OUTCOMES
from fastworker.redact import redact
from fastworker.stream.client import connect, translating
from fastworker.stream.cluster import SlotPool
from fastworker.stream.ids import id_ms, id_order
from fastworker.stream.keys import Keys
from fastworker.stream.letters import DeadLetters
from fastworker.stream.partitions import partition_of
from fastworker.stream.parts import (
    ConsumerState,
    Fields,
    Group,
    Parts,
    Pending,
    Stream,
    entries_of,
    entries_read,
    lowest_of,
    optional,
    text_of,
)
from fastworker.stream.scripts import script

STATUS_STALE_S: Final = 15.0
"""A field whose time is older belongs to a worker that is gone."""
READY_TIMEOUT_S: Final = 10.0
_SAVES: Final = ("rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status")


class Server(msgspec.Struct, frozen=True):
    """Facts about the server; None where it does not tell (a managed Redis without CONFIG)."""

    version: str
    product: str  # redis or valkey
    role: str  # master or slave
    cluster: bool  # and REDIS_URL does not say so
    used_memory_bytes: int
    maxmemory_bytes: int  # 0: no limit
    machine_memory_bytes: int  # 0: not told
    maxmemory_policy: str
    aof: bool
    aof_fsync: str | None
    saves: bool  # snapshots are configured
    save_failed: bool
    time_ms: int

    @property
    def version_parts(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split(".")[:2] if part.isdigit())


class GroupCount(msgspec.Struct, frozen=True):
    """Entries of one group, all of one moment. None: this server does not count them.

    `appended` and `given`: ever, onto the stream and to the group. `ledger`: what fastworker finished, by outcome, and
    its drops.
    """

    appended: int | None
    given: int | None
    pending: int
    ledger: dict[str, int]

    @property
    def unaccounted(self) -> int | None:
        """Given, but in no outcome and not pending: others acknowledged them."""
        if self.given is None:
            return None
        return self.given - self.pending - sum(self.ledger.get(outcome, 0) for outcome in OUTCOMES)


Addressed = tuple[str, Sequence[tuple[bytes, bytes]]]
"""An account, or nothing, and the fields of an entry that is its."""
Placed = tuple[int, str, Fields]
"""An entry: its partition, its id, which another partition may have, too, and its fields."""


class RedisAdmin:
    """All methods raise StreamUnavailable while Redis cannot serve, Unreachable where an operator has to act."""

    def __init__(self, redis: Redis, stream_key: str) -> None:
        self.redis = self._redis = redis
        self._key = stream_key
        self.keys = self._keys = Keys(stream_key)
        self.parts = Parts(redis, stream_key)
        self.letters = DeadLetters(self.parts)
        self._forget = redis.register_script(script("forget"))

    # --- facts

    async def ping(self) -> None:
        async with translating(self._redis):
            await self._redis.ping()

    async def server(self) -> Server:
        async with translating(self._redis):
            info = await self._redis.info()
            seconds, micros = await self._redis.time()
            config = await _settings(self._redis, "appendfsync", "save")
        return Server(
            version=str(info.get("valkey_version") or info.get("redis_version") or "0"),
            product="valkey" if "valkey_version" in info else "redis",
            role=str(info.get("role", "master")),
            cluster=bool(info.get("cluster_enabled", 0)) and not isinstance(self._redis.connection_pool, SlotPool),
            used_memory_bytes=int(info.get("used_memory", 0)),
            maxmemory_bytes=int(info.get("maxmemory", 0)),
            machine_memory_bytes=int(info.get("total_system_memory", 0)),
            maxmemory_policy=str(info.get("maxmemory_policy", "unknown")),
            aof=bool(info.get("aof_enabled", 0)),
            aof_fsync=config.get("appendfsync"),
            saves=bool(config.get("save", "")),
            save_failed="err" in [info.get(name) for name in _SAVES],
            time_ms=seconds * 1000 + micros // 1000,
        )

    async def time_ms(self) -> int:
        """The server's clock, which stream ids follow."""
        async with translating(self._redis):
            seconds, micros = await self._redis.time()
        return int(seconds * 1000 + micros // 1000)

    async def kind(self) -> str:
        """Type of the stream's key; `none` when there is none. Of several partitions the first that is no stream."""
        kinds = [await part.kind() for part in await self.parts.every()]
        wrong = [kind for kind in kinds if kind not in ("none", "stream")]
        return wrong[0] if wrong else max(kinds, key=lambda kind: kind == "stream")

    async def stream(self, *, measure: bool = False) -> Stream | None:
        """The stream and its groups; None when there is none. `measure` asks for its memory too."""
        parts = await self.parts.every()
        found = {part.key: stream for part in parts if (stream := await part.stream(measure=measure)) is not None}
        return _sum(found) if len(parts) > 1 and found else found.get(self._key)

    async def consumers(self, group: str) -> list[ConsumerState]:
        """Everybody in the group, by name; empty when there is no such group."""
        found: dict[str, ConsumerState] = {}
        for part in await self.parts.every():
            for one in await part.consumers(group):
                same = found.get(one.name, one)  # each partition counts from 0
                found[one.name] = ConsumerState(
                    one.name,
                    one.pending + (same.pending if same is not one else 0),
                    min(one.idle_ms, same.idle_ms),
                    one.leased or same.leased,
                    one.ours or same.ours,
                )
        return sorted(found.values(), key=lambda consumer: consumer.name)

    async def pending(self, group: str, count: int) -> list[Pending]:
        """The oldest pending entries of the group."""
        found = [one for part in await self.parts.every() for one in await part.pending(group, count)]
        return sorted(found, key=lambda one: id_order(one.entry_id))[:count]

    async def missing(self, pending: Sequence[Pending]) -> list[str]:
        """Which of these entries are not on the stream (trimmed while pending)."""
        missing = []
        for number in sorted({one.partition for one in pending}):
            part, ids = self.parts.one(number), [one.entry_id for one in pending if one.partition == number]
            async with translating(part.redis), part.redis.pipeline(transaction=False) as pipe:
                for entry_id in ids:
                    pipe.xrange(part.key, entry_id, entry_id)
                found = await pipe.execute()
            missing += [entry_id for entry_id, entry in zip(ids, found, strict=True) if not entry]
        return missing

    async def entries(self, after: str, last: str, count: int, *, partition: int = 0) -> list[tuple[str, Fields]]:
        """Entries of one partition beyond `after`, up to and including `last`."""
        part = self.parts.one(partition)
        async with translating(part.redis):
            return await entries_of(part.redis, part.key, f"({after}", count, last)

    async def ends(self, group: str = "") -> dict[int, str]:
        """By partition the id of its last entry, or of the last one that this group was given."""
        found = {}
        for number, part in enumerate(await self.parts.every()):
            stream = await part.stream()
            of_group = stream.group(group) if stream is not None else None
            if of_group is not None:
                found[number] = of_group.last_delivered_id
            elif stream is not None and not group:
                found[number] = stream.last_id
        return found

    async def newest(self, ends: Mapping[int, str], count: int) -> list[Placed]:
        """The newest entries of all partitions, in each up to and including this id; the oldest of them first."""
        newest: list[Placed] = []
        for number, last in ends.items():
            part = self.parts.one(number)
            async with translating(part.redis):
                answer = await part.redis.xrevrange(part.key, last, "-", count=count)
            found = cast("list[tuple[bytes, Fields]]", answer)
            newest += [(number, text_of(entry_id), fields) for entry_id, fields in found]
            newest = sorted(newest, key=lambda one: id_order(one[1]))[-count:]
        return newest

    async def newest_fields(self, count: int) -> list[Fields]:
        """Fields of the newest entries: they tell in which form the stream is written."""
        found: list[Fields] = []
        for part in await self.parts.every():
            async with translating(part.redis):
                entries = cast("list[tuple[bytes, Fields]]", await part.redis.xrevrange(part.key, count=count))
            found += [fields for _, fields in entries]
        return found

    async def ledger(self) -> dict[str, int]:
        """Outcomes and `drop:<reason>`, as the ack scripts counted them."""
        found: Counter[str] = Counter()
        for first, *_ in await self.parts.slots():
            found.update(_numbers(await self._hash(first.keys.ledger, first.redis)))
        return dict(found)

    async def count(self, group: str) -> GroupCount:
        """Who finished how much: the group's counters and the ledger, which must be of one moment to be compared."""
        ledger: Counter[str] = Counter()
        known = []
        for slot in await self.parts.slots():
            async with translating(slot[0].redis), slot[0].redis.pipeline(transaction=True) as pipe:
                for part in slot:
                    pipe.xinfo_stream(part.key)
                    pipe.xinfo_groups(part.key)
                pipe.hgetall(slot[0].keys.ledger)
                *answers, counted = await pipe.execute(raise_on_error=False)
                if isinstance(counted, Exception):
                    raise counted
                counts = [_count(*pair, group) for pair in zip(answers[::2], answers[1::2], strict=True)]
            known += [one for one in counts if one is not None]
            ledger.update(_numbers(counted))
        return GroupCount(
            appended=_total([appended for appended, _, _ in known]) if known else None,
            given=_total([given for _, given, _ in known]) if known else None,
            pending=sum(pending for _, _, pending in known),
            ledger=dict(ledger),
        )

    async def event_counts(self) -> dict[str, int]:
        """`cluster:metrics`: totalEvents, #commit, #identity, #account, errors."""
        found: Counter[str] = Counter()
        for first, *_ in await self.parts.slots():
            counts = await self._hash(first.keys.metrics, first.redis)
            found.update({field: int(value) for field, value in counts.items() if value.lstrip("-").isdigit()})
        return dict(found)

    async def reader_stats(self) -> dict[str, str]:
        return await self._hash(self._keys.reader_stats)

    async def reader_is_leased(self) -> bool:
        async with translating(self._redis):
            return bool(await self._redis.exists(self._keys.reader_lease))

    async def reader_status(self) -> dict[str, Any]:
        """`firehose:status`, empty when no reader wrote it within ten seconds."""
        async with translating(self._redis):
            text = await self._redis.get(self._keys.status)
        return cast("dict[str, Any]", msgspec.json.decode(text)) if text else {}

    async def gaps(self) -> int:
        """Stretches that a relay did not give us."""
        async with translating(self._redis):
            return int(await self._redis.llen(self._keys.gaps))

    async def newest_gaps(self, count: int) -> list[bytes]:
        """Each as JSON: relay, reason, after, resumed, at."""
        async with translating(self._redis):
            gaps: Any = await self._redis.lrange(self._keys.gaps, 0, count - 1)
            return cast("list[bytes]", gaps)

    async def forget_gap(self, text: bytes) -> None:
        """Remove a gap from the list: it is in PostgreSQL."""
        async with translating(self._redis):
            await self._redis.lrem(self._keys.gaps, 1, cast("str", text))

    async def recorded_repairs(self) -> dict[str, bytes]:
        """DIDs whose #sync the reader recorded here, with what it wrote (JSON form only)."""
        async with translating(self._redis):
            found = cast("dict[bytes, bytes]", await self._redis.hgetall(self._keys.repairs))
        return {text_of(did): record for did, record in found.items()}

    async def forget_repair(self, did: str, record: bytes) -> None:
        """Remove the record of a #sync, unless a newer one has replaced it."""
        async with translating(self._redis):
            await self._forget(keys=[self._keys.repairs], args=[did, record])

    async def cursor(self, key: str) -> str | None:
        async with translating(self._redis):
            value = await self._redis.get(key)
        return None if value is None else text_of(value)

    async def _hash(self, key: str, redis: Redis | None = None) -> dict[str, str]:
        redis = redis or self._redis
        async with translating(redis):
            found = await redis.hgetall(key)
        return {text_of(field): text_of(value) for field, value in found.items()}

    # --- the workers' own status

    async def put_status(self, owner: str, text: bytes) -> None:
        async with translating(self._redis):
            await self._redis.hset(self._keys.worker_status, owner, text)

    async def remove_status(self, *owners: str) -> None:
        async with translating(self._redis):
            await self._redis.hdel(self._keys.worker_status, *owners)

    async def statuses(self) -> dict[str, str]:
        return await self._hash(self._keys.worker_status)

    # --- replay

    async def append_if_room(self, entries: Sequence[Addressed], max_stream_len: int) -> bool:
        """Append all, each where its account's belong, unless the stream would exceed its limit: then nothing. On a
        Cluster perhaps some of them, where another appends at the same time."""
        written = (await self.parts.layout()).written
        slots = await self.parts.slots()
        places: dict[int, list[Any]] = {}  # by slot
        for did, fields in entries:
            partition = partition_of(did, written)
            number, within = (partition, 0) if len(slots) > 1 else (0, partition)
            args = places.setdefault(number, [max_stream_len])
            args += [within, len(fields) * 2]
            for name, value in fields:
                args += [name, value]
        if len(slots) > 1 and len(entries) + sum([await part.length() for (part,) in slots]) > max_stream_len:
            return False
        for number, args in places.items():
            redis = slots[number][0].redis
            async with translating(redis):
                append = redis.register_script(script("append_if_room"))
                if not await append(keys=[part.key for part in slots[number]], args=args):
                    return False
        return True


def _count(stream: Any, groups: Any, group: str) -> tuple[int | None, int | None, int] | None:
    """Appended, given to the group, pending; None where there is no stream. Raises what else was answered."""
    if isinstance(stream, ResponseError) and "no such key" in str(stream).lower():
        return None
    for answer in (stream, groups):
        if isinstance(answer, Exception):
            raise answer
    found: dict[str, Any] = next((one for one in groups if text_of(one["name"]) == group), {})
    return optional(stream.get("entries-added")), entries_read(found) if found else None, int(found.get("pending", 0))


def _numbers(found: Mapping[Any, Any]) -> dict[str, int]:
    return {text_of(field): int(value) for field, value in found.items()}


def _total(numbers: Sequence[int | None]) -> int | None:
    """None if one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _sum(partitions: dict[str, Stream]) -> Stream:
    """Of several partitions."""
    parts = partitions.values()
    names = dict.fromkeys(group.name for one in parts for group in one.groups)
    return Stream(
        length=sum(one.length for one in parts),
        entries_added=_total([one.entries_added for one in parts]),
        bytes=_total([one.bytes for one in parts]),
        first_id=lowest_of(*(one.first_id for one in parts)),
        last_id=max((one.last_id for one in parts), key=id_order),
        groups=tuple(_sum_of_group(name, [(one, one.group(name)) for one in parts]) for name in names),
        partitions=partitions,
    )


def _sum_of_group(name: str, found: list[tuple[Stream, Group | None]]) -> Group:
    """Where a partition does not have the group yet, all of it waits."""
    groups = [group for _, group in found if group is not None]
    missing = [stream for stream, group in found if group is None]
    return Group(
        name=name,
        consumers=sum(one.consumers for one in groups),
        pending=sum(one.pending for one in groups),
        last_delivered_id=max((one.last_delivered_id for one in groups), key=id_order),
        entries_read=_total([one.entries_read for one in groups]),
        lag=sum(one.lag for one in groups) + sum(one.length for one in missing),
        lag_is_exact=all(one.lag_is_exact for one in groups),
        oldest_pending_id=lowest_of(*(one.oldest_pending_id for one in groups)),
        next_id=lowest_of(*(one.next_id for one in groups), *(one.first_id for one in missing)),
    )


async def _settings(redis: Redis, *names: str) -> dict[str, str]:
    """Settings the server tells; managed servers often refuse CONFIG."""
    found: dict[str, str] = {}
    for name in names:
        try:
            answer = cast("dict[Any, Any]", await redis.config_get(name))
        except ResponseError:
            return {}
        found.update({text_of(key): text_of(value) for key, value in answer.items()})
    return found


@asynccontextmanager
async def open_redis(url: str, stream_key: str, *, client_name: str) -> AsyncIterator[RedisAdmin]:
    """Connect for the length of one command; Unreachable, in one sentence, when the server is not there now."""
    redis = connect(url, stream_key=stream_key, client_name=client_name)
    admin = RedisAdmin(redis, stream_key)
    try:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await admin.ping()
        except (StreamUnavailable, TimeoutError) as error:
            raise Unreachable(f"{redact(url)}: {str(error) or 'Redis did not answer in time'}") from error
        yield admin
    except RedisError as error:  # what translating() leaves: a command the server does not know, or our bug
        raise Unreachable(f"{redact(url)}: {redact(str(error))}") from error
    finally:
        await redis.aclose()


def age_s(entry_id: str | None, now_ms: int | None = None) -> float:
    """Seconds since the entry was appended; 0 for none."""
    if entry_id is None:
        return 0.0
    now = int(time.time() * 1000) if now_ms is None else now_ms
    return max(0.0, (now - id_ms(entry_id)) / 1000)
