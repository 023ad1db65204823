"""The reader's side of Redis: the append script with its cursor, the lease, trimming, the dashboard's keys.

Three scripts (stream/lua) carry the promises. `append` puts a chunk on the stream and then moves the cursor, and does
neither unless this reader holds the lease and the cursor is where it left it. `trim` removes what every group has
finished, computed and removed in one step. `set_aside_abandoned` takes what nobody will ever finish from the head of a
full stream.
What a script reaches is a slot: the whole stream, or on a Cluster one partition (slots.py).
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Final, cast

import msgspec
from redis.asyncio import Redis

from fastworker.errors import ConfigError, Unreachable
from fastworker.stream.chunk import Chunk
from fastworker.stream.client import translating
from fastworker.stream.cluster import node_of
from fastworker.stream.database import GoBack
from fastworker.stream.ids import id_order
from fastworker.stream.keys import BROADCAST, GROUP, Keys, stream_of
from fastworker.stream.limits import ABANDONED_MS, DEAD_LETTERS_MAX, STREAM_LEN_MAX
from fastworker.stream.lineage import lineage_of
from fastworker.stream.partitions import declare, layout
from fastworker.stream.scripts import script
from fastworker.stream.slot import ReaderLeaseLost, StreamBroken
from fastworker.stream.slots import Position, Slots, of_every, seq_of

log = logging.getLogger(__name__)

OURS: Final = "fastworker"
"""Value of `reader` in `firehose:status`. The readers before this one do not write that member."""

DASHBOARD_TTL_S: Final = 10

CHUNK_ITEMS: Final = 500
CHUNK_BYTES: Final = 2_000_000


_Entries = list[tuple[bytes, dict[bytes, bytes]]]


class StoreWentBack(Exception):
    """PostgreSQL lost what was stored, and the stream no longer has all of it."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self.request = request


class TrimResult(msgspec.Struct, frozen=True):
    """`held_by`: the group that keeps the oldest entries, those from id `bound` on.

    Both are empty when no group counts; `bound` alone when `held_by` does not exist yet.
    """

    trimmed: int
    held_by: str
    bound: str


