"""The reader's side of Redis: the append script with its cursor, the lease, trimming, the dashboard's keys.

Three scripts carry the promises. `_APPEND` puts a chunk on the stream and then moves the cursor, and does neither
unless this reader holds the lease and the cursor is where it left it. `_TRIM` removes what every group has finished,
computed and removed in one step. `_SET_ASIDE_ABANDONED` takes what nobody will ever finish from the head of a full
stream. On a Redis Cluster, which is not supported, they would need keys with one hash tag.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.errors import ConfigError, Unreachable
from fastworker.stream.client import error_code, translating
from fastworker.stream.consumer import (
    DEAD_LETTERS_KEY,
    GO_BACK_KEY,
    GROUP,
    HELD_KEY,
    ID_ORDER,
    LEDGER_KEY,
    METRICS_KEY,
    SET_ASIDE_ONE,
    key_of,
    lease_prefix,
)

LEASE: Final = "fastworker:reader"
RELAYS: Final = "fastworker:relays"
"""Hash: host -> ms when it was first read from. Each host is a sequence space of its own."""
RELAY: Final = "fastworker:relay"
"""String: the host that the main cursor belongs to."""
CURSOR_OF: Final = "fastworker:cursor:"
"""+ host: decimal seq, that relay's cursor, kept while another relay is read."""
REPAIRS: Final = "fastworker:repairs"
"""Hash: DID -> JSON {rev, seq, relay, time} of its newest #sync (JSON form only; other forms put it on the stream)."""
GAPS: Final = "fastworker:gaps"
"""List, newest first: JSON {relay, reason, after, resumed, at} of each stretch that the relay did not give us."""
TAIL: Final = "fastworker:tail"
"""String: the id of the newest entry that a reader of ours appended."""
MARKS: Final = "fastworker:marks"
"""List, oldest first: "id seq host" of appended entries, about one a second, that the workers have not reached yet."""
FINISHED: Final = "fastworker:finished"
"""String: the newest mark up to which the workers have finished the stream."""
CURSOR_STREAM: Final = "fastworker:stream-of:"
"""+ cursor key: the stream that it belongs to."""
READER_STATS: Final = "fastworker:reader:stats"
STATUS: Final = "firehose:status"
OURS: Final = "fastworker"
"""What our reader says of itself there; the readers before it say nothing."""
RECENT: Final = "firehose:recent_events"
BROADCAST: Final = "firehose:events:broadcast"

LEASE_MS: Final = 5_000
ABANDONED_MS: Final = 600_000
"""An entry is abandoned when its consumer gave no sign for so long; a worker of ours would have adopted it long ago."""
DASHBOARD_TTL_S: Final = 10
GAPS_KEPT: Final = 100
MARKS_MAX: Final = 10_000

CHUNK_ITEMS: Final = 500
CHUNK_BYTES: Final = 2_000_000

