"""Redis as an operator sees it: facts about the server, the stream, its groups, the ledger, the dead letters.

What `status`, `check`, `dlq`, `replay` and the monitor ask and change. Reads only, except for dead letters, replayed
entries and the worker's own status field. Decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.metrics import OUTCOMES
from fastworker.redact import redact
from fastworker.stream.client import connect, error_code, translating
from fastworker.stream.cluster import SlotPool
from fastworker.stream.ids import id_order
from fastworker.stream.keys import Keys
from fastworker.stream.partitions import Layout, layout, partition_of
from fastworker.stream.scripts import script

STATUS_STALE_S: Final = 15.0
"""A field whose time is older belongs to a worker that is gone."""
COUNTED_MAX: Final = 100
"""Entries that are fetched to count a small backlog exactly where the server does not know it."""
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


class Group(msgspec.Struct, frozen=True):
    """One consumer group. `lag`: entries not delivered to it yet; `lag_is_exact` False: estimated from ids."""

    name: str
    consumers: int
    pending: int
    last_delivered_id: str
    entries_read: int | None
    lag: int
    lag_is_exact: bool
    oldest_pending_id: str | None
    next_id: str | None  # of the first entry not delivered yet

    @property
    def unfinished_id(self) -> str | None:
        """The oldest entry that this group has not finished."""
        return _lowest(self.oldest_pending_id, self.next_id)


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


class ConsumerState(msgspec.Struct, frozen=True):
    """`leased`: by a fastworker that is alive; `ours`: leased by one at some time."""

    name: str
    pending: int
    idle_ms: int
    leased: bool
    ours: bool


class Stream(msgspec.Struct, frozen=True):
    """`entries_added`: ever, from Redis 7 on. `bytes` None: not measured.

    `partitions`: by key, where there are several; the other members are then sums, and the lowest and highest ids.
    """

    length: int
    entries_added: int | None
    bytes: int | None
    first_id: str | None
    last_id: str
    groups: tuple[Group, ...]
    partitions: Mapping[str, Stream] = {}

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.name == name), None)


class Pending(msgspec.Struct, frozen=True):
    entry_id: str
    consumer: str
    idle_ms: int
    deliveries: int
    partition: int = 0


Fields = dict[bytes, bytes]
Addressed = tuple[str, Sequence[tuple[bytes, bytes]]]
"""An account, or nothing, and the fields of an entry that is its."""
Placed = tuple[int, str, Fields]
"""An entry: its partition, its id, which another partition may have, too, and its fields."""


class _Part:
    """One partition."""

    def __init__(self, redis: Redis, stream_key: str, number: int) -> None:
        self.key: Final = Keys(stream_key, partition=number).stream
        self._redis = redis
        self._stream_key = stream_key
        self._number = number

    async def kind(self) -> str:
        """Type of the stream's key; `none` when there is none."""
        async with translating(self._redis):
            return _text(await self._redis.type(self.key))

    async def stream(self, *, measure: bool = False) -> Stream | None:
        """The stream and its groups; None when there is none. `measure` asks for its memory too."""
        async with translating(self._redis):
            try:
                found = await self._redis.xinfo_stream(self.key)
            except ResponseError as error:
                if "no such key" in str(error).lower():
                    return None
                raise
            length = int(found["length"])
            last_id = _text(found["last-generated-id"])
            first = found.get("first-entry")
            first_id = _text(first[0]) if first else None
            groups = [
                await self._group(group, length, first_id, last_id)
                for group in await self._redis.xinfo_groups(self.key)
            ]
            size = int(await self._redis.memory_usage(self.key, samples=5) or 0) if measure else None
        return Stream(length, _optional(found.get("entries-added")), size, first_id, last_id, tuple(groups))

    async def _group(self, found: dict[str, Any], length: int, first_id: str | None, last_id: str) -> Group:
        name = _text(found["name"])
        delivered = _text(found["last-delivered-id"])
        pending = int(found["pending"])
        summary = await self._redis.xpending(self.key, name) if pending else {}
        following = await _range(self._redis, self.key, f"({delivered}", 1)
        lag, exact = found.get("lag"), True
        if not following:
            lag = 0
        elif lag is None:
            # Redis 6.2 does not count; newer ones give up after a deletion in the middle.
            ids = await _range(self._redis, self.key, f"({delivered}", COUNTED_MAX)
            exact = len(ids) < COUNTED_MAX
            lag = len(ids) if exact else max(len(ids), _share(first_id, delivered, last_id, length))
        return Group(
            name=name,
            consumers=int(found["consumers"]),
            pending=pending,
            last_delivered_id=delivered,
            entries_read=_entries_read(found),
            lag=int(lag),
            lag_is_exact=exact,
            oldest_pending_id=_text(summary["min"]) if summary.get("min") else None,
            next_id=following[0][0] if following else None,
        )

    async def consumers(self, group: str) -> list[ConsumerState]:
        """Everybody in the group, by name; empty when there is no such group."""
        async with translating(self._redis):
            try:
                found = await self._redis.xinfo_consumers(self.key, group)
            except ResponseError as error:
                if error_code(error) == "NOGROUP" or "no such key" in str(error).lower():
                    return []
                raise
            keys = Keys(self._stream_key, group, self._number)
            ours = {_text(name) for name in await self._redis.smembers(keys.consumers)}
            names = [_text(one["name"]) for one in found]
            leases = [await self._redis.get(keys.consumer_lease(name)) for name in names]
        consumers = [
            ConsumerState(name, int(one["pending"]), int(one["idle"]), lease is not None, name in ours)
            for name, one, lease in zip(names, found, leases, strict=True)
        ]
        return sorted(consumers, key=lambda consumer: consumer.name)

    async def pending(self, group: str, count: int) -> list[Pending]:
        """The oldest pending entries of the group."""
        async with translating(self._redis):
            try:
                found = await self._redis.xpending_range(self.key, group, "-", "+", count)
            except ResponseError as error:
                if self._number and error_code(error) == "NOGROUP":  # the workers have not come to it yet
                    return []
                raise
        return [
            Pending(
                _text(one["message_id"]),
                _text(one["consumer"]),
                int(one["time_since_delivered"]),
                int(one["times_delivered"]),
                self._number,
            )
            for one in found
        ]


