"""Redis as an operator sees it: facts about the server, the stream, its groups, the ledger, the dead letters.

What `status`, `check`, `dlq`, `replay` and the monitor ask and change. Reads only, except for dead letters, replayed
entries and the worker's own status field. Decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
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
from fastworker.stream.keys import Keys
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
        return self.oldest_pending_id or self.next_id


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
    """`entries_added`: ever, from Redis 7 on. `bytes` None: not measured."""

    length: int
    entries_added: int | None
    bytes: int | None
    first_id: str | None
    last_id: str
    groups: tuple[Group, ...]

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.name == name), None)


class Pending(msgspec.Struct, frozen=True):
    entry_id: str
    consumer: str
    idle_ms: int
    deliveries: int


Fields = dict[bytes, bytes]


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

    async def kind(self) -> str:
        """Type of the stream's key; `none` when there is none."""
        async with translating(self._redis):
            return _text(await self._redis.type(self._key))

    async def stream(self, *, measure: bool = False) -> Stream | None:
        """The stream and its groups; None when there is none. `measure` asks for its memory too."""
        async with translating(self._redis):
            try:
                found = await self._redis.xinfo_stream(self._key)
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
                for group in await self._redis.xinfo_groups(self._key)
            ]
            size = int(await self._redis.memory_usage(self._key, samples=5) or 0) if measure else None
        return Stream(length, _optional(found.get("entries-added")), size, first_id, last_id, tuple(groups))

    async def _group(self, found: dict[str, Any], length: int, first_id: str | None, last_id: str) -> Group:
        name = _text(found["name"])
        delivered = _text(found["last-delivered-id"])
        pending = int(found["pending"])
        summary = await self._redis.xpending(self._key, name) if pending else {}
        following = await self._range(self._key, f"({delivered}", 1)
        lag, exact = found.get("lag"), True
        if not following:
            lag = 0
        elif lag is None:
            # Redis 6.2 does not count; newer ones give up after a deletion in the middle.
            ids = await self._range(self._key, f"({delivered}", COUNTED_MAX)
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
                found = await self._redis.xinfo_consumers(self._key, group)
            except ResponseError as error:
                if error_code(error) == "NOGROUP" or "no such key" in str(error).lower():
                    return []
                raise
            ours = {_text(name) for name in await self._redis.smembers(Keys(self._key, group).consumers)}
            names = [_text(one["name"]) for one in found]
            leases = await self._redis.mget([self._keys.consumer_lease(name) for name in names]) if names else []
        consumers = [
            ConsumerState(name, int(one["pending"]), int(one["idle"]), lease is not None, name in ours)
            for name, one, lease in zip(names, found, leases, strict=True)
        ]
        return sorted(consumers, key=lambda consumer: consumer.name)

    async def pending(self, group: str, count: int) -> list[Pending]:
        """The oldest pending entries of the group."""
        async with translating(self._redis):
            found = await self._redis.xpending_range(self._key, group, "-", "+", count)
        return [
            Pending(
                _text(one["message_id"]),
                _text(one["consumer"]),
                int(one["time_since_delivered"]),
                int(one["times_delivered"]),
            )
            for one in found
        ]

    async def missing(self, entry_ids: Sequence[str]) -> list[str]:
        """Which of these entries are not on the stream (trimmed while pending)."""
        async with translating(self._redis), self._redis.pipeline(transaction=False) as pipe:
            for entry_id in entry_ids:
                pipe.xrange(self._key, entry_id, entry_id)
            found = await pipe.execute()
        return [entry_id for entry_id, entry in zip(entry_ids, found, strict=True) if not entry]

    async def entries(self, after: str, last: str, count: int) -> list[tuple[str, Fields]]:
        """Entries beyond `after`, up to and including `last`."""
        async with translating(self._redis):
            return await self._range(self._key, f"({after}", count, last)

    async def newest(self, last: str, count: int) -> list[tuple[str, Fields]]:
        """The newest entries up to and including `last`, the oldest of them first."""
        async with translating(self._redis):
            found = cast("list[tuple[bytes, Fields]]", await self._redis.xrevrange(self._key, last, "-", count=count))
        return [(_text(entry_id), fields) for entry_id, fields in reversed(found)]

    async def newest_fields(self, count: int) -> list[Fields]:
        """Fields of the newest entries: they tell in which form the stream is written."""
        async with translating(self._redis):
            found = cast("list[tuple[bytes, Fields]]", await self._redis.xrevrange(self._key, count=count))
        return [fields for _, fields in found]

    async def ledger(self) -> dict[str, int]:
        """Outcomes and `drop:<reason>`, as the ack scripts counted them."""
        return {field: int(value) for field, value in (await self._hash(self._keys.ledger)).items()}

    async def count(self, group: str) -> GroupCount:
        """Who finished how much: the group's counters and the ledger, which must be of one moment to be compared."""
        async with translating(self._redis), self._redis.pipeline(transaction=True) as pipe:
            pipe.xinfo_stream(self._key)
            pipe.xinfo_groups(self._key)
            pipe.hgetall(self._keys.ledger)
            stream, groups, ledger = await pipe.execute(raise_on_error=False)
            if isinstance(stream, ResponseError) and "no such key" in str(stream).lower():
                stream, groups = {}, []
            for answer in (stream, groups, ledger):
                if isinstance(answer, Exception):
                    raise answer
        found: dict[str, Any] = next((one for one in groups if _text(one["name"]) == group), {})
        return GroupCount(
            appended=_optional(stream.get("entries-added")),
            given=_entries_read(found) if found else None,
            pending=int(found.get("pending", 0)),
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
        """It is closed."""
        async with translating(self._redis):
            await self._redis.lrem(self._keys.gaps, 1, cast("str", text))

    async def recorded_repairs(self) -> dict[str, bytes]:
        """DIDs whose #sync the reader recorded here, with what it wrote (JSON form only)."""
        async with translating(self._redis):
            found = cast("dict[bytes, bytes]", await self._redis.hgetall(self._keys.repairs))
        return {_text(did): record for did, record in found.items()}

    async def forget_repair(self, did: str, record: bytes) -> None:
        """Unless another #sync was recorded meanwhile."""
        async with translating(self._redis):
            await self._forget(keys=[self._keys.repairs], args=[did, record])

    async def cursor(self, key: str) -> str | None:
        async with translating(self._redis):
            value = await self._redis.get(key)
        return None if value is None else _text(value)

    async def _range(self, key: str, start: str, count: int, end: str = "+") -> list[tuple[str, Fields]]:
        found = cast("list[tuple[bytes, Fields]]", await self._redis.xrange(key, start, end, count=count))
        return [(_text(entry_id), fields) for entry_id, fields in found]

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
            return await self._range(self._keys.dead_letters, start, count)

    async def newest_letters(self, count: int) -> list[tuple[str, Fields]]:
        async with translating(self._redis):
            found = cast(
                "list[tuple[bytes, Fields]]", await self._redis.xrevrange(self._keys.dead_letters, count=count)
            )
        return [(_text(letter_id), fields) for letter_id, fields in found]

    async def letter(self, letter_id: str) -> Fields | None:
        async with translating(self._redis):
            found = await self._range(self._keys.dead_letters, letter_id, 1, letter_id)
        return found[0][1] if found else None

    async def retry_letter(self, letter_id: str, fields: Fields) -> bool:
        """Move a letter to the stream as an entry of these fields; False when it was gone already."""
        args: list[Any] = [letter_id]
        for name, value in fields.items():
            args += [name, value]
        async with translating(self._redis):
            return bool(await self._retry(keys=[self._keys.dead_letters, self._key], args=args))

    async def purge_letters(self, letter_ids: Sequence[str]) -> int:
        if not letter_ids:
            return 0
        async with translating(self._redis):
            return int(await self._redis.xdel(self._keys.dead_letters, *letter_ids))

    # --- replay

    async def append_if_room(self, entries: Sequence[Sequence[tuple[bytes, bytes]]], max_stream_len: int) -> bool:
        """Append all, unless the stream would exceed its limit; then nothing, and False."""
        args: list[Any] = [max_stream_len]
        for fields in entries:
            args.append(len(fields) * 2)
            for name, value in fields:
                args += [name, value]
        async with translating(self._redis):
            return bool(await self._append(keys=[self._key], args=args))


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
