"""The worker's side of Redis: leased consumers of one group on one stream, and every way an entry can end.

Owns consumer names, leases, acks, the ledger and dead letters. What must not come apart is one script: an ack and
its ledger, a dead letter and its ack, a claim and the look at the lease. So any of them may be cut off, repeated or
killed half way, and the ledger still balances. Knows nothing of what an entry means. Its scripts are in stream/lua.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fastworker.errors import Reason
from fastworker.stream.bounded import ReplyTooLarge, reply_of_at_most
from fastworker.stream.client import translating
from fastworker.stream.group import Group, unknown
from fastworker.stream.holding import Holding
from fastworker.stream.keys import GROUP, USUAL, Keys
from fastworker.stream.limits import BATCH_SIZE, DEAD_LETTERS_MAX
from fastworker.stream.lineage import lineage_of
from fastworker.stream.scripts import script
from fastworker.stream.skipped import give_skipped

log = logging.getLogger(__name__)

Entry = tuple[str, dict[bytes, bytes]]
"""Stream id and fields."""

LEASE_MS: Final = 15_000
"""A consumer whose owner did not renew for so long is dead: three missed renewals and a slow fork."""
FOREIGN_IDLE_MS: Final = 60_000
"""Predecessors hold no leases: their consumers are dead after so long without a sign ."""
BURST_ENTRIES: Final = 1_000
"""What one piece has when there is a backlog, in reads of BATCH_SIZE each; the first pieces have fewer."""
FIRST_BURST: Final = 100
"""The first piece: it is stored and acked while the next ones, each twice as large, are read."""
READ_BYTES: Final = 4 * 1024 * 1024
"""Of one piece, whatever it is: a burst, what is read back, what is adopted. The last step may exceed it."""
WINDOW: Final = 256
"""Entries that one XREADGROUP asks for, at most: the price of a round trip is shared by so many."""
REPLY_BYTES: Final = 4 * READ_BYTES
"""Of one such reply. What is larger is read again in pieces."""
STEP: Final = 10
"""Entries that are taken before their bytes are looked at: one may have several megabytes."""
CONSUMERS_MAX: Final = 10_000
PUSHED_OUT_MAX: Final = 3_000
"""Letters looked at before others push them out: more than a flush sets aside."""


class Tally(NamedTuple):
    """What the ack of one entry adds to the ledger and to `cluster:metrics`."""

    outcome: str  # `committed` or `nothing_to_store`
    kind: str = ""  # field of cluster:metrics: `#commit`, `#identity`, `#account`; empty: none
    drops: tuple[str, ...] = ()  # reasons, one per dropped op


class SetAside(NamedTuple):
    """An entry on its way to the dead letters."""

    entry_id: str
    fields: Mapping[bytes, bytes]
    reason: Reason
    error: str  # for a person; cut at 500 characters


class Claimed(NamedTuple):
    entries: list[Entry]
    found: int  # claimable entries that the piece held, ghosts included: less than asked for means no more
    ghosts: int


class Consumer(NamedTuple):
    """A consumer of the group, as XINFO CONSUMERS has it."""

    name: str
    pending: int
    idle_ms: int


class ConsumerLeaseLost(Exception):
    """Somebody else leased our consumer name while we did not renew (frozen, or cut off from Redis)."""


class WorkerStream:
    """One leased consumer: `acquire` first, `release` last; the others in any order and any number of times.

    Raises StreamUnavailable (try again), Unreachable (an operator has to act) and ConsumerLeaseLost.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        keys: Keys = USUAL,
        group: str = GROUP,
        consumer_id: str = "worker",
        batch_size: int = BATCH_SIZE,
        dead_letter_maxlen: int = DEAD_LETTERS_MAX,
        last_finished: Callable[[], Awaitable[str | None]] = unknown,
        lease_ms: int = LEASE_MS,
        foreign_idle_ms: int = FOREIGN_IDLE_MS,
    ) -> None:
        """`last_finished`: the stream id up to which everything is settled, as PostgreSQL remembers it."""
        self.name = ""  # the consumer's, once leased
        self._keys = keys
        self.stream_key = keys.stream
        self.partition = keys.partition
        self.group = group
        self.backlog = False  # the last read came back full
        self.lost_reply = False  # it may have handed us entries: they are pending in our name
        self._redis = redis
        self._consumer_id = consumer_id
        self._count = batch_size
        self._dead_letter_maxlen = dead_letter_maxlen
        self._group = Group(redis, self._keys, group, last_finished)
        self._lease_ms = lease_ms
        self._foreign_idle_ms = foreign_idle_ms
        self._window = min(batch_size, STEP)  # of one XREADGROUP
        self._burst = min(FIRST_BURST, BURST_ENTRIES)
        self._token = secrets.token_hex(8)
        self._holding = Holding()
        self._lineage = lineage_of(redis)
        self._seen_changes = 0
        self._is_released = False
        self._ending = asyncio.Lock()  # an ack and a renewal never overtake each other
        # The client's parser of stream replies costs more than everything else in a read.
        redis.set_response_callback("XREADGROUP", _unparsed)
        self._ack = redis.register_script(script("ack"))
        self._set_aside = redis.register_script(script("set_aside"))
        self._lease = redis.register_script(script("lease"))
        self._renew = redis.register_script(script("renew"))
        self._release = redis.register_script(script("release"))
        self._claim = redis.register_script(script("claim"))
        self._read = redis.register_script(script("read"))
        self._tell_held = redis.register_script(script("tell_held"))
        self._ack_ghosts = redis.register_script(script("ack_ghosts"))

    # --- the consumer's life

    async def acquire(self) -> None:
        """Make sure of the group and lease the lowest free name `<CONSUMER_ID>-<n>`.

        A predecessor may be at work under such a name, without a lease: what it holds is not ours to read back.
        """
        async with translating(self._redis):
            await self._group.ensure()
            await self.give_skipped()
            found = await self._redis.xinfo_consumers(self.stream_key, self.group)
            at_work = {one["name"] for one in found if int(one["idle"]) < self._foreign_idle_ms}
            theirs = at_work - cast("set[bytes]", await self._redis.smembers(self._keys.consumers))
            for n in range(CONSUMERS_MAX):
                name = f"{self._consumer_id}-{n}"
                if name.encode() in theirs:
                    continue
                args: list[Any] = [self._token, self._lease_ms, name, self.group]
                own = self._keys
                lease = own.consumer_lease(name)
                keys = [lease, own.consumers, own.stream, own.held, own.given, own.tellers, own.tail, own.go_back]
                if leased := await self._lease(keys=keys, args=args):
                    self.name = name
                    if leased > 1:
                        _tell_back(name)
                    return
        raise ConsumerLeaseLost(f"all names up to {self._consumer_id}-{CONSUMERS_MAX - 1} are leased")

    async def renew(self) -> None:
        """Keep the lease, and fresh what we hold: old workers claim at 10 seconds."""
        own = self._keys
        lease = own.consumer_lease(self.name)
        keys = [lease, own.consumers, self.stream_key, own.ledger, own.held, own.reads, own.tellers, own.given]
        args: list[Any] = [self._token, self._lease_ms, self.name, self.group]
        async with self._ending, self._telling() as (lowest, told), translating(self._redis):
            if self._is_released:  # meanwhile: the name may be somebody else's
                return
            args += [lowest, " ".join(self._holding.ids), told]
            ghosts = await self._renew(keys=keys, args=args)
        if ghosts < 0:
            raise ConsumerLeaseLost(f"the consumer name {self.name} has another owner now")

    async def tell_held(self) -> None:
        """Record in Redis what was held for longer than a flush takes; acks and renewals record it otherwise."""
        self._meet()
        if not self._holding.is_told:
            keys = [self.stream_key, self._keys.held, self._keys.reads, self._keys.given]
            async with self._ending, self._telling() as told, translating(self._redis):
                await self._tell_held(keys=keys, args=[self.group, self.name, *told])

    async def give_skipped(self) -> None:
        """Make entries pending that XGROUP SETID skipped before any consumer was given them."""
        await give_skipped(self._redis, self._keys, self.group)

    async def release(self) -> None:
        """Give the name back; what it still holds stays pending for the next owner. Twice is harmless."""
        keys = [self._keys.consumer_lease(self.name), self._keys.consumers, self.stream_key, self._keys.held]
        keys.append(self._keys.tellers)
        async with self._ending, translating(self._redis):
            await self._release(keys=keys, args=[self._token, self.name, self.group])
            self._is_released = True

    # --- entries come

    async def read(self, block_ms: int) -> list[Entry]:
        """New entries: up to a burst when there is a backlog, else wait up to `block_ms` for the first."""
        async with self._group.translating():
            entries: list[Entry] = []
            size = 0
            block = () if self.backlog else ("BLOCK", block_ms)
            while size < READ_BYTES and len(entries) < self._burst:
                window = self._window
                try:
                    found, found_bytes = await self._read_window(window, block)
                except ReplyTooLarge:
                    self.lost_reply = self.backlog = True
                    self._window = 1
                    break
                except (RedisError, OSError, RuntimeError):
                    if entries:
                        self.lost_reply = True
                        break  # what came before must not be lost with it
                    raise
                entries += found
                size += found_bytes
                self.backlog, block = len(found) >= window, ()
                if not self.backlog:
                    break
            self._burst = min(2 * self._burst, BURST_ENTRIES)
            return entries

    async def read_own(self, after: str, count: int = 100) -> tuple[list[Entry], str | None]:
        """Our own pending entries beyond `after`, and where to go on (None: that was all). Ghosts are acked.

        Never beside an ack: what is acked meanwhile would be held for ever.
        """
        async with self._ending, self._group.translating():
            piece: list[Any] = [self.group, self.name, after, count, READ_BYTES, min(self._count, STEP)]
            found, _ = await self._read(keys=[self.stream_key], args=piece)
            if not found:
                return [], None
            ghosts = [entry_id for entry_id, fields in found if not fields]
            if ghosts:
                own = self._keys
                keys = [own.stream, own.ledger, own.tail, own.go_back]
                await self._ack_ghosts(keys=keys, args=[self.group, *ghosts])
            return self._take_over(found), found[-1][0].decode()

    async def consumers(self) -> list[Consumer]:
        """Everybody else in the group."""
        async with self._group.translating():
            found = await self._redis.xinfo_consumers(self.stream_key, self.group)
            names = [
                Consumer(one["name"].decode(errors="surrogateescape"), int(one["pending"]), int(one["idle"]))
                for one in found
            ]
            return [one for one in names if one.name != self.name]

    async def known_names(self) -> set[str]:
        """Names that a fastworker leased once: their leases tell whether they live."""
        async with translating(self._redis):
            members: Any = await self._redis.smembers(self._keys.consumers)
            return {name.decode(errors="surrogateescape") for name in members}

    async def claim(self, consumer: str, *, idle_ms: int, count: int = 100) -> Claimed:
        """Adopt a bounded piece of what `consumer` holds, unless it has a lease or is still at work on it."""
        other = consumer.encode(errors="surrogateescape")
        own = self._keys
        lease = own.consumer_lease().encode() + other
        keys: list[Any] = [own.stream, own.consumers, lease, own.ledger, own.held, own.given, own.tail, own.go_back]
        async with self._group.translating():
            found, ghosts, claimed = await self._claim(
                keys=keys, args=[self.group, other, self.name, idle_ms, count, READ_BYTES, STEP, self._lease_ms]
            )
            if ghosts < 0:
                _tell_back(consumer)
                return Claimed([], 0, 0)
            return Claimed(self._take_over(claimed), found, ghosts)

    async def lowest_pending(self) -> str | None:
        """The lowest id that anybody in the group holds: everything before it that was delivered is settled.

        Where nobody holds any, and the group went back, the first one that is delivered again. The lowest there can be
        while the reader has to go back, too. Never behind what is known to have been given to somebody.
        """
        return await self._group.lowest_pending(self._holding.lowest)

    async def is_finished(self) -> bool:
        """Whether the group has settled all that was ever appended."""
        return not self._holding.lowest and await self._group.is_finished()

    # --- entries end

    async def ack(self, tallies: Mapping[Tally, Sequence[str]], more_drops: Sequence[str] = ()) -> int:
        """Ack ids and count them by tally; the number that was still pending. Repeats count nothing.

        `more_drops`: reasons that no single entry can be named for; counted once if anything was acked.
        """
        args: list[Any] = []
        for tally, ids in tallies.items():
            args += [tally.outcome, tally.kind, len(tally.drops), len(ids), *tally.drops, *ids]
        if more_drops:
            args += ["", "", len(more_drops), 0, *more_drops]
        own = self._keys
        keys = [self.stream_key, own.ledger, own.metrics, own.held, own.reads, own.given]
        ended = [one for ids in tallies.values() for one in ids]
        async with self._ending, translating(self._redis), self._telling(ended) as told:
            return int(await self._ack(keys=keys, args=[self.group, self.name, *told, *args]))

    async def set_aside(self, letters: Sequence[SetAside], now_ms: int) -> int:
        """Move entries to the dead letters and ack them, in one script; the number that was still pending.

        Fields: the contract's `type`, `data`, `seq`, `origId`, `deliveries`, then ours: `reason`, `error`, `form`
        (json, frame, native or unknown), `consumer`, `setAsideAt` (milliseconds), and `relay` for frames that name one.
        `data` is what the entry's own payload field held, byte by byte; of unknown forms all fields, as MessagePack.
        `original_fields` is the way back.
        """
        own = self._keys
        keys = [self.stream_key, own.ledger, own.metrics, own.dead_letters, own.held, own.reads, own.given]
        total = 0
        for piece in _pieces(letters):
            args = [argument for letter in piece for argument in _letter_arguments(letter)]
            ended = [letter.entry_id for letter in piece]
            async with self._ending, self._group.translating(), self._telling(ended) as told:
                head: list[Any] = [self.group, self.name, self._dead_letter_maxlen, now_ms, *told]
                total += int(await self._set_aside(keys=keys, args=[*head, *args]))
        return total

    async def pushed_out(self, count: int) -> list[dict[bytes, bytes]]:
        """The fields of the dead letters that have to go where so many more come: the oldest ones."""
        async with translating(self._redis):
            over = int(await self._redis.xlen(self._keys.dead_letters)) + count - self._dead_letter_maxlen
            if over <= 0:
                return []
            found = await self._redis.xrange(self._keys.dead_letters, count=min(over, PUSHED_OUT_MAX))
            return [fields for _, fields in cast("list[tuple[bytes, dict[bytes, bytes]]]", found)]

    # --- inside

    async def _read_window(self, window: int, block: tuple[Any, ...]) -> tuple[list[Entry], int]:
        """A few new entries and their bytes. Large ones make the next window small; it grows again one by one."""
        with reply_of_at_most(REPLY_BYTES):
            reply = await self._redis.execute_command(
                "XREADGROUP", "GROUP", self.group, self.name, "COUNT", window, *block, "STREAMS", self.stream_key, ">"
            )
        self._meet()
        if not (entries := _entries_of(reply)):
            return [], 0
        self._holding.read([entry_id for entry_id, _ in entries])
        sizes = [sum(map(len, fields.values())) for _, fields in entries]
        self._window = max(1, min(2 * window, WINDOW, self._count, READ_BYTES // max(1, *sizes)))
        return entries, sum(sizes)

    def _meet(self) -> None:
        """After a failover: what is pending in our name there is read again, and only that is told to be held."""
        # mutant: another history goes unnoticed
        if self._seen_changes != self._lineage.changes:
            self._seen_changes = self._lineage.changes
            self._holding.forget()
            self.lost_reply = True

    def _telling(self, ended: Sequence[str] = ()) -> AbstractAsyncContextManager[tuple[str, str]]:
        self._meet()
        self._holding.let_go(ended)
        return self._holding.telling()

    def _take_over(self, found: list[Any]) -> list[Entry]:
        if entries := _entries_of([[b"", found]]):
            self._holding.take_over([entry_id for entry_id, _ in entries])
        return entries


def _entries_of(reply: Any) -> list[Entry]:
    """[[stream, [[id, [field, value, ...]], ...]]] to entries; ghosts have no fields and are left out."""
    if not reply:
        return []
    entries: list[Entry] = []
    for entry_id, flat in reply[0][1]:
        if flat:
            pairs = iter(flat)
            entries.append((entry_id.decode(), dict(zip(pairs, pairs, strict=True))))
    return entries


def _letter_arguments(letter: SetAside) -> list[Any]:
    """The nine arguments of one letter."""
    form, kind, data, seq, relay = _letter_parts(letter.fields)
    error = letter.error[:500].encode(errors="replace")
    at = letter.fields.get(b"at", b"")
    return [letter.entry_id, str(letter.reason), kind, data, seq, error, form, relay, at]


def form_of(fields: Mapping[bytes, bytes]) -> str:
    """How an entry is encoded, told by its fields."""
    if b"n" in fields:
        return "native"
    if b"f" in fields:
        return "frame"
    return "json" if b"data" in fields else "unknown"


def _letter_parts(fields: Mapping[bytes, bytes]) -> tuple[str, bytes, bytes, bytes, bytes]:
    """form, type, data, seq, relay."""
    form = form_of(fields)
    if form == "native":
        return form, b"native", fields[b"n"], b"", b""
    if form == "frame":
        return form, b"frame", fields[b"f"], b"", fields.get(b"relay", b"")
    if form == "json":
        return form, fields.get(b"type", b""), fields[b"data"], fields.get(b"seq", b""), b""
    return form, b"unknown", msgspec.msgpack.encode(dict(fields)), b"", b""


def original_fields(letter: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The fields that a dead letter's entry had on the stream: what a retry appends."""
    form, data = letter.get(b"form", b"json"), letter.get(b"data", b"")
    if form == b"native":
        return {b"n": data}
    if form == b"frame":
        relay = letter.get(b"relay")
        return {b"f": data} | ({b"relay": relay} if relay else {})
    if form == b"unknown":
        return msgspec.msgpack.decode(data, type=dict[bytes, bytes])
    return {b"type": letter.get(b"type", b""), b"data": data, b"seq": letter.get(b"seq", b"")}


def _pieces(letters: Sequence[SetAside]) -> Iterable[list[SetAside]]:
    """At most 100 letters or about a megabyte in one script call: a script blocks everybody."""
    piece: list[SetAside] = []
    size = 0
    for letter in letters:
        size += sum(map(len, letter.fields.values()))
        piece.append(letter)
        if len(piece) >= 100 or size >= 1_000_000:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _tell_back(consumer: str) -> None:
    log.warning(
        "Somebody deleted the consumer %s (XGROUP DELCONSUMER) while it held entries, and then it died: the group goes "
        "back to the first of them, and what is on the stream from there on is read again", consumer,
    )  # fmt: skip


def _unparsed(response: Any, **_options: Any) -> Any:
    return response
