"""The reader's side of Redis: the append script with its cursor, the lease, trimming, the dashboard's keys.

Three scripts (stream/lua) carry the promises. `append` puts a chunk on the stream and then moves the cursor, and does
neither unless this reader holds the lease and the cursor is where it left it. `trim` removes what every group has
finished, computed and removed in one step. `set_aside_abandoned` takes what nobody will ever finish from the head of a
full stream.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.errors import ConfigError, Unreachable
from fastworker.stream.client import error_code, translating
from fastworker.stream.ids import id_order
from fastworker.stream.keys import BROADCAST, GROUP, Keys, stream_of
from fastworker.stream.limits import ABANDONED_MS, DEAD_LETTERS_MAX, STREAM_LEN_MAX
from fastworker.stream.partitions import declare, layout
from fastworker.stream.scripts import script
from fastworker.stream.skipped import give_skipped

log = logging.getLogger(__name__)

OURS: Final = "fastworker"
"""Value of `reader` in `firehose:status`. The readers before this one do not write that member."""

LEASE_MS: Final = 5_000
DASHBOARD_TTL_S: Final = 10
GAPS_KEPT: Final = 100
MARKS_MAX: Final = 10_000

CHUNK_ITEMS: Final = 500
CHUNK_BYTES: Final = 2_000_000


_Entries = list[tuple[bytes, dict[bytes, bytes]]]


class ReaderLeaseLost(Exception):
    """Another reader is at work (or Redis came back with other data): step back, wait, look again."""


class StreamBroken(Exception):
    """Entries that no worker had read are gone: the stream was deleted, renamed, evicted or trimmed by somebody."""


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


class Position(msgspec.Struct, frozen=True):
    """Where to go on at one relay. `seq` None: at its tip. `switched_from`: the other relay that was read before."""

    seq: int | None
    switched_from: str | None


class Chunk:
    """What one run of the append script puts down, in the order of the frames, and the seq after it.

    `seq` None: nothing in it moves the cursor. `entries` counts what goes on the stream. `breaks` is the reader's:
    what may be written down once the repairs in here are on the way; so is `held`: places that are filled in later.
    """

    __slots__ = ("_pieces", "breaks", "bytes", "entries", "held", "items", "seq")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.items = 0
        self.entries = 0
        self.bytes = 0
        self.seq: int | None = None
        self.breaks: list[tuple[str, int]] = []
        self.held: list[tuple[int, Any]] = []

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    def entry(self, fields: Sequence[tuple[bytes, bytes]], partition: int = 0) -> None:
        self._add(b"%d" % partition if partition else b"entry", [part for field in fields for part in field])
        self.entries += 1

    def dead_letter(self, fields: Sequence[tuple[bytes, bytes]]) -> None:
        self._add(b"dead letter", [part for field in fields for part in field])

    def repair(self, did: str, text: bytes) -> None:
        self._add(b"repair", [did.encode(), text])

    def unverified(self, did: str, frame: bytes, relay: str) -> None:
        """A frame that waits for the account's newest key."""
        self._add(b"unverified", [b"did", did.encode(), b"frame", frame, b"relay", relay.encode()])

    def judged(self, entry_id: str) -> None:
        """Remove a frame that waited: it has been judged."""
        self._add(b"judged", [entry_id.encode()])

    def gap(self, text: bytes) -> None:
        self._add(b"gap", [text])

    def hold(self, what: Any, size: int) -> None:
        """A place for what is not known yet. It counts as one item of so many bytes."""
        self.held.append((len(self._pieces), what))
        self._pieces.append(b"")
        self.items += 1
        self.bytes += size

    def fill(self, place: int, part: Chunk, size: int) -> None:
        """What has become of it."""
        self._pieces[place] = part.body
        self.items += part.items - 1
        self.bytes += part.bytes - size
        self.entries += part.entries
        self.breaks += part.breaks

    def _add(self, what: bytes, parts: list[bytes]) -> None:
        pieces = self._pieces
        pieces.append((len(parts) + 1).to_bytes(4, "little"))
        for part in (what, *parts):
            length = len(part)
            self.bytes += length
            pieces.append(length.to_bytes(4, "little"))
            pieces.append(part)
        self.items += 1


class _Partition:
    """What a reader knows of one partition."""

    def __init__(self, redis: Redis, stream_key: str, group: str, number: int) -> None:
        self.keys = Keys(stream_key, group or GROUP, number)
        self.newest = ""  # mark of the entry appended last, if it was not left in Redis yet
        self.unread = ""  # the first unread id when we looked last
        self.removed = ""  # the newest that XDEL had removed then
        self.finished: tuple[str, int] | None = None  # host, and seq up to which the workers had finished then
        self._redis = redis
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
        async with translating(self._redis):
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
            await give_skipped(self._redis, keys, self._group, who="reader")
        return bool(broken), request

    async def set_aside_abandoned(self, args: list[str | int]) -> tuple[int, int]:
        keys = self.keys
        async with translating(self._redis):
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