class Feed:
    """One reader's hold on the stream. All methods raise `StreamUnavailable` while Redis cannot serve."""

    def __init__(
        self,
        redis: Redis,
        *,
        stream_key: str,
        cursor_key: str,
        max_stream_len: int,
        stream_bytes_max: int | None = None,
        dead_letter_maxlen: int = DEAD_LETTERS_MAX,
        group: str = "",
        ignore_groups: Sequence[str] = (),
        keep_s: float = 0.0,
    ) -> None:
        self.partitions = 1
        """How many get entries."""
        self._redis = redis
        self._stream = stream_key
        self._group = group
        self._cursor_key = cursor_key
        self._slots = Slots(redis, stream_key, cursor_key, group, secrets.token_hex(8))
        self._parts = self._slots.parts
        self._keys = Keys(stream_key, group or GROUP)
        self._max_len = max_stream_len
        self._max_bytes = stream_bytes_max
        self._dead_letter_maxlen = dead_letter_maxlen
        self._ignore_groups = tuple(ignore_groups)
        self._keep_s = keep_s
        self._host = ""
        self._bytes = 0  # of the stream: as last measured, plus what was appended since
        self.chunk_items = max(1, min(CHUNK_ITEMS, max_stream_len))
        """A chunk of more entries would never fit a stream this short."""

    async def check(self) -> None:
        """Refuse a server or a key that can never work."""
        async with translating(self._redis):
            version = str((await self._redis.info("server")).get("redis_version", "0"))
            kind = cast("bytes", await self._redis.type(self._stream))
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise Unreachable(f"Redis {version} is too old: 6.2 or newer is needed")
        if kind not in (b"none", b"stream"):
            raise Unreachable(f"{self._stream} is a {kind.decode()}, not a stream")

    async def own_cursor(self) -> None:
        """Refuse a cursor that a reader of another stream is moving."""
        key = stream_of(self._cursor_key)
        async with translating(self._redis):
            other = cast("bytes", await self._redis.get(key) or b"").decode("utf-8", "replace")
            if other not in ("", self._stream) and await self._redis.exists(Keys(other).reader_lease):
                raise ConfigError(
                    f"{self._cursor_key} is the cursor of the reader of {other}, which is at work: give the reader of "
                    f"{self._stream} a REDIS_CURSOR_KEY of its own"
                )
            await self._redis.set(key, self._stream)

    async def new_partitions(self, count: int) -> list[str]:
        """Streams of so many partitions that nothing was ever appended to."""
        known = (await layout(self._redis, self._stream)).known
        return [Keys(self._stream, partition=number).stream for number in range(known, count)]

    async def begin_term(self) -> None:
        """Redis may be an older one: a cursor that is behind ours counts, what was known of unread entries does not."""
        first, cursor = self._slots.first, await self.peek_cursor()
        if cursor.isdigit() and first.cursor.isdigit():
            first.cursor = min(cursor, first.cursor, key=int)
        for part in self._parts:
            part.newest = part.unread = ""

    async def open_partitions(self, count: int) -> None:
        """Tell the workers how many there are, before anything is appended to them."""
        self.partitions = await self._slots.open(count)
        self._slots.know((await declare(self._redis, self._stream, self.partitions)).known)

    async def acquire(self) -> bool:
        """Take the lease, or keep it; False while another reader has it."""
        return await self._slots.acquire()

    async def renew(self) -> None:
        if not await self.acquire():
            raise ReaderLeaseLost("another reader has taken the lease")

    async def release(self) -> None:
        await of_every([slot.release() for slot in self._slots])

    @property
    def changes(self) -> int:
        """How often Redis was found to be another one than before."""
        return sum(lineage_of(slot.redis).changes for slot in self._slots)

    async def peek_cursor(self) -> str:
        """The main cursor's text, '' when there is none."""
        async with translating(self._redis):
            return cast("bytes", await self._redis.get(self._cursor_key) or b"").decode("utf-8", "replace")

    async def lowest_cursor(self) -> int | None:
        """Of all partitions; None: one has none."""
        texts = [one.cursor or "" for one in await self._slots.cursors("")]
        return min(map(int, texts)) if all(text.isdigit() for text in texts) else None

    async def go_to(self, host: str) -> Position:
        """Make `host` the relay that chunks come from, and say where to go on there.

        A cursor that somebody moved forward while nothing came on the stream does not count: it would pass what nobody
        appended.
        """
        first = self._slots.first
        left = int(first.cursor) if self._host == host and first.cursor.isdigit() else None
        found = await self._slots.cursors(host)
        self._host = host
        for slot, cursors in zip(self._slots, found, strict=True):
            slot.cursor, slot.asked, slot.there = cursors.cursor or "", "", None
        seq = seq_of(self._cursor_key, found[0].of(host))
        is_ahead = left is not None and seq is not None and seq > left
        # Our scripts move the relay's own cursor with it, whoever was answered, on whatever server; a hand does not.
        # mutant: an append without an answer is somebody else's
        is_foreign = is_ahead and found[0].kept != found[0].cursor
        if is_foreign and all(await of_every([slot.is_newest_ours() for slot in self._slots])):
            log.warning(
                "Somebody moved %s from %d to %d, and nothing of that is on the stream: going on at %d",
                self._cursor_key, left, seq, left,
            )  # fmt: skip
            seq = left
        return self._slots.place(host, found, seq)

    def pass_over_nothing(self) -> None:
        """What comes next is to be put down, whatever is there."""
        for slot in self._slots:
            slot.there = None

    @property
    def places(self) -> list[int]:
        """Seqs up to which some slots have everything and others have not: no chunk goes beyond one."""
        return self._slots.places

    async def append(self, chunk: Chunk) -> bool:
        """Put the chunk on the stream and move the cursor; False: no room.

        After False or `StreamUnavailable` the same chunk may be given again: if a script did run, its cursor says so.
        """
        if self._max_bytes is not None and chunk.entries and self._bytes >= self._max_bytes:
            return False
        limits = {"max_len": self._max_len, "dead_letter_maxlen": self._dead_letter_maxlen}
        if not await self._slots.append(chunk, self._host, **limits):
            return False
        self._bytes += chunk.bytes
        return True

    async def unverified(self, after: str, count: int) -> list[tuple[str, str]]:
        """(entry id, DID) of frames that wait for a key, the oldest first."""
        async with translating(self._redis):
            found = cast("_Entries", await self._redis.xrange(self._keys.unverified, f"({after}", "+", count))
        return [(entry_id.decode(), fields[b"did"].decode()) for entry_id, fields in found]

    async def unverified_frame(self, entry_id: str) -> tuple[bytes, str] | None:
        """(frame, relay), None when it is gone."""
        async with translating(self._redis):
            found = cast("_Entries", await self._redis.xrange(self._keys.unverified, entry_id, entry_id, 1))
        return (found[0][1][b"frame"], found[0][1][b"relay"].decode()) if found else None

    def finished_seq(self) -> int | None:
        """How far the workers had finished this relay's events, in all partitions, as far as we know."""
        marks = [part.finished for part in self._parts]
        known = [mark[1] for mark in marks if mark is not None and mark[0] == self._host]
        # mutant: the furthest partition counts
        return min(known) if len(known) == len(marks) else None

    async def watch(self) -> None:
        """Look at what is unread; StreamBroken when it is gone, StoreWentBack, ReaderLeaseLost where Redis is older."""
        if self.partitions > 1:
            await declare(self._redis, self._stream, self.partitions)  # somebody may have deleted the key
        for slot in self._slots:
            appended = f"{slot.cursor} {self._host}" if len(self._parts) > 1 and slot.cursor else ""
            for part in slot.parts:
                broken, request = await part.watch(appended, slot.cursor_key, slot.cursor)
                slot.is_broken = slot.is_broken or broken
                slot.request = request or slot.request
        if any(slot.is_broken for slot in self._slots):
            raise StreamBroken
        if requests := [slot.request for slot in self._slots if slot.request]:
            raise StoreWentBack(min(requests, key=_how_far))

    async def go_back(self, seq: int | None, gap: bytes, request: bytes = b"") -> bool:
        """After StreamBroken or StoreWentBack (`request`): move the cursor back to `seq`; None: leave it, and record a
        gap. False: the cursor is no longer this reader's. A slot that has everything stays where it is."""
        return await self._slots.go_back(seq, self._host, gap, request)

    async def trim(self, *, make_room: bool = False) -> TrimResult:
        """Remove what every group has finished, then measure the stream if its bytes are limited.

        `make_room`: the stream is full, so that finished entries go, however young they are.
        """
        result = await trim_finished(
            self._redis,
            self._stream,
            self._ignore_groups,
            group=self._group,
            keep_s=self._keep_s,
            max_stream_len=0 if make_room else self._max_len,
            partitions=len(self._parts),
        )
        if self._max_bytes is not None or len(self._slots.all) > 1:
            sizes = [slot.measure(in_bytes=self._max_bytes is not None) for slot in self._slots]
            self._bytes = sum(await of_every(sizes))
        return result

    async def set_aside_abandoned(self, abandoned_ms: int = ABANDONED_MS) -> tuple[int, int]:
        """Move a piece of abandoned entries of the workers' group to the dead letters, for a stream that is full.

        How many were moved, and how many were only ids: their entries had been trimmed by somebody.
        """
        now_ms = int(time.time() * 1000)
        args: list[str | int] = [self._group, abandoned_ms, abandoned_ms // 60, self._dead_letter_maxlen, now_ms]
        found = [await part.set_aside_abandoned(args) for part in self._parts]
        return sum(moved for moved, _ in found), sum(ghosts for _, ghosts in found)

    async def publish(
        self,
        status: bytes,
        recent: bytes | None = None,
        broadcast: Sequence[bytes] = (),
        stats: Mapping[str, str | int | float] | None = None,
    ) -> None:
        """The dashboard's keys and this reader's figures, in one round trip."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(self._keys.status, status, ex=DASHBOARD_TTL_S)
        if recent is not None:
            pipe.set(self._keys.recent, recent, ex=DASHBOARD_TTL_S)
        for event in broadcast:
            pipe.publish(BROADCAST, event)
        if stats:
            pipe.hset(self._keys.reader_stats, items=[part for pair in stats.items() for part in pair])
        async with translating(self._redis):
            await pipe.execute()


def _how_far(request: bytes) -> float:
    """Of requests to go back the one that goes furthest: nobody knows how far, then a seq, then what is not stored."""
    told = msgspec.json.decode(request, type=GoBack)
    if told.lost:
        return math.inf
    return -1 if told.seq is None else told.seq


async def trim_finished(
    redis: Redis,
    stream_key: str,
    ignore_groups: Sequence[str] = (),
    *,
    group: str = "",
    keep_s: float = 0.0,
    max_stream_len: int = STREAM_LEN_MAX,
    partitions: int = 1,
) -> TrimResult:
    """Remove the entries that every group on the stream has finished, except the ignored groups.

    Without any group nothing is removed, nor while `group` (the workers') does not exist: it will begin at the oldest
    entry. `keep_s`: finished entries younger than this stay, for `--reapply`, while the stream is less than nine tenths
    full. Of several partitions each has its share of the limit, and the one that holds the oldest entries is told.
    """
    found = []
    for number in range(partitions):
        keys = Keys(stream_key, group or GROUP, number)
        node = node_of(redis, keys.stream)
        async with translating(node):
            answer = await node.register_script(script("trim"))(
                keys=[keys.stream, keys.held, keys.given],
                args=[int(keep_s * 1000), max_stream_len * 9 // 10 // partitions, group, *ignore_groups],
            )
        trimmed, holder, bound = cast("tuple[int, bytes, bytes]", answer)
        found.append(TrimResult(trimmed, holder.decode("utf-8", "replace"), bound.decode()))
    holding = [one for one in found if one.held_by]
    oldest = min(holding, key=lambda one: id_order(one.bound or "0"), default=found[0])
    return TrimResult(sum(one.trimmed for one in found), oldest.held_by, oldest.bound)
