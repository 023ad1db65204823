"""The worker's side of Redis: leased consumers of one group on one stream, and every way an entry can end.

Owns consumer names, leases, acks, the ledger and dead letters. What must not come apart is one script: an ack and
its ledger, a dead letter and its ack, a claim and the look at the lease. So any of them may be cut off, repeated or
killed half way, and the ledger still balances. Knows nothing of what an entry means.

All keys are used in scripts together, so Redis Cluster is not supported (the design says so too).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.edge.redis_client import error_code, translating
from fastworker.errors import Reason, StreamUnavailable

Entry = tuple[str, dict[bytes, bytes]]
"""Stream id and fields."""

LEDGER_KEY: Final = "fastworker:ledger"
"""Hash: `committed`, `nothing_to_store`, `set_aside`, `ghosts` (entries, each counted once), `drop:<reason>` (ops)."""
CONSUMERS_KEY: Final = "fastworker:consumers"
"""Set of consumer names that were ever leased by a fastworker and still exist in the group."""
LEASE_PREFIX: Final = "fastworker:consumer:"
METRICS_KEY: Final = "cluster:metrics"
DEAD_LETTERS_KEY: Final = "firehose:dead-letters"
RECREATE_LOCK_KEY: Final = "firehose:stream:recreate-lock"

LEASE_MS: Final = 15_000
"""A consumer whose owner did not renew for so long is dead: three missed renewals and a slow fork."""
FOREIGN_IDLE_MS: Final = 60_000
"""Predecessors hold no leases: their consumers are dead after so long without a sign (design, Redis rules)."""
BURST_ENTRIES: Final = 1_000
"""What one round trip asks for when there is a backlog, in reads of BATCH_SIZE each."""
BURST_BYTES: Final = 4 * 1024 * 1024
CONSUMERS_MAX: Final = 10_000

# Redis refuses the first write of a script at maxmemory, but lets one finish that has begun to write. Acks and dead
# letters free memory in the end, so each script begins with a write that changes nothing.
_BEGIN_WRITING = "redis.call('XACK', KEYS[1], ARGV[1], '0-0')\n"

# KEYS stream, ledger, metrics. ARGV group, then per tally: outcome, metrics field, number of drops, number of ids,
# drops..., ids... A tally without ids counts its drops once if anything before it was acked.
_ACK = (
    _BEGIN_WRITING
    + """
local at, total = 2, 0
while at <= #ARGV do
  local outcome, kind = ARGV[at], ARGV[at + 1]
  local drop_count, id_count = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local drops_at, ids_at = at + 4, at + 4 + drop_count
  local stop = ids_at + id_count
  local acked = 0
  for first = ids_at, stop - 1, 1000 do
    acked = acked + redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, math.min(first + 999, stop - 1)))
  end
  if acked > 0 then
    redis.call('HINCRBY', KEYS[2], outcome, acked)
    redis.call('HINCRBY', KEYS[3], 'totalEvents', acked)
    if kind ~= '' then redis.call('HINCRBY', KEYS[3], kind, acked) end
  end
  total = total + acked
  local weight = acked
  if id_count == 0 and total > 0 then weight = 1 end
  if weight > 0 then
    for i = drops_at, ids_at - 1 do redis.call('HINCRBY', KEYS[2], 'drop:' .. ARGV[i], weight) end
  end
  at = stop