class RedisAdmin:
    """All methods raise StreamUnavailable while Redis cannot serve, Unreachable where an operator has to act."""

    def __init__(self, redis: Redis, stream_key: str) -> None:
        self.redis = self._redis = redis
        self._key = stream_key
        self.keys = self._keys = Keys(stream_key)
        self._retry = redis.register_script(script("retry"))
        self._append = redis.register_script(script("append_if_room"))
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

    async def layout(self) -> Layout:
        return await layout(self._redis, self._key)

    async def _parts(self) -> list[_Part]:
        known = (await self.layout()).known
        return [_Part(self._redis, self._key, number) for number in range(known)]

    async def kind(self) -> str:
        """Type of the stream's key; `none` when there is none. Of several partitions the first that is no stream."""
        kinds = [await part.kind() for part in await self._parts()]
        wrong = [kind for kind in kinds if kind not in ("none", "stream")]
        return wrong[0] if wrong else max(kinds, key=lambda kind: kind == "stream")

    async def stream(self, *, measure: bool = False) -> Stream | None:
        """The stream and its groups; None when there is none. `measure` asks for its memory too."""
        parts = await self._parts()
        found = {part.key: stream for part in parts if (stream := await part.stream(measure=measure)) is not None}
        return _sum(found) if len(parts) > 1 and found else found.get(self._key)

    async def consumers(self, group: str) -> list[ConsumerState]:
        """Everybody in the group, by name; empty when there is no such group."""
        found: dict[str, ConsumerState] = {}
        for part in await self._parts():
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
        found = [one for part in await self._parts() for one in await part.pending(group, count)]
        return sorted(found, key=lambda one: id_order(one.entry_id))[:count]

    async def missing(self, pending: Sequence[Pending]) -> list[str]:
        """Which of these entries are not on the stream (trimmed while pending)."""
        async with translating(self._redis), self._redis.pipeline(transaction=False) as pipe:
            for one in pending:
                pipe.xrange(Keys(self._key, partition=one.partition).stream, one.entry_id, one.entry_id)
            found = await pipe.execute()
        return [one.entry_id for one, entry in zip(pending, found, strict=True) if not entry]

    async def entries(self, after: str, last: str, count: int, *, partition: int = 0) -> list[tuple[str, Fields]]:
        """Entries of one partition beyond `after`, up to and including `last`."""
        async with translating(self._redis):
            return await _range(self._redis, Keys(self._key, partition=partition).stream, f"({after}", count, last)

    async def ends(self, group: str = "") -> dict[int, str]:
        """By partition the id of its last entry, or of the last one that this group was given."""
        found = {}
        for number, part in enumerate(await self._parts()):
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
            key = Keys(self._key, partition=number).stream
            async with translating(self._redis):
                found = cast("list[tuple[bytes, Fields]]", await self._redis.xrevrange(key, last, "-", count=count))
            newest += [(number, _text(entry_id), fields) for entry_id, fields in found]
            newest = sorted(newest, key=lambda one: id_order(one[1]))[-count:]
        return newest

    async def newest_fields(self, count: int) -> list[Fields]:
        """Fields of the newest entries: they tell in which form the stream is written."""
        parts = await self._parts()
        async with translating(self._redis), self._redis.pipeline(transaction=False) as pipe:
            for part in parts:
                pipe.xrevrange(part.key, count=count)
            found = await pipe.execute()
        return [fields for entries in found for _, fields in entries]

    async def ledger(self) -> dict[str, int]:
        """Outcomes and `drop:<reason>`, as the ack scripts counted them."""
        return {field: int(value) for field, value in (await self._hash(self._keys.ledger)).items()}

    async def count(self, group: str) -> GroupCount:
        """Who finished how much: the group's counters and the ledger, which must be of one moment to be compared."""
        parts = await self._parts()
        async with translating(self._redis), self._redis.pipeline(transaction=True) as pipe:
            for part in parts:
                pipe.xinfo_stream(part.key)
                pipe.xinfo_groups(part.key)
            pipe.hgetall(self._keys.ledger)
            *answers, ledger = await pipe.execute(raise_on_error=False)
        if isinstance(ledger, Exception):
            raise ledger
        counts = [_count(*pair, group) for pair in zip(answers[::2], answers[1::2], strict=True)]
        known = [one for one in counts if one is not None]
        return GroupCount(
            appended=_total([appended for appended, _, _ in known]) if known else None,
            given=_total([given for _, given, _ in known]) if known else None,
            pending=sum(pending for _, _, pending in known),
            ledger={_text(field): int(value) for field, value in ledger.items()},
        )

    async def event_counts(self) -> dict[str, int]:
        """`cluster:metrics`: totalEvents, #commit, #identity, #account, errors."""
        counts = await self._hash(self._keys.metrics)
        return {field: int(value) for field, value in counts.items() if value.lstrip("-").isdigit()}

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
        return {_text(did): record for did, record in found.items()}

    async def forget_repair(self, did: str, record: bytes) -> None:
        """Remove the record of a #sync, unless a newer one has replaced it."""
        async with translating(self._redis):
            await self._forget(keys=[self._keys.repairs], args=[did, record])

    async def cursor(self, key: str) -> str | None:
        async with translating(self._redis):
            value = await self._redis.get(key)
        return None if value is None else _text(value)

    async def _hash(self, key: str) -> dict[str, str]:
        async with translating(self._redis):
            found = await self._redis.hgetall(key)
        return {_text(field): _text(value) for field, value in found.items()}

    # --- the workers' own status

    async def put_status(self, owner: str, text: bytes) -> None:
        async with translating(self._redis):
            await self._redis.hset(self._keys.worker_status, owner, text)

    async def remove_status(self, *owners: str) -> None:
        async with translating(self._redis):
            await self._redis.hdel(self._keys.worker_status, *owners)

    async def statuses(self) -> dict[str, str]:
        return await self._hash(self._keys.worker_status)

    # --- dead letters

    async def dead_letters(self) -> int:
        async with translating(self._redis):
            return int(await self._redis.xlen(self._keys.dead_letters))

    async def letters(self, *, after: str | None = None, count: int = 100) -> list[tuple[str, Fields]]:
        """Dead letters in the order they were written, those beyond `after`."""
        start = "-" if after is None else f"({after}"
        async with translating(self._redis):
            return await _range(self._redis, self._keys.dead_letters, start, count)

    async def newest_letters(self, count: int) -> list[tuple[str, Fields]]:
        async with translating(self._redis):
            found = cast(
                "list[tuple[bytes, Fields]]", await self._redis.xrevrange(self._keys.dead_letters, count=count)
            )
        return [(_text(letter_id), fields) for letter_id, fields in found]

    async def letter(self, letter_id: str) -> Fields | None:
        async with translating(self._redis):
            found = await _range(self._redis, self._keys.dead_letters, letter_id, 1, letter_id)
        return found[0][1] if found else None

    async def retry_letter(self, letter_id: str, fields: Fields, did: str = "") -> bool:
        """Move a letter to the stream as an entry of these fields; False when it was gone already.

        `did`: whose it is, which says in which partition it belongs.
        """
        args: list[Any] = [letter_id]
        for name, value in fields.items():
            args += [name, value]
        partition = partition_of(did, (await self.layout()).written)
        async with translating(self._redis):
            keys = [self._keys.dead_letters, Keys(self._key, partition=partition).stream]
            return bool(await self._retry(keys=keys, args=args))

    async def purge_letters(self, letter_ids: Sequence[str]) -> int:
        if not letter_ids:
            return 0
        async with translating(self._redis):
            return int(await self._redis.xdel(self._keys.dead_letters, *letter_ids))

    # --- replay

    async def append_if_room(self, entries: Sequence[Addressed], max_stream_len: int) -> bool:
        """Append all, each where its account's belong, unless the stream would exceed its limit: then nothing."""
        found = await self.layout()
        args: list[Any] = [max_stream_len]
        for did, fields in entries:
            args += [partition_of(did, found.written), len(fields) * 2]
            for name, value in fields:
                args += [name, value]
        async with translating(self._redis):
            keys = [Keys(self._key, partition=number).stream for number in range(found.known)]
            return bool(await self._append(keys=keys, args=args))


