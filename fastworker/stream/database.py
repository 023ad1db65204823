"""What Redis remembers of the PostgreSQL that takes a stream, and how reader and group go back when that went back.

One script compares and acts, so that of many workers that find it out one does it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, cast

import msgspec
from redis.asyncio import Redis

from fastworker.stream.client import translating
from fastworker.stream.consumer import GO_BACK_KEY, ID_ORDER, LEDGER_KEY, key_of

DATABASE_KEY: Final = "fastworker:database"
"""String: JSON {system, timeline, written, entry_id} of the server that takes what the group reads."""

# KEYS database, stream, ledger, go back. ARGV what it was, what it is, group, the entry up to which all is stored ('':
# not back), JSON for the reader. Answers -1 (somebody else changed it), or how many finished entries are given again.
# The ledger counts each entry once: those that come again had ended, or are taken from who holds them. Of more than
# 20,000 the rest is not looked at.
_REMEMBER: Final = (
    ID_ORDER
    + """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return -1 end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[4] == '' then return 0 end
local exists, again, at = redis.call('EXISTS', KEYS[2]) == 1, 0, ARGV[4]
local group = exists and group_of(KEYS[2], ARGV[3])
if group and before(at, group['last-delivered-id']) then
  local last, looked, from = group['last-delivered-id'], 0, at
  while looked < 20000 do
    local found = redis.call('XRANGE', KEYS[2], '(' .. from, last, 'COUNT', 100)
    if #found == 0 then break end
    looked, from = looked + #found, found[#found][1]
    local pending = redis.call('XPENDING', KEYS[2], ARGV[3], found[1][1], from, #found)
    for _, one in ipairs(pending) do redis.call('XACK', KEYS[2], ARGV[3], one[1]) end
    again = again + #found - #pending
  end
  redis.call('XGROUP', 'SETID', KEYS[2], ARGV[3], at)
  if again > 0 then redis.call('HINCRBY', KEYS[3], 'committed', -again) end
end
local first, info = exists and redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1], {}
if exists then
  local flat = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #flat, 2 do info[flat[i]] = flat[i + 1] end
end
local is_whole = exists and (not before(at, info['last-generated-id']) or first and not before(at, first[1])
  or info['entries-added'] == info['length'])
if is_whole then return again end
local old = redis.call('GET', KEYS[4])
if old then
  local was, is = cjson.decode(old)['seq'], cjson.decode(ARGV[5])['seq']
  if was == cjson.null or (is ~= cjson.null and was <= is) then return again end
end
redis.call('SET', KEYS[4], ARGV[5])
return again
"""
)


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """`written`: bytes of log that were on disk, up to the end of a record."""

    system: str = ""
    timeline: int = 0
    written: int = 0
    entry_id: str = ""


class Memory(NamedTuple):
    """`known` None: nothing is remembered, or nothing that can be understood."""

    text: bytes
    known: Known | None


class GoBack(msgspec.Struct, frozen=True):
    seq: int | None
    relay: str


class Database:
    """The memory of one group. All methods raise StreamUnavailable while Redis cannot serve."""

    def __init__(self, redis: Redis, stream_key: str, group: str) -> None:
        self._redis = redis
        self._group = group
        self._keys = [
            key_of(DATABASE_KEY, stream_key, group),
            stream_key,
            key_of(LEDGER_KEY, stream_key),
            key_of(GO_BACK_KEY, stream_key, group),
        ]
        self._remember = redis.register_script(_REMEMBER)

    async def look(self) -> Memory:
        async with translating(self._redis):
            text = cast("bytes | None", await self._redis.get(self._keys[0])) or b""
        try:
            return Memory(text, msgspec.json.decode(text, type=Known) if text else None)
        except msgspec.DecodeError:
            return Memory(text, None)

    async def remember(
        self, was: Memory, now: Known, *, back_to: str | None = None, reader: GoBack | None = None
    ) -> int:
        """Negative: somebody else changed it meanwhile. `back_to`: the group goes back behind this entry, and where the
        stream does not reach so far back, the reader as `reader` says; how many finished entries are given again."""
        args: list[Any] = [
            was.text,
            msgspec.json.encode(now),
            self._group,
            back_to or "",
            msgspec.json.encode(reader) if reader is not None else b"",
        ]
        async with translating(self._redis):
            return int(await self._remember(keys=self._keys, args=args))