end
return total
"""
)

# For scripts whose KEYS are stream, ledger, metrics, dead letters: writes one letter, acks its entry, counts both.
SET_ASIDE_ONE: Final = """
local function set_aside_one(
  group, maxlen, id, deliveries, consumer, now, reason, kind, data, seq, why, form, relay, at)
  local letter = {'type', kind, 'data', data, 'seq', seq, 'origId', id, 'deliveries', tostring(deliveries),
    'reason', reason, 'error', why, 'form', form, 'consumer', consumer, 'setAsideAt', now}
  if relay ~= '' then
    letter[#letter + 1] = 'relay'
    letter[#letter + 1] = relay
  end
  if at ~= '' then
    letter[#letter + 1] = 'at'
    letter[#letter + 1] = at
  end
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', maxlen, '*', unpack(letter))
  redis.call('XACK', KEYS[1], group, id)
  redis.call('HINCRBY', KEYS[2], 'set_aside', 1)
  redis.call('HINCRBY', KEYS[2], 'drop:' .. reason, 1)
  redis.call('HINCRBY', KEYS[3], 'totalEvents', 1)
  redis.call('HINCRBY', KEYS[3], 'errors', 1)
end
"""

# KEYS stream, ledger, metrics, dead letters. ARGV group, consumer, maxlen, time, then nine per entry:
# id, reason, type, data, seq, error, form, relay, at. Only what is still pending is set aside: a repeat does nothing.
_SET_ASIDE = (
    _BEGIN_WRITING
    + SET_ASIDE_ONE
    + """
local total = 0
for at = 5, #ARGV, 9 do
  local id = ARGV[at]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if pending[1] then
    set_aside_one(ARGV[1], ARGV[3], id, pending[1][4], ARGV[2], ARGV[4], unpack(ARGV, at + 1, at + 8))
    total = total + 1
  end
end
return total
"""
)

# KEYS lease, consumers, stream. ARGV token, ttl, name, group. At maxmemory, too: it is workers who make room.
_LEASE = """
redis.call('XACK', KEYS[3], ARGV[4], '0-0')
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  redis.call('SADD', KEYS[2], ARGV[3])
  return 1
end
return 0
"""

# KEYS lease, consumers, stream, ledger. ARGV token, ttl, name, group, idle ms. Also restores a lease that Redis lost.
# Everything in our name that was idle so long is renewed, whether or not a pipeline knows of it: a reply that was lost
# left entries, too. XPENDING fails where the group is gone: the next read finds that out and mends it.
# An id whose entry somebody trimmed does not come back from XCLAIM, and leaves the pending list (from 7.0 on): a ghost,
# counted here, because its ack will count nothing. On 6.2 it comes back and its ack counts it.
_RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.pcall('XACK', KEYS[3], ARGV[4], '0-0')
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
local from, ghosts = '-', 0
while true do
  local found = redis.pcall('XPENDING', KEYS[3], ARGV[4], 'IDLE', ARGV[5], from, '+', 1000, ARGV[3])
  if found.err or #found == 0 then break end
  local ids = {}
  for i, entry in ipairs(found) do ids[i] = entry[1] end
  from = '(' .. ids[#ids]
  local count = #ids
  ids[count + 1] = 'JUSTID'
  ghosts = ghosts + count - #redis.call('XCLAIM', KEYS[3], ARGV[4], ARGV[3], 0, unpack(ids))
end
if ghosts > 0 then redis.call('HINCRBY', KEYS[4], 'ghosts', ghosts) end
return 1
"""

# KEYS lease, consumers, stream. ARGV token, name, group.
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
local held = redis.pcall('XPENDING', KEYS[3], ARGV[3], '-', '+', 1, ARGV[2])
if not held.err and not held[1] then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[3], ARGV[3], ARGV[2])
  redis.call('SREM', KEYS[2], ARGV[2])
end
return 1
"""

# KEYS stream, consumers, lease of the other, ledger. ARGV group, from, to, idle, count.
# Ids whose entry was trimmed come back from XCLAIM as nothing (from 7.0 they also leave the pending list, before
# that they have to be acked): ghosts, counted once because one script finds, acks and counts them.
_CLAIM = """
if redis.call('EXISTS', KEYS[3]) == 1 then return {0, 0, {}} end
local found = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[4], '-', '+', ARGV[5], ARGV[2])
if #found == 0 then
  if redis.call('SISMEMBER', KEYS[2], ARGV[2]) == 1 then
    local held = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
    if not held[1] then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
      redis.call('SREM', KEYS[2], ARGV[2])
    end
  end
  return {0, 0, {}}
end
local ids = {}
for i, entry in ipairs(found) do ids[i] = entry[1] end
local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, unpack(ids))
local entries, present = {}, {}
for i = 1, #ids do
  local entry = claimed[i]
  if entry and entry[1] then
    entries[#entries + 1] = entry
    present[entry[1]] = true
  end
end
local ghosts = 0
for _, id in ipairs(ids) do
  if not present[id] then
    redis.call('XACK', KEYS[1], ARGV[1], id)
    ghosts = ghosts + 1
  end
end
if ghosts > 0 then redis.call('HINCRBY', KEYS[4], 'ghosts', ghosts) end
return {#ids, ghosts, entries}
"""

# KEYS stream, ledger. ARGV group, ids...
_ACK_GHOSTS = """
local acked = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2, #ARGV))
if acked > 0 then redis.call('HINCRBY', KEYS[2], 'ghosts', acked) end
return acked
"""


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


class LeaseLostError(Exception):
    """Somebody else leased our consumer name while we did not renew (frozen, or cut off from Redis)."""


async def _unknown() -> str | None:
    return None


class WorkerStream:
    """One leased consumer: `acquire` first, `release` last; the others in any order and any number of times.

    Raises StreamUnavailable (try again), Unreachable (an operator has to act) and LeaseLostError.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        stream_key: str = "firehose:events",
        group: str = "firehose-processors",
        consumer_id: str = "worker",
        batch_size: int = 10,
        dead_letter_maxlen: int = 10_000,
        last_finished: Callable[[], Awaitable[str | None]] = _unknown,
        lease_ms: int = LEASE_MS,
        foreign_idle_ms: int = FOREIGN_IDLE_MS,
    ) -> None:
        """`last_finished`: the stream id up to which everything is settled, as PostgreSQL remembers it."""
        self.name = ""  # the consumer's, once leased
        self.stream_key = stream_key
        self.group = group
        self.backlog = False  # the last read came back full
        self._redis = redis
        self._consumer_id = consumer_id
        self._count = batch_size
        self._dead_letter_maxlen = dead_letter_maxlen
        self._last_finished = last_finished
        self._lease_ms = lease_ms
        self._foreign_idle_ms = foreign_idle_ms
        self._token = secrets.token_hex(8)
        self._entry_bytes = 1_000  # of the latest reads; a guess before the first
        # The client's parser of stream replies costs more than everything else in a read.
        redis.set_response_callback("XREADGROUP", _unparsed)
        self._ack = redis.register_script(_ACK)
        self._set_aside = redis.register_script(_SET_ASIDE)
        self._lease = redis.register_script(_LEASE)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)
        self._claim = redis.register_script(_CLAIM)
        self._ack_ghosts = redis.register_script(_ACK_GHOSTS)

    # --- the consumer's life

    async def acquire(self) -> None:
        """Make sure of the group and lease the lowest free name `<CONSUMER_ID>-<n>`.

        A predecessor may be at work under such a name, without a lease: what it holds is not ours to read back.
        """
        async with translating(self._redis):
            await self._ensure_group()
            found = await self._redis.xinfo_consumers(self.stream_key, self.group)
            at_work = {one["name"] for one in found if int(one["idle"]) < self._foreign_idle_ms}
            theirs = at_work - cast("set[bytes]", await self._redis.smembers(CONSUMERS_KEY))
            for n in range(CONSUMERS_MAX):
                name = f"{self._consumer_id}-{n}"
                if name.encode() in theirs:
                    continue
                args: list[Any] = [self._token, self._lease_ms, name, self.group]
                if await self._lease(keys=[LEASE_PREFIX + name, CONSUMERS_KEY, self.stream_key], args=args):
                    self.name = name
                    return
        raise LeaseLostError(f"all names up to {self._consumer_id}-{CONSUMERS_MAX - 1} are leased")

    async def renew(self, idle_ms: int = 0) -> None:
        """Keep the lease, and fresh what we hold that was idle for so long: old workers claim at 10 seconds."""
        keys = [LEASE_PREFIX + self.name, CONSUMERS_KEY, self.stream_key, LEDGER_KEY]
        args: list[Any] = [self._token, self._lease_ms, self.name, self.group, idle_ms]
        async with translating(self._redis):
            if not await self._renew(keys=keys, args=args):
                raise LeaseLostError(f"the consumer name {self.name} has another owner now")

    async def release(self) -> None:
        """Give the name back; what it still holds stays pending for the next owner. Twice is harmless."""
        keys = [LEASE_PREFIX + self.name, CONSUMERS_KEY, self.stream_key]
        async with translating(self._redis):
            await self._release(keys=keys, args=[self._token, self.name, self.group])

    # --- entries come

    async def read(self, block_ms: int) -> list[Entry]:
        """New entries: up to a burst when there is a backlog, else wait up to `block_ms` for the first."""
        async with self._translating_group():
            if self.backlog:
                entries = await self._read_burst()
                if entries:
                    return entries
            entries = self._parse(await self._xreadgroup(self._redis, block_ms))
            self.backlog = len(entries) >= self._count
            return entries

    async def read_own(self, after: str, count: int = 100) -> tuple[list[Entry], str | None]:
        """Our own pending entries beyond `after`, and where to go on (None: that was all). Ghosts are acked."""
        async with self._translating_group():
            reply = await self._redis.execute_command(  # type: ignore[no-untyped-call]
                "XREADGROUP", "GROUP", self.group, self.name, "COUNT", count, "STREAMS", self.stream_key, after
            )
            found = reply[0][1] if reply else []
            if not found:
                return [], None
            ghosts = [entry_id for entry_id, fields in found if fields is None]
            if ghosts:
                await self._ack_ghosts(keys=[self.stream_key, LEDGER_KEY], args=[self.group, *ghosts])
            return self._parse(reply), found[-1][0].decode()

    async def consumers(self) -> list[Consumer]:
        """Everybody else in the group."""
        async with self._translating_group():
            found = await self._redis.xinfo_consumers(self.stream_key, self.group)
            names = [
                Consumer(one["name"].decode(errors="surrogateescape"), int(one["pending"]), int(one["idle"]))
                for one in found
            ]
            return [one for one in names if one.name != self.name]

    async def known_names(self) -> set[str]:
        """Names that a fastworker leased once: their leases tell whether they live."""
        async with translating(self._redis):
            members: Any = await self._redis.smembers(CONSUMERS_KEY)
            return {name.decode(errors="surrogateescape") for name in members}

    async def claim(self, consumer: str, *, idle_ms: int, count: int = 100) -> Claimed:
        """Adopt a bounded piece of what `consumer` holds, unless it has a lease or is still at work on it."""
        other = consumer.encode(errors="surrogateescape")
        keys: list[Any] = [self.stream_key, CONSUMERS_KEY, LEASE_PREFIX.encode() + other, LEDGER_KEY]
        async with self._translating_group():
            found, ghosts, claimed = await self._claim(keys=keys, args=[self.group, other, self.name, idle_ms, count])
            return Claimed(self._parse([[b"", claimed]]), found, ghosts)

    async def lowest_pending(self) -> str | None:
        """The lowest id that anybody in the group holds: everything before it that was delivered is settled."""
        async with self._translating_group():
            summary = await self._redis.xpending(self.stream_key, self.group)
            lowest = summary["min"]
            return lowest.decode() if lowest else None

    # --- entries end

    async def ack(self, tallies: Mapping[Tally, Sequence[str]], more_drops: Sequence[str] = ()) -> int:
        """Ack ids and count them by tally; the number that was still pending. Repeats count nothing.

        `more_drops`: reasons that no single entry can be named for; counted once if anything was acked.
        """
        args: list[Any] = [self.group]
        for tally, ids in tallies.items():
            args += [tally.outcome, tally.kind, len(tally.drops), len(ids), *tally.drops, *ids]
        if more_drops:
            args += ["", "", len(more_drops), 0, *more_drops]
        async with translating(self._redis):
            return int(await self._ack(keys=[self.stream_key, LEDGER_KEY, METRICS_KEY], args=args))

    async def set_aside(self, letters: Sequence[SetAside], now_ms: int) -> int:
        """Move entries to the dead letters and ack them, in one script; the number that was still pending.

        Fields: the contract's `type`, `data`, `seq`, `origId`, `deliveries`, then ours: `reason`, `error`, `form`
        (json, frame, native or unknown), `consumer`, `setAsideAt` (milliseconds), and `relay` for frames that name one.
        `data` is what the entry's own payload field held, byte by byte; of unknown forms all fields, as MessagePack.
        `original_fields` is the way back.
        """
        keys = [self.stream_key, LEDGER_KEY, METRICS_KEY, DEAD_LETTERS_KEY]
        total = 0
        for piece in _pieces(letters):
            args: list[Any] = [self.group, self.name, self._dead_letter_maxlen, now_ms]
            for letter in piece:
                form, kind, data, seq, relay = _letter_parts(letter.fields)
                error = letter.error[:500].encode(errors="replace")
                at = letter.fields.get(b"at", b"")
                args += [letter.entry_id, str(letter.reason), kind, data, seq, error, form, relay, at]
            async with self._translating_group():
                total += int(await self._set_aside(keys=keys, args=args))
        return total

    # --- inside

    def _xreadgroup(self, redis: Any, block_ms: int | None) -> Any:
        block = () if block_ms is None else ("BLOCK", block_ms)
        return redis.execute_command(
            "XREADGROUP", "GROUP", self.group, self.name, "COUNT", self._count, *block, "STREAMS", self.stream_key, ">"
        )

    async def _read_burst(self) -> list[Entry]:
        """Several reads of BATCH_SIZE in one round trip, so that the guide's 10 runs as well as 1,000."""
        wanted = min(BURST_ENTRIES, max(1, BURST_BYTES // self._entry_bytes))
        reads = max(1, wanted // self._count)
        if reads == 1:
            replies = [await self._xreadgroup(self._redis, None)]
        else:
            async with self._redis.pipeline(transaction=False) as pipe:
                for _ in range(reads):
                    self._xreadgroup(pipe, None)
                # A failure of one read must not hide what the others were handed.
                replies = await pipe.execute(raise_on_error=False)
        entries: list[Entry] = []
        failure = None
        for reply in replies:
            if isinstance(reply, Exception):
                failure = reply
            elif reply:
                entries += self._parse(reply)
        if failure is not None and not entries:
            raise failure
        self.backlog = len(entries) >= reads * self._count
        return entries

    def _parse(self, reply: Any) -> list[Entry]:
        """[[stream, [[id, [field, value, ...]], ...]]] to entries; ghosts have no fields and are left out."""
        if not reply:
            return []
        entries: list[Entry] = []
        for entry_id, flat in reply[0][1]:
            if flat is not None:
                pairs = iter(flat)
                entries.append((entry_id.decode(), dict(zip(pairs, pairs, strict=True))))
        if entries:
            sample = entries[:: max(1, len(entries) // 8)]
            self._entry_bytes = 1 + sum(len(value) for _, fields in sample for value in fields.values()) // len(sample)
        return entries

    @asynccontextmanager
    async def _translating_group(self) -> AsyncIterator[None]:
        """Run with errors translated; where the group is gone, it is created again for the next attempt."""
        async with translating(self._redis):
            try:
                yield
            except ResponseError as error:
                if error_code(error) != "NOGROUP":
                    raise
                await self._recreate_group()
                raise StreamUnavailable("the consumer group was gone; it is created again") from error

    async def _recreate_group(self) -> None:
        """One of all workers creates the group again; the others wait for it."""
        if await self._redis.set(RECREATE_LOCK_KEY, "1", nx=True, ex=5):
            await self._ensure_group()
        else:
            await asyncio.sleep(0.1)

    async def _ensure_group(self) -> None:
        """Create the group, and the stream, if they are missing.

        A new group starts behind what PostgreSQL remembers as settled, if that id belongs to this stream (an
        empty or foreign Redis has lower ids), else at the beginning: never later than what is unfinished.
        """
        try:
            groups = await self._redis.xinfo_groups(self.stream_key)
        except ResponseError as error:
            if error_code(error) not in ("ERR", ""):
                raise
            groups = []  # no such key
        if any(group["name"] == self.group.encode() for group in groups):
            return
        start = "0"
        finished = await self._last_finished()
        if finished is not None and await self._redis.exists(self.stream_key):
            info = await self._redis.xinfo_stream(self.stream_key)
            if id_order(finished) <= id_order(info["last-generated-id"].decode()):
                start = finished
        try:
            await self._redis.xgroup_create(self.stream_key, self.group, id=start, mkstream=True)
        except ResponseError as error:
            if error_code(error) != "BUSYGROUP":
                raise


def id_order(entry_id: str) -> tuple[int, int]:
    """Stream ids in their order: milliseconds, then sequence."""
    ms, _, n = entry_id.partition("-")
    return int(ms), int(n or 0)


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


def _unparsed(response: Any, **_options: Any) -> Any:
    return response
