"""What one script of the reader reaches: the whole stream, or on a Cluster one partition."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.stream.client import error_code, translating
from fastworker.stream.cluster import node_of
from fastworker.stream.keys import GROUP, Keys
from fastworker.stream.partitions import layout_of
from fastworker.stream.scripts import script
from fastworker.stream.skipped import give_skipped

LEASE_MS: Final = 5_000
GAPS_KEPT: Final = 100
MARKS_MAX: Final = 10_000


class ReaderLeaseLost(Exception):
    """Another reader is at work (or Redis came back with other data): step back, wait, look again."""


class StreamBroken(Exception):
    """Entries that no worker had read are gone: the stream was deleted, renamed, evicted or trimmed by somebody."""


class Cursors(NamedTuple):
    """`cursor` is the one that moves, `relay` its host; `kept`: that of the host which was asked about. `layout`: how
    many partitions there were when it moved."""

    cursor: str | None
    relay: str | None
    kept: str | None
    layout: str | None

    @property
    def written(self) -> int:
        return layout_of((self.layout or "").encode()).written

    def of(self, host: str) -> str | None:
        """A cursor is never used on another relay. Nobody's counts: the predecessor did not say whose it is."""
        return self.cursor if self.owner in (None, host) else self.kept

    @property
    def owner(self) -> str | None:
        return self.relay if self.cursor else None


class Partition:
    """What a reader knows of one partition."""

    def __init__(self, redis: Redis, stream_key: str, group: str, number: int) -> None:
        self.keys = Keys(stream_key, group or GROUP, number)
        self.redis = redis = node_of(redis, self.keys.stream)
        self.newest = ""  # mark of the entry appended last, if it was not left in Redis yet
        self.unread = ""  # the first unread id when we looked last
        self.removed = ""  # the newest that XDEL had removed then
        self.finished: tuple[str, int] | None = None  # host, and seq up to which the workers had finished then
        self._group = group
        self._watch = redis.register_script(script("watch"))
        self._set_aside_abandoned = redis.register_script(script("set_aside_abandoned"))

    def note_finished(self, mark: bytes) -> None:
        if mark:
            _, seq, host = mark.decode().split(" ")
            self.finished = (host, int(seq))

    async def watch(self, appended: str, cursor_key: str, cursor: str) -> tuple[bool, bytes]:
        """Whether something unread is gone, and to where PostgreSQL asks the reader to go back.

        `appended`: the seq up to which everything is on the stream, and its host; empty: not to be noted. `cursor`: as
        the reader left it; where it is behind that now, ReaderLeaseLost.
        """
        keys = self.keys
        async with translating(self.redis):
            broken, finished, unread, request, removed, behind = await self._watch(
                keys=[keys.stream, keys.marks, keys.finished, keys.held, keys.go_back, keys.given, cursor_key],
                args=[self._group, self.newest, MARKS_MAX, self.unread, appended, self.removed, cursor],
            )
        if behind:
            raise ReaderLeaseLost(f"{cursor_key} holds {behind.decode()} where this reader had left {cursor}")
        self.removed = removed.decode() or self.removed
        self.newest, self.unread = "", unread.decode()
        self.note_finished(finished)
        if self._group:
            await give_skipped(self.redis, keys, self._group, who="reader")
        return bool(broken), request

    async def set_aside_abandoned(self, args: list[str | int]) -> tuple[int, int]:
        keys = self.keys
        async with translating(self.redis):
            try:
                moved, ghosts = await self._set_aside_abandoned(
                    keys=[keys.stream, keys.ledger, keys.metrics, keys.dead_letters],
                    args=[*args, keys.consumer_lease()],
                )
            except ResponseError as error:
                if error_code(error) != "NOGROUP":
                    raise
                return 0, 0
        return int(moved), int(ghosts)