# KEYS stream, cursor, lease, the relay's cursor, RELAY, dead letters, repairs, gaps, RELAYS, tail
# ARGV token, lease ms, cursor expected ('' absent), cursor after ('' as it is), host, entries, stream limit,
#      dead-letter limit, gaps kept, ms now, the chunk's body
# The body is one argument, because the client packs every argument in Python: per item a count, then so many strings,
# each after its length; numbers are four bytes, little-endian.
# The first write is an XADD, or else the SETs: Redis refuses a script's first write when memory is out and lets a
# script that has written finish, so OOM leaves either all or nothing.
# An empty stream that does not remember our newest entry is another stream: ours was deleted, renamed or evicted.
_APPEND: Final = (
    ID_ORDER
    + """
local owner = redis.call('GET', KEYS[3])
if owner and owner ~= ARGV[1] then return {'lease', owner} end
local cursor = redis.call('GET', KEYS[2]) or ''
if cursor ~= ARGV[3] then
  if cursor == ARGV[4] and redis.call('GET', KEYS[5]) == ARGV[5] then return {'ok', 'already'} end
  return {'cursor', cursor}
end
local entries, length = tonumber(ARGV[6]), redis.call('XLEN', KEYS[1])
if entries > 0 and length + entries > tonumber(ARGV[7]) then return {'full', ''} end
local tail = length == 0 and redis.call('GET', KEYS[10])
if tail then
  local info, last = redis.pcall('XINFO', 'STREAM', KEYS[1]), '0-0'
  for i = 1, #info, 2 do if info[i] == 'last-generated-id' then last = info[i + 1] end end
  if before(last, tail) then return {'broken', ''} end
end
local body, at, last = ARGV[11], 1, ''
while at <= #body do
  local item, count = {}, nil
  count, at = struct.unpack('<I4', body, at)
  for i = 1, count do item[i], at = struct.unpack('<I4c0', body, at) end
  local what = item[1]
  if what == 'entry' then
    last = redis.call('XADD', KEYS[1], '*', unpack(item, 2))
  elseif what == 'dead letter' then
    redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[8], '*', unpack(item, 2))
  elseif what == 'repair' then
    redis.call('HSET', KEYS[7], item[2], item[3])
  else
    redis.call('LPUSH', KEYS[8], item[2])
    redis.call('LTRIM', KEYS[8], 0, ARGV[9] - 1)
  end
end
if ARGV[4] ~= '' then
  redis.call('SET', KEYS[2], ARGV[4])
  redis.call('SET', KEYS[4], ARGV[4])
  redis.call('SET', KEYS[5], ARGV[5])
  redis.call('HSETNX', KEYS[9], ARGV[5], ARGV[10])
end
if last ~= '' then redis.call('SET', KEYS[10], last) end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
return {'ok', last}
"""
)

# KEYS stream, marks, finished, held, go back. ARGV the workers' group, a new mark or '', marks kept, the first unread
# id at the last look or ''. Answers whether an unread entry is gone, the newest finished mark, the first unread id, and
# to where the reader has to go back because PostgreSQL did.
# Workers read in order and only what they finished is trimmed: a mark that they have not reached, and that lies before
# the first entry of the stream, was removed by somebody else. What is pending they hold.
_WATCH: Final = (
    ID_ORDER
    + """
if ARGV[2] ~= '' then
  if redis.call('LLEN', KEYS[2]) >= tonumber(ARGV[3]) then redis.call('RPOP', KEYS[2]) end
  redis.call('RPUSH', KEYS[2], ARGV[2])
end
local exists = redis.call('EXISTS', KEYS[1]) == 1
local group = exists and group_of(KEYS[1], ARGV[1])
local read, held = group and group['last-delivered-id'] or '0-0', nil
if group and group['pending'] > 0 then held = redis.call('XPENDING', KEYS[1], ARGV[1])[2] end
for _, id in ipairs(redis.call('HVALS', KEYS[4])) do
  if not held or before(id, held) then held = id end
end
local mark = redis.call('LINDEX', KEYS[2], 0)
local function id_of(text) return string.match(text, '^%S+') end
while mark do
  local id = id_of(mark)
  if before(read, id) or (held and not before(id, held)) then break end
  redis.call('SET', KEYS[3], redis.call('LPOP', KEYS[2]))
  mark = redis.call('LINDEX', KEYS[2], 0)
end
local first = exists and redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local function gone(id)
  return before(read, id) and (not first or before(id, first[1]))
end
local broken = mark and gone(id_of(mark)) or ARGV[4] ~= '' and gone(ARGV[4])
-- Of the marks, too, that lie behind one which somebody holds.
if not broken and mark and held then
  for _, one in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    local id = id_of(one)
    if before(read, id) then
      broken = gone(id)
      break
    end
  end
end
local unread = exists and redis.call('XRANGE', KEYS[1], '(' .. read, '+', 'COUNT', 1)[1]
return {broken and 1 or 0, redis.call('GET', KEYS[3]) or '', unread and unread[1] or '',
  redis.call('GET', KEYS[5]) or ''}
"""
)