async def _is_newest_ours(redis: Redis, parts: Sequence[_Partition]) -> bool:
    """Whether a reader that leaves a mark in Redis, as ours do, appended the newest entry of each partition."""
    async with translating(redis):
        pipe = redis.pipeline(transaction=True)
        for part in parts:
            pipe.get(part.keys.tail)
            pipe.xinfo_stream(part.keys.stream)
        found: list[Any] = await pipe.execute(raise_on_error=False)
    pairs = zip(found[::2], found[1::2], strict=True)
    return all(isinstance(info, dict) and info["last-generated-id"] == tail for tail, info in pairs)


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
        self._redis = redis
        self._stream = stream_key
        self._partitions = 1
        self._parts = [_Partition(redis, stream_key, group, 0)]
        self._cursor_key = cursor_key
        self._keys = Keys(stream_key, group or GROUP)
        self._max_len = max_stream_len
        self._max_bytes = stream_bytes_max
        self._dead_letter_maxlen = dead_letter_maxlen
        self._group = group
        self._ignore_groups = tuple(ignore_groups)
        self._keep_s = keep_s
        self._token = secrets.token_hex(8)
        self._host = ""
        self._cursor = ""  # the cursor key's text as this reader saw or wrote it last
        self._asked = ""  # what an append was to make of it that nobody saw answered: it is one of the two
        self._bytes = 0  # of the stream: as last measured, plus what was appended since
        self._append = redis.register_script(script("append"))
        self._go_back = redis.register_script(script("reader_go_back"))
        self._renew = redis.register_script(script("reader_renew"))
        self._release = redis.register_script(script("reader_release"))
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
        cursor = await self.peek_cursor()
        if cursor.isdigit() and self._cursor.isdigit():
            self._cursor = min(cursor, self._cursor, key=int)
        for part in self._parts:
            part.newest = part.unread = ""

    async def open_partitions(self, count: int) -> None:
        """Tell the workers how many there are, before anything is appended to them."""
        self._partitions = count
        known = (await declare(self._redis, self._stream, count)).known
        more = range(len(self._parts), known)  # of the others we remember how far they were finished
        self._parts = self._parts[:known] + [_Partition(self._redis, self._stream, self._group, n) for n in more]

    async def acquire(self) -> bool:
        """Take the lease, or keep it; False while another reader has it."""
        async with translating(self._redis):
            return not await self._renew(keys=[self._keys.reader_lease], args=[self._token, LEASE_MS])

    async def renew(self) -> None:
        if not await self.acquire():
            raise ReaderLeaseLost("another reader has taken the lease")

    async def release(self) -> None:
        async with translating(self._redis):
            await self._release(keys=[self._keys.reader_lease], args=[self._token])

    async def peek_cursor(self) -> str:
        """The main cursor's text, '' when there is none."""
        async with translating(self._redis):
            return cast("bytes", await self._redis.get(self._cursor_key) or b"").decode("utf-8", "replace")

    async def go_to(self, host: str) -> Position:
        """Make `host` the relay that chunks come from, and say where to go on there.

        A cursor is never used on another relay: the main one counts if it is this host's, or nobody's (the
        predecessor did not say whose), else what was kept for this host. One that somebody moved forward while nothing
        came on the stream does not count: it would pass what nobody appended.
        """
        left = int(self._cursor) if self._host == host and self._cursor.isdigit() else None
        async with translating(self._redis):
            pipe = self._redis.pipeline(transaction=True)
            pipe.get(self._cursor_key)
            pipe.get(self._keys.relay)
            pipe.get(self._keys.cursor_of(host))
            for part in self._parts:
                pipe.get(part.keys.finished)
            main, relay, kept, *finished = cast("list[bytes | None]", await pipe.execute())
        for part, mark in zip(self._parts, finished, strict=True):
            part.note_finished(mark or b"")
        self._host = host
        self._cursor = (main or b"").decode("utf-8", "replace")
        owner: str | None = relay.decode() if relay and main else None
        text = main if owner in (None, host) else kept
        if text is not None and not (text.isdigit() and int(text) < 2**53):
            held = text[:40].decode("utf-8", "replace")
            raise ConfigError(f"{self._cursor_key} holds {held!r}, which is not a cursor: delete it or correct it")
        seq = int(text) if text is not None else None
        asked, self._asked = self._asked, ""
        # mutant: an append without an answer is somebody else's
        is_foreign = left is not None and seq is not None and seq > left and self._cursor != asked
        if is_foreign and await _is_newest_ours(self._redis, self._parts):
            log.warning(
                "Somebody moved %s from %d to %d, and nothing of that is on the stream: going on at %d",
                self._cursor_key, left, seq, left,
            )  # fmt: skip
            seq = left
        return Position(seq, owner if owner != host else None)

    async def append(self, chunk: Chunk) -> bool:
        """Put the chunk on the stream and move the cursor; False: no room, nothing was done.

        After `StreamUnavailable` the same chunk may be given again: if the script did run, the cursor says so.
        """
        if self._max_bytes is not None and chunk.entries and self._bytes >= self._max_bytes:
            return False
        after = "" if chunk.seq is None else str(chunk.seq)
        keys = self._keys
        names = [
            self._stream, self._cursor_key, keys.reader_lease, keys.cursor_of(self._host), keys.relay,
            keys.dead_letters, keys.repairs, keys.gaps, keys.relays, keys.tail, keys.unverified,
            *[part.keys.stream for part in self._parts[1:]], *[part.keys.tail for part in self._parts[1:]],
        ]  # fmt: skip
        arguments: list[bytes | str | int] = [
            self._token,
            LEASE_MS,
            self._cursor,
            after,
            self._host,
            chunk.entries,
            self._max_len,
            self._dead_letter_maxlen,
            GAPS_KEPT,
            int(time.time() * 1000),
            chunk.body,
        ]
        self._asked = after
        async with translating(self._redis):
            answer, detail, *more = cast("list[bytes]", await self._append(keys=names, args=arguments))
        self._asked = ""
        if answer == b"full":
            return False
        if answer == b"broken":
            raise StreamBroken
        if answer == b"lease":
            raise ReaderLeaseLost("another reader has taken the lease")
        if answer == b"cursor":
            found = detail.decode("utf-8", "replace") or "nothing"
            raise ReaderLeaseLost(
                f"{self._cursor_key} holds {found} where this reader had left {self._cursor or 'nothing'}"
            )
        if after:
            self._cursor = after
            for part, newest in zip(self._parts, (detail, *more), strict=False):  # `already` says nothing of them
                if newest not in (b"", b"already"):
                    part.newest = f"{newest.decode()} {after} {self._host}"
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
        if self._partitions > 1:
            await declare(self._redis, self._stream, self._partitions)  # somebody may have deleted the key
        appended = f"{self._cursor} {self._host}" if len(self._parts) > 1 and self._cursor else ""
        found = [await part.watch(appended, self._cursor_key, self._cursor) for part in self._parts]
        if any(broken for broken, _ in found):
            raise StreamBroken
        for _, request in found:
            if request:
                raise StoreWentBack(request)

    async def go_back(self, seq: int | None, gap: bytes, request: bytes = b"") -> bool:
        """After StreamBroken or StoreWentBack (`request`): move the cursor back to `seq`; None: leave it, and record a
        gap. False: the cursor is no longer this reader's."""
        keys = [
            self._cursor_key,
            self._keys.reader_lease,
            self._keys.cursor_of(self._host),
            self._keys.tail,
            self._keys.marks,
            self._keys.finished,
            self._keys.gaps,
            self._keys.go_back,
            *[key for part in self._parts[1:] for key in (part.keys.tail, part.keys.marks, part.keys.finished)],
        ]
        after = "" if seq is None else str(seq)
        asked = self._asked or self._cursor
        args: list[bytes | str | int] = [self._token, self._cursor, after, gap, GAPS_KEPT, request, asked]
        async with translating(self._redis):
            done = await self._go_back(keys=keys, args=args)
        if done:
            for part in self._parts:
                part.newest = part.unread = ""
        return bool(done)

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
        if self._max_bytes is not None:
            async with translating(self._redis), self._redis.pipeline(transaction=False) as pipe:
                for part in self._parts:
                    pipe.memory_usage(part.keys.stream, samples=5)
                self._bytes = sum(int(size or 0) for size in await pipe.execute())
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
    trim = redis.register_script(script("trim"))
    found = []
    for number in range(partitions):
        keys = Keys(stream_key, group or GROUP, number)
        async with translating(redis):
            answer = await trim(
                keys=[keys.stream, keys.held, keys.given],
                args=[int(keep_s * 1000), max_stream_len * 9 // 10 // partitions, group, *ignore_groups],
            )
        trimmed, holder, bound = cast("tuple[int, bytes, bytes]", answer)
        found.append(TrimResult(trimmed, holder.decode("utf-8", "replace"), bound.decode()))
    holding = [one for one in found if one.held_by]
    oldest = min(holding, key=lambda one: id_order(one.bound or "0"), default=found[0])
    return TrimResult(sum(one.trimmed for one in found), oldest.held_by, oldest.bound)