class Slot:
    """Its partitions have one lease and one cursor, which a script moves together with what it appends."""

    def __init__(self, partition: Partition, cursor_key: str, token: str) -> None:
        self.parts = [partition]
        self.cursor_key = cursor_key
        self.cursor = ""  # the cursor key's text as this reader saw or wrote it last
        self.asked = ""  # what an append was to make of it that nobody saw answered: it is one of the two
        self.there: int | None = None  # what comes up to this seq is on it already
        self.length = 0  # of its streams: as last measured, plus what was appended since
        self.is_broken = False
        self.request = b""  # to go back
        self.keys = partition.keys
        self.redis = redis = partition.redis
        self._token = token
        self._append = redis.register_script(script("append"))
        self._go_back = redis.register_script(script("reader_go_back"))
        self._level = redis.register_script(script("level"))
        self._renew = redis.register_script(script("reader_renew"))
        self._release = redis.register_script(script("reader_release"))

    async def acquire(self) -> bool:
        """Take the lease, or keep it; False while another reader has it."""
        async with translating(self.redis):
            return not await self._renew(keys=[self.keys.reader_lease], args=[self._token, LEASE_MS])

    async def release(self) -> None:
        async with translating(self.redis):
            await self._release(keys=[self.keys.reader_lease], args=[self._token])

    async def cursors(self, host: str) -> Cursors:
        """As they are now. Notes also how far the workers had finished."""
        async with translating(self.redis):
            pipe = self.redis.pipeline(transaction=True)
            pipe.get(self.cursor_key)
            pipe.get(self.keys.relay)
            pipe.get(self.keys.cursor_of(host))
            pipe.get(self.keys.partitions)
            for part in self.parts:
                pipe.get(part.keys.finished)
            found = cast("list[bytes | None]", await pipe.execute())
        for part, mark in zip(self.parts, found[4:], strict=True):
            part.note_finished(mark or b"")
        return Cursors(*(None if text is None else text.decode("utf-8", "replace") for text in found[:4]))

    async def level(self, seq: int | None, host: str, layout: str) -> None:
        """Move the cursor without appending anything; None: there is none any more."""
        keys = [self.keys.reader_lease, self.cursor_key, self.keys.relay, self.keys.cursor_of(host)]
        async with translating(self.redis):
            args = [self._token, "" if seq is None else seq, host, layout]
            if not await self._level(keys=[*keys, self.keys.partitions], args=args):
                raise ReaderLeaseLost("another reader has taken the lease")

    async def append(
        self, body: bytes, entries: int, seq: int | None, host: str, *, max_len: int, dead_letter_maxlen: int
    ) -> bool:
        """As Feed.append, of what is this slot's; nothing where it is there already."""
        if seq is not None and self.there is not None and seq <= self.there:
            return True
        after = "" if seq is None else str(seq)
        keys = self.keys
        names = [
            keys.stream, self.cursor_key, keys.reader_lease, keys.cursor_of(host), keys.relay,
            keys.dead_letters, keys.repairs, keys.gaps, keys.relays, keys.tail, keys.unverified,
            *[part.keys.stream for part in self.parts[1:]], *[part.keys.tail for part in self.parts[1:]],
        ]  # fmt: skip
        arguments: list[bytes | str | int] = [
            self._token,
            LEASE_MS,
            self.cursor,
            after,
            host,
            entries,
            max_len,
            dead_letter_maxlen,
            GAPS_KEPT,
            int(time.time() * 1000),
            body,
        ]
        self.asked = after
        async with translating(self.redis):
            answer, detail, *more = cast("list[bytes]", await self._append(keys=names, args=arguments))
        self.asked = ""
        if answer == b"full":
            return False
        if answer == b"broken":
            self.is_broken = True
            raise StreamBroken
        if answer == b"lease":
            raise ReaderLeaseLost("another reader has taken the lease")
        if answer == b"cursor":
            found = detail.decode("utf-8", "replace") or "nothing"
            raise ReaderLeaseLost(
                f"{self.cursor_key} holds {found} where this reader had left {self.cursor or 'nothing'}"
            )
        if after:
            self.cursor, self.there = after, seq
            for part, newest in zip(self.parts, (detail, *more), strict=False):  # `already` says nothing of them
                if newest not in (b"", b"already"):
                    part.newest = f"{newest.decode()} {after} {host}"
        self.length += entries
        return True

    async def go_back(self, seq: int | None, host: str, gap: bytes, request: bytes) -> bool:
        """As Feed.go_back."""
        keys = [
            self.cursor_key,
            self.keys.reader_lease,
            self.keys.cursor_of(host),
            self.keys.tail,
            self.keys.marks,
            self.keys.finished,
            self.keys.gaps,
            self.keys.go_back,
            *[key for part in self.parts[1:] for key in (part.keys.tail, part.keys.marks, part.keys.finished)],
        ]
        after = "" if seq is None else str(seq)
        asked = self.asked or self.cursor
        args: list[bytes | str | int] = [self._token, self.cursor, after, gap, GAPS_KEPT, request, asked]
        async with translating(self.redis):
            return bool(await self._go_back(keys=keys, args=args))

    def forget(self) -> None:
        """What was seen of its streams, after it has gone back."""
        self.is_broken, self.request = False, b""
        for part in self.parts:
            part.newest = part.unread = ""

    async def is_newest_ours(self) -> bool:
        """Whether a reader that leaves a mark in Redis, as ours do, appended the newest entry of each partition."""
        async with translating(self.redis):
            pipe = self.redis.pipeline(transaction=True)
            for part in self.parts:
                pipe.get(part.keys.tail)
                pipe.xinfo_stream(part.keys.stream)
            found = await pipe.execute(raise_on_error=False)
        pairs = zip(found[::2], found[1::2], strict=True)
        return all(isinstance(info, dict) and info["last-generated-id"] == tail for tail, info in pairs)

    async def measure(self, *, in_bytes: bool) -> int:
        """How long its streams are is noted; the bytes of their entries, if asked for, are answered."""
        async with translating(self.redis):
            pipe = self.redis.pipeline(transaction=False)
            for part in self.parts:
                pipe.xlen(part.keys.stream)
                if in_bytes:
                    pipe.memory_usage(part.keys.stream, samples=5)
            found = cast("Sequence[int | None]", await pipe.execute())
        step = 1 + in_bytes
        self.length = sum(int(length or 0) for length in found[::step])
        return sum(int(size or 0) for size in found[1::2]) if in_bytes else 0