# KEYS cursor, lease, the relay's cursor, tail, marks, finished, gaps, go back. ARGV token, cursor expected, cursor
# after, a gap's text or '', gaps kept, what was asked for. What a reader knows of a stream that is not there any more
# is forgotten.
_GO_BACK: Final = """
local owner = redis.call('GET', KEYS[2])
if (owner and owner ~= ARGV[1]) or (redis.call('GET', KEYS[1]) or '') ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], ARGV[3])
  redis.call('SET', KEYS[3], ARGV[3])
end
redis.call('DEL', KEYS[4], KEYS[5], KEYS[6])
if redis.call('GET', KEYS[8]) == ARGV[6] then redis.call('DEL', KEYS[8]) end
if ARGV[4] ~= '' then
  redis.call('LPUSH', KEYS[7], ARGV[4])
  redis.call('LTRIM', KEYS[7], 0, ARGV[5] - 1)
end
return 1
"""

# KEYS lease; ARGV token, ms. An expired lease that nobody took is ours again: the cursor decides about the rest.
_RENEW: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return owner end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ''
"""

_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

# KEYS stream, held; ARGV ms that finished entries are kept, how many entries may be on the stream for their sake, a
# group without which nothing is removed, then the groups that do not count.
# What a group has finished ends before its smallest pending id, or with its last delivered one.
_TRIM: Final = (
    ID_ORDER
    + """
if redis.call('EXISTS', KEYS[1]) == 0 then return {0, '', ''} end
local ignored, missing = {}, ARGV[3] ~= ''
for i = 4, #ARGV do ignored[ARGV[i]] = true end
local bound, holder = nil, ''
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
  if group['name'] == ARGV[3] then missing = false end
  if not ignored[group['name']] then
    local upto
    if group['pending'] > 0 then upto = redis.call('XPENDING', KEYS[1], group['name'])[2] end
    if not upto then
      local ms, seq = parts(group['last-delivered-id'])
      if #seq < 16 then seq = string.format('%.0f', tonumber(seq) + 1) end
      upto = ms .. '-' .. seq
    end
    if group['name'] == ARGV[3] then
      for _, id in ipairs(redis.pcall('HVALS', KEYS[2])) do
        if before(id, upto) then upto = id end
      end
    end
    if not bound or before(upto, bound) then bound, holder = upto, group['name'] end
  end
end
if missing then return {0, ARGV[3], ''} end
if not bound then return {0, '', ''} end
local keep = tonumber(ARGV[1])
if keep > 0 then
  local now = redis.call('TIME')
  local young = string.format('%.0f-0', now[1] * 1000 + math.floor(now[2] / 1000) - keep)
  -- What is kept yields to what comes: the oldest go early, a piece at a time.
  local over = math.min(redis.call('XLEN', KEYS[1]) - tonumber(ARGV[2]), 1000)
  if over > 0 then
    local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', over + 1)
    if oldest[over + 1] and before(young, oldest[over + 1][1]) then young = oldest[over + 1][1] end
    if not oldest[over + 1] then young = bound end
  end
  if before(young, bound) then bound = young end
end
return {redis.call('XTRIM', KEYS[1], 'MINID', bound), holder, bound}
"""
)

# KEYS stream, ledger, metrics, dead letters. ARGV group, ms without a sign of who is dead, ms that another has outlived
# it, limit of the dead letters, ms now, prefix of workers' leases.
# Only at the head, up to the first entry that is somebody's; only where another consumer read on (else the stream waits
# for workers to come back; before Redis 7.2 who waits for new entries gives no sign) and none of them is a fastworker
# (it adopts); and nothing that would push out another letter. Ids whose entry somebody trimmed are acked as ghosts.
_SET_ASIDE_ABANDONED: Final = (
    SET_ASIDE_ONE
    + """
redis.call('XACK', KEYS[1], ARGV[1], '0-0')
local patience, idles, youngest = tonumber(ARGV[2]), {}, nil
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #flat, 2 do consumer[flat[i]] = flat[i + 1] end
  if redis.call('EXISTS', ARGV[6] .. consumer['name']) == 1 then return {0, 0} end
  idles[consumer['name']] = consumer['idle']
  youngest = math.min(youngest or consumer['idle'], consumer['idle'])
