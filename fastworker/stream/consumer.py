"""The worker's side of Redis: leased consumers of one group on one stream, and every way an entry can end.

Owns consumer names, leases, acks, the ledger and dead letters. What must not come apart is one script: an ack and
its ledger, a dead letter and its ack, a claim and the look at the lease. So any of them may be cut off, repeated or
killed half way, and the ledger still balances. Knows nothing of what an entry means.

All keys are used in scripts together, so Redis Cluster is not supported (the design says so too).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from fastworker.errors import Reason, StreamUnavailable
from fastworker.stream.client import error_code, translating

log = logging.getLogger(__name__)

Entry = tuple[str, dict[bytes, bytes]]
"""Stream id and fields."""

STREAM_KEY: Final = "firehose:events"
GROUP: Final = "firehose-processors"

LEDGER_KEY: Final = "fastworker:ledger"
"""Hash: `committed`, `nothing_to_store`, `set_aside`, `ghosts` (entries, each counted once), `drop:<reason>` (ops)."""
CONSUMERS_KEY: Final = "fastworker:consumers"
"""Set of consumer names that were ever leased by a fastworker and still exist in the group."""
LEASE_PREFIX: Final = "fastworker:consumer:"
HELD_KEY: Final = "fastworker:held"
"""Hash: consumer -> the lowest id that it holds. Nothing from there on is trimmed, in whosever pending list it is."""
GO_BACK_KEY: Final = "fastworker:go-back"
"""String: JSON {seq, relay} to where the reader has to go back, because PostgreSQL did; seq null: nobody knows."""
METRICS_KEY: Final = "cluster:metrics"
DEAD_LETTERS_KEY: Final = "firehose:dead-letters"
RECREATE_LOCK_KEY: Final = "firehose:stream:recreate-lock"

LEASE_MS: Final = 15_000
"""A consumer whose owner did not renew for so long is dead: three missed renewals and a slow fork."""
FOREIGN_IDLE_MS: Final = 60_000
"""Predecessors hold no leases: their consumers are dead after so long without a sign (design, Redis rules)."""
BURST_ENTRIES: Final = 1_000
"""What one round trip asks for when there is a backlog, in reads of BATCH_SIZE each."""
READ_BYTES: Final = 4 * 1024 * 1024
"""Of one piece, whatever it is: a burst, what is read back, what is adopted. The last step may exceed it."""
WINDOW: Final = 64
"""Entries that one XREADGROUP asks for before it is known how large they are."""
STEP: Final = 10
"""Entries that are taken before their bytes are looked at: one may have several megabytes."""
CONSUMERS_MAX: Final = 10_000
PUSHED_OUT_MAX: Final = 3_000
"""Letters looked at before others push them out: more than a flush sets aside."""

# Redis refuses the first write of a script at maxmemory, but lets one finish that has begun to write. Acks and dead
# letters free memory in the end, so each script begins with a write that changes nothing.
_BEGIN_WRITING = "redis.call('XACK', KEYS[1], ARGV[1], '0-0')\n"

# Ids are compared as text, because Lua's numbers lose digits of large ones.
ID_ORDER: Final = """
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return ms, seq
end
local function less(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
local function before(a, b)
  local ams, aseq = parts(a)
  local bms, bseq = parts(b)
  if ams ~= bms then return less(ams, bms) end
  return less(aseq, bseq)
end
local function group_of(stream, name)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = {}
    for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
    if group['name'] == name then return group end
  end
end
"""

# For scripts that know KEYS held: the lowest id that a consumer holds now ('' none).
_HOLD = """
local function hold(held, consumer, id)
  if id == '' then redis.call('HDEL', held, consumer) else redis.call('HSET', held, consumer, id) end
end
"""

# For scripts that take over a dead consumer. What it held is pending for somebody, unless somebody deleted the consumer
# (XGROUP DELCONSUMER) before it died: then the group goes back there, and whatever is on the stream is given again.
_GO_BACK = """
local function go_back(stream, held, group, consumer)
  local id = redis.call('HGET', held, consumer)
  if not id then return 0 end
  redis.call('HDEL', held, consumer)
  local found = redis.pcall('XPENDING', stream, group, id, id, 1)
  if found.err or found[1] then return 0 end
  local ms = tonumber(string.match(id, '^%d+'))
  local before = ms > 0 and string.format('%.0f-18446744073709551615', ms - 1) or '0-0'
  redis.call('XGROUP', 'SETID', stream, group, before)
  return 1
end
"""

# KEYS stream, ledger, metrics, held. ARGV group, consumer, the lowest id that it holds then, then per tally: outcome,
# metrics field, number of drops, number of ids, drops..., ids... A tally without ids counts its drops once if anything
# before it was acked.
_ACK = (
    _BEGIN_WRITING
    + _HOLD
    + """
hold(KEYS[4], ARGV[2], ARGV[3])
local at, total = 4, 0
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

# KEYS stream, ledger, metrics, dead letters, held. ARGV group, consumer, maxlen, time, the lowest id that the consumer
# holds then, then nine per entry:
# id, reason, type, data, seq, error, form, relay, at. Only what is still pending is set aside: a repeat does nothing.
_SET_ASIDE = (
    _BEGIN_WRITING
    + SET_ASIDE_ONE
    + _HOLD
    + """
hold(KEYS[5], ARGV[2], ARGV[5])
local total = 0
for at = 6, #ARGV, 9 do
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

# KEYS lease, consumers, stream, held. ARGV token, ttl, name, group. At maxmemory, too: it is workers who make room.
_LEASE = (
    _GO_BACK
    + """
redis.call('XACK', KEYS[3], ARGV[4], '0-0')
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  redis.call('SADD', KEYS[2], ARGV[3])
  return 1 + go_back(KEYS[3], KEYS[4], ARGV[4], ARGV[3])
end
return 0
"""
)

# KEYS lease, consumers, stream, ledger, held. ARGV token, ttl, name, group, the lowest id that we hold, all of them.
# Also restores a lease that Redis lost, and what left the pending list without us: whoever deletes our consumer (XGROUP
# DELCONSUMER) takes what it holds out of it, and nobody would get that again if we died now. What another consumer took
# over is its own. XPENDING fails where the group is gone: the next read finds that out and mends it.
# An id whose entry somebody trimmed does not come back from XCLAIM, and leaves the pending list (from 7.0 on): a ghost,
# counted here, because its ack will count nothing. On 6.2 it comes back and its ack counts it.
_RENEW = (
    ID_ORDER
    + _HOLD
    + """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {-1, 0} end
redis.pcall('XACK', KEYS[3], ARGV[4], '0-0')
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
hold(KEYS[5], ARGV[3], ARGV[5])
local ours, missing, ghosts = {}, {}, 0
local function renew()
  if #ours == 0 then return end
  local count = #ours
  ours[count + 1] = 'JUSTID'
  ghosts = ghosts + count - #redis.call('XCLAIM', KEYS[3], ARGV[4], ARGV[3], 0, unpack(ours))
  ours = {}
end
for id in string.gmatch(ARGV[6], '%S+') do
  local found = redis.pcall('XPENDING', KEYS[3], ARGV[4], id, id, 1)
  if found.err then return {0, 0} end
  if not found[1] then missing[#missing + 1] = id
  elseif found[1][2] == ARGV[3] then ours[#ours + 1] = id end
  if #ours == 1000 then renew() end
end
renew()
local restored = 0
-- Where the lease had run out, others may have adopted and finished what we hold.
if not holder then missing = {} end
local group = missing[1] and group_of(KEYS[3], ARGV[4])
for _, id in ipairs(missing) do
  -- Beyond the group's last id it comes again by itself: Redis came back with older data.
  if not before(group['last-delivered-id'], id) then
    restored = restored + #redis.call('XCLAIM', KEYS[3], ARGV[4], ARGV[3], 0, id, 'FORCE', 'JUSTID')
  end
end
if ghosts > 0 then redis.call('HINCRBY', KEYS[4], 'ghosts', ghosts) end
return {ghosts, restored}
"""
)

# KEYS lease, consumers, stream, held. ARGV token, name, group.
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
local held = redis.pcall('XPENDING', KEYS[3], ARGV[3], '-', '+', 1, ARGV[2])
if not held.err and not held[1] then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[3], ARGV[3], ARGV[2])
  redis.call('SREM', KEYS[2], ARGV[2])
  redis.call('HDEL', KEYS[4], ARGV[2])
end
return 1
"""

# For scripts that hand out entries: their bytes.
_SIZE_OF = """
local function size_of(entries)
  local bytes = 0
  for _, entry in ipairs(entries) do
    if entry and entry[2] then
      for _, text in ipairs(entry[2]) do bytes = bytes + #text end
    end
  end
  return bytes
end
"""

# KEYS stream. ARGV group, consumer, after (or >), entries, bytes, step. Answers {entries..., as many as asked for or as
# many bytes}, and whether that was not all.
_READ = (
    _SIZE_OF
    + """
local after, limit, bytes, all = ARGV[3], tonumber(ARGV[4]), 0, {}
while #all < limit and bytes < tonumber(ARGV[5]) do
  local step = math.min(tonumber(ARGV[6]), limit - #all)
  if bytes > 0 then step = math.max(1, math.min(step, math.floor((tonumber(ARGV[5]) - bytes) * #all / bytes))) end
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', step, 'STREAMS', KEYS[1], after)
  local found = reply and reply[1] and reply[1][2] or {}
  for _, entry in ipairs(found) do all[#all + 1] = entry end
  bytes = bytes + size_of(found)
  if #found < step then return {all, 0} end
  if after ~= '>' then after = found[#found][1] end
end
return {all, 1}
"""
)

# KEYS stream, consumers, lease of the other, ledger, held. ARGV group, from, to, idle, count, bytes, step.
# Ids whose entry was trimmed come back from XCLAIM as nothing (from 7.0 they also leave the pending list, before
# that they have to be acked): ghosts, counted once because one script finds, acks and counts them.
_CLAIM = (
    _GO_BACK
    + _SIZE_OF
    + """
if redis.call('EXISTS', KEYS[3]) == 1 then return {0, 0, {}} end
if go_back(KEYS[1], KEYS[5], ARGV[1], ARGV[2]) == 1 then return {0, -1, {}} end
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
local ids, entries, present, bytes, more = {}, {}, {}, 0, false
for first = 1, #found, ARGV[7] do
  if bytes >= tonumber(ARGV[6]) then
    more = true
    break
  end
  local step = {}
  for i = first, math.min(first + ARGV[7] - 1, #found) do step[#step + 1] = found[i][1] end
  local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, unpack(step))
  for i = 1, #step do
    ids[#ids + 1] = step[i]
    local entry = claimed[i]
    if entry and entry[1] then
      entries[#entries + 1] = entry
      present[entry[1]] = true
      bytes = bytes + size_of({entry})
    end
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
return {more and tonumber(ARGV[5]) or #ids, ghosts, entries}
"""
)

# KEYS stream, ledger. ARGV group, ids...
_ACK_GHOSTS = """
local acked = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2, #ARGV))
if acked > 0 then redis.call('HINCRBY', KEYS[2], 'ghosts', acked) end
return acked
"""


def key_of(key: str, stream_key: str, group: str = GROUP) -> str:
    """The usual stream and group have the keys as they are written here, every other one has its own."""
    others = [name for name, usual in ((stream_key, STREAM_KEY), (group, GROUP)) if name != usual]
    return ":".join([key, *others])


def lease_prefix(stream_key: str) -> str:
    """+ name of a consumer."""
    return key_of(LEASE_PREFIX.rstrip(":"), stream_key) + ":"


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
        stream_key: str = STREAM_KEY,
        group: str = GROUP,
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
        self._ledger = key_of(LEDGER_KEY, stream_key)
        self._consumers = key_of(CONSUMERS_KEY, stream_key, group)
        self._held_key = key_of(HELD_KEY, stream_key, group)
        self._go_back_key = key_of(GO_BACK_KEY, stream_key, group)
        self._lease_prefix = lease_prefix(stream_key)
        self._dead_letters = key_of(DEAD_LETTERS_KEY, stream_key)
        self.backlog = False  # the last read came back full
        self._redis = redis
        self._consumer_id = consumer_id
        self._count = batch_size
        self._dead_letter_maxlen = dead_letter_maxlen
        self._last_finished = last_finished
        self._lease_ms = lease_ms
        self._foreign_idle_ms = foreign_idle_ms
        self._window = min(batch_size, STEP)  # of one XREADGROUP
        self._token = secrets.token_hex(8)
        self._held: dict[str, None] = {}  # ids that were read and that no ack was sent for
        self._told = ""  # the lowest of them, as we told it last
        self._in_order = True  # they are in the order of the stream
        self._ending = asyncio.Lock()  # an ack and a renewal never overtake each other
        # The client's parser of stream replies costs more than everything else in a read.
        redis.set_response_callback("XREADGROUP", _unparsed)
        self._ack = redis.register_script(_ACK)
        self._set_aside = redis.register_script(_SET_ASIDE)
        self._lease = redis.register_script(_LEASE)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)
        self._claim = redis.register_script(_CLAIM)
        self._read = redis.register_script(_READ)
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
            theirs = at_work - cast("set[bytes]", await self._redis.smembers(self._consumers))
            for n in range(CONSUMERS_MAX):
                name = f"{self._consumer_id}-{n}"
                if name.encode() in theirs:
                    continue
                args: list[Any] = [self._token, self._lease_ms, name, self.group]
                keys = [self._lease_prefix + name, self._consumers, self.stream_key, self._held_key]
                if leased := await self._lease(keys=keys, args=args):
                    self.name = name
                    if leased > 1:
                        _tell_back(name)
                    return
        raise LeaseLostError(f"all names up to {self._consumer_id}-{CONSUMERS_MAX - 1} are leased")

    async def renew(self) -> int:
        """Keep the lease, and fresh what we hold: old workers claim at 10 seconds. How many of them had to be put back.

        Never beside an ack: what was acked meanwhile must not come back.
        """
        keys = [self._lease_prefix + self.name, self._consumers, self.stream_key, self._ledger, self._held_key]
        async with self._ending, translating(self._redis):
            args: list[Any] = [self._token, self._lease_ms, self.name, self.group, self._lowest(), " ".join(self._held)]
            ghosts, restored = await self._renew(keys=keys, args=args)
        if ghosts < 0:
            raise LeaseLostError(f"the consumer name {self.name} has another owner now")
        return int(restored)

    async def tell_held(self) -> None:
        """What we hold for longer than a flush takes is told before the next ack or renewal does it."""
        lowest = self._lowest()
        if lowest and lowest != self._told:
            async with self._ending, translating(self._redis):
                if lowest in self._held:
                    await self._redis.hset(self._held_key, self.name, lowest)
                    self._told = lowest

    async def release(self) -> None:
        """Give the name back; what it still holds stays pending for the next owner. Twice is harmless."""
        keys = [self._lease_prefix + self.name, self._consumers, self.stream_key, self._held_key]
        async with translating(self._redis):
            await self._release(keys=keys, args=[self._token, self.name, self.group])

    # --- entries come

    async def read(self, block_ms: int) -> list[Entry]:
        """New entries: up to a burst when there is a backlog, else wait up to `block_ms` for the first."""
        async with self._translating_group():
            entries: list[Entry] = []
            size = 0
            block = () if self.backlog else ("BLOCK", block_ms)
            while size < READ_BYTES and len(entries) < BURST_ENTRIES:
                window = self._window
                try:
                    found, found_bytes = await self._read_window(window, block)
                except (RedisError, OSError, RuntimeError):
                    if entries:
                        break  # what came before must not be lost with it; the next read meets the same again
                    raise
                entries += found
                size += found_bytes
                self.backlog, block = len(found) >= window, ()
                if not self.backlog:
                    break
            return entries

    async def read_own(self, after: str, count: int = 100) -> tuple[list[Entry], str | None]:
        """Our own pending entries beyond `after`, and where to go on (None: that was all). Ghosts are acked.

        Never beside an ack: what is acked meanwhile would be held for ever.
        """
        async with self._ending, self._translating_group():
            found, _ = await self._read_piece(after, count)
            if not found:
                return [], None
            ghosts = [entry_id for entry_id, fields in found if not fields]
            if ghosts:
                await self._ack_ghosts(keys=[self.stream_key, self._ledger], args=[self.group, *ghosts])
            return self._parse([[b"", found]]), found[-1][0].decode()

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
            members: Any = await self._redis.smembers(self._consumers)
            return {name.decode(errors="surrogateescape") for name in members}

    async def claim(self, consumer: str, *, idle_ms: int, count: int = 100) -> Claimed:
        """Adopt a bounded piece of what `consumer` holds, unless it has a lease or is still at work on it."""
        other = consumer.encode(errors="surrogateescape")
        keys: list[Any] = [
            self.stream_key,
            self._consumers,
            self._lease_prefix.encode() + other,
            self._ledger,
            self._held_key,
        ]
        async with self._translating_group():
            found, ghosts, claimed = await self._claim(
                keys=keys, args=[self.group, other, self.name, idle_ms, count, READ_BYTES, STEP]
            )
            if ghosts < 0:
                _tell_back(consumer)
                return Claimed([], 0, 0)
            return Claimed(self._parse([[b"", claimed]]), found, ghosts)

    async def time(self) -> datetime:
        """By the server's clock."""
        async with translating(self._redis):
            seconds, micros = await self._redis.time()
        return datetime.fromtimestamp(seconds + micros / 1e6, UTC)

    async def lowest_pending(self) -> str | None:
        """The lowest id that anybody in the group holds: everything before it that was delivered is settled.

        Where nobody holds any, and the group went back, the first one that is delivered again. The lowest there can be
        while the reader has to go back, too.
        """
        async with self._translating_group(), self._redis.pipeline(transaction=True) as pipe:
            pipe.xpending(self.stream_key, self.group)
            pipe.hvals(self._held_key)
            pipe.xinfo_groups(self.stream_key)
            pipe.exists(self._go_back_key)
            summary, held, groups, must_go_back = await pipe.execute()
        if must_go_back:
            return "0-0"
        found = {lowest.decode() for lowest in (summary["min"], *held) if lowest} | ({self._lowest()} - {""})
        for group in groups:
            if group["name"] == self.group.encode():
                ms, n = id_order(group["last-delivered-id"].decode())
                found.add(f"{ms}-{n + 1}")
        return min(found, key=id_order, default=None)

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
        keys = [self.stream_key, self._ledger, METRICS_KEY, self._held_key]
        async with self._ending, translating(self._redis):
            for ids in tallies.values():
                self._let_go(ids)
            return int(await self._ack(keys=keys, args=[self.group, self.name, self._lowest(), *args]))

    async def set_aside(self, letters: Sequence[SetAside], now_ms: int) -> int:
        """Move entries to the dead letters and ack them, in one script; the number that was still pending.

        Fields: the contract's `type`, `data`, `seq`, `origId`, `deliveries`, then ours: `reason`, `error`, `form`
        (json, frame, native or unknown), `consumer`, `setAsideAt` (milliseconds), and `relay` for frames that name one.
        `data` is what the entry's own payload field held, byte by byte; of unknown forms all fields, as MessagePack.
        `original_fields` is the way back.
        """
        keys = [self.stream_key, self._ledger, METRICS_KEY, self._dead_letters, self._held_key]
        total = 0
        for piece in _pieces(letters):
            args: list[Any] = []
            for letter in piece:
                form, kind, data, seq, relay = _letter_parts(letter.fields)
                error = letter.error[:500].encode(errors="replace")
                at = letter.fields.get(b"at", b"")
                args += [letter.entry_id, str(letter.reason), kind, data, seq, error, form, relay, at]
            async with self._ending, self._translating_group():
                self._let_go([letter.entry_id for letter in piece])
                head: list[Any] = [self.group, self.name, self._dead_letter_maxlen, now_ms, self._lowest()]
                total += int(await self._set_aside(keys=keys, args=[*head, *args]))
        return total

    async def pushed_out(self, count: int) -> list[dict[bytes, bytes]]:
        """The fields of the dead letters that have to go where so many more come: the oldest ones."""
        async with translating(self._redis):
            over = int(await self._redis.xlen(DEAD_LETTERS_KEY)) + count - self._dead_letter_maxlen
            if over <= 0:
                return []
            found = await self._redis.xrange(DEAD_LETTERS_KEY, count=min(over, PUSHED_OUT_MAX))
            return [fields for _, fields in cast("list[tuple[bytes, dict[bytes, bytes]]]", found)]

    # --- inside

    def _hold(self, entries: Sequence[Entry]) -> None:
        ids = [entry_id for entry_id, _ in entries]
        newest = next(reversed(self._held), None)
        if newest is not None and id_order(ids[0]) < id_order(newest):
            self._in_order = False  # adopted, or read back
        self._held.update(dict.fromkeys(ids))

    def _let_go(self, ids: Sequence[str]) -> None:
        held = self._held
        for entry_id in ids:
            held.pop(entry_id, None)
        self._in_order = self._in_order or not held

    def _lowest(self) -> str:
        """Of the ids that we hold; empty: none."""
        if self._in_order:
            return next(iter(self._held), "")
        return min(self._held, key=id_order, default="")

    async def _read_window(self, window: int, block: tuple[Any, ...]) -> tuple[list[Entry], int]:
        """A few new entries and their bytes. Large ones make the next window small; it grows again one by one."""
        reply = await self._redis.execute_command(  # type: ignore[no-untyped-call]
            "XREADGROUP", "GROUP", self.group, self.name, "COUNT", window, *block, "STREAMS", self.stream_key, ">"
        )
        entries = self._parse(reply)
        sizes = [sum(map(len, fields.values())) for _, fields in entries]
        if sizes:
            self._window = max(1, min(2 * window, WINDOW, self._count, READ_BYTES // max(1, *sizes)))
        return entries, sum(sizes)

    async def _read_piece(self, after: str, count: int) -> tuple[list[Any], bool]:
        """Up to `count` entries or READ_BYTES in one round trip, as they come; and whether there may be more."""
        step = min(self._count, STEP)
        args: list[Any] = [self.group, self.name, after, count, READ_BYTES, step]
        found, more = await self._read(keys=[self.stream_key], args=args)
        return found, bool(more)

    def _parse(self, reply: Any) -> list[Entry]:
        """[[stream, [[id, [field, value, ...]], ...]]] to entries; ghosts have no fields and are left out."""
        if not reply:
            return []
        entries: list[Entry] = []
        for entry_id, flat in reply[0][1]:
            if flat:
                pairs = iter(flat)
                entries.append((entry_id.decode(), dict(zip(pairs, pairs, strict=True))))
        if entries:
            self._hold(entries)
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
        if await self._redis.set(key_of(RECREATE_LOCK_KEY, self.stream_key, self.group), "1", nx=True, ex=5):
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


def _tell_back(consumer: str) -> None:
    log.warning(
        "Somebody deleted the consumer %s (XGROUP DELCONSUMER) while it held entries, and then it died: the group goes "
        "back to the first of them, and what is on the stream from there on is read again", consumer,
    )  # fmt: skip


def _unparsed(response: Any, **_options: Any) -> Any:
    return response