async def _range(redis: Redis, key: str, start: str, count: int, end: str = "+") -> list[tuple[str, Fields]]:
    found = cast("list[tuple[bytes, Fields]]", await redis.xrange(key, start, end, count=count))
    return [(_text(entry_id), fields) for entry_id, fields in found]


def _count(stream: Any, groups: Any, group: str) -> tuple[int | None, int | None, int] | None:
    """Appended, given to the group, pending; None where there is no stream. Raises what else was answered."""
    if isinstance(stream, ResponseError) and "no such key" in str(stream).lower():
        return None
    for answer in (stream, groups):
        if isinstance(answer, Exception):
            raise answer
    found: dict[str, Any] = next((one for one in groups if _text(one["name"]) == group), {})
    return _optional(stream.get("entries-added")), _entries_read(found) if found else None, int(found.get("pending", 0))


def _total(numbers: Sequence[int | None]) -> int | None:
    """None if one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _lowest(*ids: str | None) -> str | None:
    return min((one for one in ids if one is not None), key=id_order, default=None)


def _sum(partitions: dict[str, Stream]) -> Stream:
    """Of several partitions."""
    parts = partitions.values()
    names = dict.fromkeys(group.name for one in parts for group in one.groups)
    return Stream(
        length=sum(one.length for one in parts),
        entries_added=_total([one.entries_added for one in parts]),
        bytes=_total([one.bytes for one in parts]),
        first_id=_lowest(*(one.first_id for one in parts)),
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
        oldest_pending_id=_lowest(*(one.oldest_pending_id for one in groups)),
        next_id=_lowest(*(one.next_id for one in groups), *(one.first_id for one in missing)),
    )


async def _settings(redis: Redis, *names: str) -> dict[str, str]:
    """Settings the server tells; managed servers often refuse CONFIG."""
    found: dict[str, str] = {}
    for name in names:
        try:
            answer = cast("dict[Any, Any]", await redis.config_get(name))
        except ResponseError:
            return {}
        found.update({_text(key): _text(value) for key, value in answer.items()})
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


def id_ms(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


def age_s(entry_id: str | None, now_ms: int | None = None) -> float:
    """Seconds since the entry was appended; 0 for none."""
    if entry_id is None:
        return 0.0
    now = int(time.time() * 1000) if now_ms is None else now_ms
    return max(0.0, (now - id_ms(entry_id)) / 1000)


def _share(first_id: str | None, delivered: str, last_id: str, length: int) -> int:
    """Entries after `delivered`, as if they had come evenly."""
    if first_id is None:
        return 0
    first, last, at = id_ms(first_id), id_ms(last_id), id_ms(delivered)
    if at <= first:
        return length
    return round(length * (last - at) / (last - first)) if last > first else length


def _entries_read(group: dict[str, Any]) -> int | None:
    return 0 if _text(group["last-delivered-id"]) == "0-0" else _optional(group.get("entries-read"))


def _optional(value: Any) -> int | None:
    return None if value is None else int(value)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