end
local moved, ghosts = 0, 0
local room = tonumber(ARGV[4]) - redis.call('XLEN', KEYS[4])
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100)) do
  local id, consumer, idle = pending[1], pending[2], pending[3]
  local silent = math.min(idle, idles[consumer])
  if silent < patience or idles[consumer] - youngest < tonumber(ARGV[3]) then break end
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    local form = fields['n'] and 'native' or fields['f'] and 'frame' or fields['data'] and 'json'
    if not form or moved >= room then break end
    local json = form == 'json'
    set_aside_one(ARGV[1], ARGV[4], id, pending[4], consumer, ARGV[5], 'abandoned',
      json and (fields['type'] or '') or form, fields['n'] or fields['f'] or fields['data'],
      json and fields['seq'] or '', 'nothing was heard of its consumer for ' .. math.floor(silent / 1000) .. ' s',
      form, form == 'frame' and fields['relay'] or '', fields['at'] or '')
    moved = moved + 1
  else
    redis.call('XACK', KEYS[1], ARGV[1], id)
    redis.call('HINCRBY', KEYS[2], 'ghosts', 1)
    ghosts = ghosts + 1
  end
end
return {moved, ghosts}
"""
)


class LeaseLost(Exception):
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

    `seq` None: nothing in it moves the cursor. `entries` counts what goes on the stream.
    """

    __slots__ = ("_pieces", "bytes", "entries", "items", "seq")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.items = 0
        self.entries = 0
        self.bytes = 0
        self.seq: int | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    def entry(self, fields: Sequence[tuple[bytes, bytes]]) -> None:
        self._add(b"entry", [part for field in fields for part in field])
        self.entries += 1

    def dead_letter(self, fields: Sequence[tuple[bytes, bytes]]) -> None:
        self._add(b"dead letter", [part for field in fields for part in field])

    def repair(self, did: str, text: bytes) -> None:
        self._add(b"repair", [did.encode(), text])

    def gap(self, text: bytes) -> None:
        self._add(b"gap", [text])

    def _add(self, what: bytes, parts: list[bytes]) -> None:
        pieces = self._pieces
        pieces.append((len(parts) + 1).to_bytes(4, "little"))
        for part in (what, *parts):
            length = len(part)
            self.bytes += length
            pieces.append(length.to_bytes(4, "little"))
            pieces.append(part)
        self.items += 1


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
        dead_letter_maxlen: int = 10_000,
        group: str = "",
        ignore_groups: Sequence[str] = (),
        keep_s: float = 0.0,
    ) -> None:
        self._redis = redis
        self._stream = stream_key
        self._cursor_key = cursor_key
        self._lease = key_of(LEASE, stream_key)
        self._keys_for_append = [key_of(key, stream_key) for key in (DEAD_LETTERS_KEY, REPAIRS, GAPS, RELAYS, TAIL)]
        self._max_len = max_stream_len
        self._max_bytes = stream_bytes_max
        self._dead_letter_maxlen = dead_letter_maxlen
        self._group = group
        self._ignore_groups = tuple(ignore_groups)
        self._keep_s = keep_s
        self._token = secrets.token_hex(8)
        self._host = ""
        self._cursor = ""  # the cursor key's text as this reader saw or wrote it last
        self._bytes = 0  # of the stream: as last measured, plus what was appended since
        self._newest = ""  # mark of the entry appended last, if it was not left in Redis yet
        self._unread = ""  # the first unread id when we looked last
        self._finished: tuple[str, int] | None = None  # host, and seq up to which the workers had finished then
        self._append = redis.register_script(_APPEND)
        self._watch = redis.register_script(_WATCH)
        self._go_back = redis.register_script(_GO_BACK)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)
        self._set_aside_abandoned = redis.register_script(_SET_ASIDE_ABANDONED)
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

    def _key(self, key: str) -> str:
        return key_of(key, self._stream)

    def cursor_of(self, host: str) -> str:
        """The key of that relay's cursor."""
        return f"{self._key(CURSOR_OF.rstrip(':'))}:{host}"

    async def own_cursor(self) -> None:
        """Refuse a cursor that a reader of another stream is moving."""
        key = CURSOR_STREAM + self._cursor_key
        async with translating(self._redis):
            other = cast("bytes", await self._redis.get(key) or b"").decode("utf-8", "replace")
            if other not in ("", self._stream) and await self._redis.exists(key_of(LEASE, other)):
                raise ConfigError(
                    f"{self._cursor_key} is the cursor of the reader of {other}, which is at work: give the reader of "
                    f"{self._stream} a REDIS_CURSOR_KEY of its own"
                )
            await self._redis.set(key, self._stream)

    async def run_id(self) -> str:
        """Names this run of the server: another one means that it restarted or that another took over."""
        async with translating(self._redis):
            return str((await self._redis.info("server")).get("run_id", ""))

    async def acquire(self) -> bool:
        """Take the lease, or keep it; False while another reader has it."""
        async with translating(self._redis):
            return not await self._renew(keys=[self._lease], args=[self._token, LEASE_MS])

    async def renew(self) -> None:
        if not await self.acquire():
            raise LeaseLost("another reader has taken the lease")

    async def release(self) -> None:
        async with translating(self._redis):
            await self._release(keys=[self._lease], args=[self._token])

    async def peek_cursor(self) -> str:
        """The main cursor's text, '' when there is none."""
        async with translating(self._redis):
            return cast("bytes", await self._redis.get(self._cursor_key) or b"").decode("utf-8", "replace")

    async def go_to(self, host: str) -> Position:
        """Make `host` the relay that chunks come from, and say where to go on there.

        A cursor is never used on another relay: the main one counts if it is this host's, or nobody's (the
        predecessor did not say whose), else what was kept for this host.
        """
        async with translating(self._redis):
            pipe = self._redis.pipeline(transaction=True)
            pipe.get(self._cursor_key)
            pipe.get(self._key(RELAY))
            pipe.get(self.cursor_of(host))
            pipe.get(self._key(FINISHED))
            main, relay, kept, finished = cast("tuple[bytes | None, ...]", await pipe.execute())
        self._note_finished(finished or b"")
        self._host = host
        self._cursor = (main or b"").decode("utf-8", "replace")
        owner: str | None = relay.decode() if relay and main else None
        text = main if owner in (None, host) else kept
        if text is not None and not (text.isdigit() and int(text) < 2**53):
            held = text[:40].decode("utf-8", "replace")
            raise ConfigError(f"{self._cursor_key} holds {held!r}, which is not a cursor: delete it or correct it")
        return Position(int(text) if text is not None else None, owner if owner != host else None)

    async def append(self, chunk: Chunk) -> bool:
        """Put the chunk on the stream and move the cursor; False: no room, nothing was done.

        After `StreamUnavailable` the same chunk may be given again: if the script did run, the cursor says so.
        """
        if self._max_bytes is not None and chunk.entries and self._bytes >= self._max_bytes:
            return False
        after = "" if chunk.seq is None else str(chunk.seq)
        keys = [
            self._stream,
            self._cursor_key,
            self._lease,
            self.cursor_of(self._host),
            self._key(RELAY),
            *self._keys_for_append,
        ]
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
        async with translating(self._redis):
            answer, detail = cast("list[bytes]", await self._append(keys=keys, args=arguments))
        if answer == b"full":
            return False
        if answer == b"broken":
            raise StreamBroken
        if answer == b"lease":
            raise LeaseLost("another reader has taken the lease")
        if answer == b"cursor":
            found = detail.decode("utf-8", "replace") or "nothing"
            raise LeaseLost(f"{self._cursor_key} holds {found} where this reader had left {self._cursor or 'nothing'}")
        if after:
            self._cursor = after
            if detail not in (b"", b"already"):
                self._newest = f"{detail.decode()} {after} {self._host}"
        self._bytes += chunk.bytes
        return True

    def finished_seq(self) -> int | None:
        """How far the workers had finished this relay's events, as far as we know."""
        return self._finished[1] if self._finished is not None and self._finished[0] == self._host else None

    def _note_finished(self, mark: bytes) -> None:
        if mark:
            _, seq, host = mark.decode().split(" ")
            self._finished = (host, int(seq))

    async def watch(self) -> None:
        """Look whether what is unread is still there; StreamBroken when it is not, and StoreWentBack."""
        async with translating(self._redis):
            broken, finished, unread, request = await self._watch(
                keys=[
                    self._stream,
                    self._key(MARKS),
                    self._key(FINISHED),
                    key_of(HELD_KEY, self._stream, self._group or GROUP),
                    key_of(GO_BACK_KEY, self._stream, self._group or GROUP),
                ],
                args=[self._group, self._newest, MARKS_MAX, self._unread],
            )
        self._newest, self._unread = "", unread.decode()
        self._note_finished(finished)
        if broken:
            raise StreamBroken
        if request:
            raise StoreWentBack(request)

    async def go_back(self, seq: int | None, gap: bytes, request: bytes = b"") -> bool:
        """After StreamBroken or StoreWentBack, which has a request: move the cursor back to `seq`, or leave it and
        record a gap. False: it is not ours."""
        keys = [
            self._cursor_key,
            self._lease,
            self.cursor_of(self._host),
            *map(self._key, (TAIL, MARKS, FINISHED, GAPS)),
            key_of(GO_BACK_KEY, self._stream, self._group or GROUP),
        ]
        after = "" if seq is None else str(seq)
        async with translating(self._redis):
            done = await self._go_back(keys=keys, args=[self._token, self._cursor, after, gap, GAPS_KEPT, request])
        if done:
            self._newest = self._unread = ""
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
        )
        if self._max_bytes is not None:
            async with translating(self._redis):
                self._bytes = int(await self._redis.memory_usage(self._stream, samples=5) or 0)
        return result

    async def set_aside_abandoned(self, abandoned_ms: int = ABANDONED_MS) -> tuple[int, int]:
        """Move a piece of abandoned entries of the workers' group to the dead letters, for a stream that is full.

        How many were moved, and how many were only ids: their entries had been trimmed by somebody.
        """
        async with translating(self._redis):
            try:
                moved, ghosts = await self._set_aside_abandoned(
                    keys=[self._stream, self._key(LEDGER_KEY), METRICS_KEY, self._key(DEAD_LETTERS_KEY)],
                    args=[
                        self._group,
                        abandoned_ms,
                        abandoned_ms // 60,
                        self._dead_letter_maxlen,
                        int(time.time() * 1000),
                        lease_prefix(self._stream),
                    ],
                )
            except ResponseError as error:
                if error_code(error) != "NOGROUP":
                    raise
                return 0, 0
        return int(moved), int(ghosts)

    async def publish(
        self,
        status: bytes,
        recent: bytes | None = None,
        broadcast: Sequence[bytes] = (),
        stats: Mapping[str, str | int | float] | None = None,
    ) -> None:
        """The dashboard's keys and this reader's figures, in one round trip."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(STATUS, status, ex=DASHBOARD_TTL_S)
        if recent is not None:
            pipe.set(RECENT, recent, ex=DASHBOARD_TTL_S)
        for event in broadcast:
            pipe.publish(BROADCAST, event)
        if stats:
            pipe.hset(self._key(READER_STATS), items=[part for pair in stats.items() for part in pair])
        async with translating(self._redis):
            await pipe.execute()


async def trim_finished(
    redis: Redis,
    stream_key: str,
    ignore_groups: Sequence[str] = (),
    *,
    group: str = "",
    keep_s: float = 0.0,
    max_stream_len: int = 500_000,
) -> TrimResult:
    """Remove the entries that every group on the stream has finished, except the ignored groups.

    Without any group nothing is removed, nor while `group` (the workers') does not exist: it will begin at the oldest
    entry. `keep_s`: finished entries younger than this stay, for `--reapply`, while the stream is less than nine tenths
    full.
    """
    trim = redis.register_script(_TRIM)
    async with translating(redis):
        answer = await trim(
            keys=[stream_key, key_of(HELD_KEY, stream_key, group or GROUP)],
            args=[int(keep_s * 1000), max_stream_len * 9 // 10, group, *ignore_groups],
        )
    trimmed, holder, bound = cast("tuple[int, bytes, bytes]", answer)
    return TrimResult(trimmed, holder.decode("utf-8", "replace"), bound.decode())
