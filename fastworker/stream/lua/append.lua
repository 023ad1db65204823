-- KEYS stream, cursor, lease, the relay's cursor, RELAY, dead letters, repairs, gaps, RELAYS, tail, unverified, then the
-- other partitions, then their tails
-- ARGV token, lease ms, cursor expected ('' absent), cursor after ('' as it is), host, entries, stream limit,
-- dead-letter limit, gaps kept, ms now, the chunk's body
-- Answers a word, and for `ok` the newest id in each partition, '' where there is none; `already`: all of it is there.
-- The body is one argument, which costs the client less than many: per item a count, then so many strings,
-- each after its length; numbers are four bytes, little-endian.
-- The first write is an XADD, or else the SETs: Redis refuses a script's first write when memory is out and lets a
-- script that has written finish, so OOM leaves either all or nothing.
-- An empty stream that does not remember our newest entry is another stream: ours was deleted, renamed or evicted.
-- include ids
-- include next_id
local owner = redis.call('GET', KEYS[3])
if owner and owner ~= ARGV[1] then return {'lease', owner} end
local cursor = redis.call('GET', KEYS[2]) or ''
-- Partition p is the p-th after the stream itself.
local others = (#KEYS - 11) / 2
local function stream_of(p) return p == 0 and KEYS[1] or KEYS[11 + p] end
local function tail_of(p) return p == 0 and KEYS[10] or KEYS[11 + others + p] end
if cursor ~= ARGV[3] then
  -- mutant: a chunk without a seq is there when the cursor is gone
  local is_there = ARGV[4] ~= '' and cursor == ARGV[4] and redis.call('GET', KEYS[5]) == ARGV[5]
  if not is_there then return {'cursor', cursor} end
  return {'ok', 'already'}
end
local entries, length, empty = tonumber(ARGV[6]), 0, {}
for p = 0, others do
  local found = redis.call('XLEN', stream_of(p))
  length = length + found
  if found == 0 then empty[#empty + 1] = p end
end
if entries > 0 and length + entries > tonumber(ARGV[7]) then return {'full', ''} end
local last = {}
local function look(p)
  local tail = redis.call('GET', tail_of(p))
  local found = tail and redis.call('XRANGE', stream_of(p), tail, '+', 'COUNT', 2) or {}
  if found[1] and found[1][1] == tail and not found[2] then
    last[p] = tail
    return true
  end
  last[p] = newest_id(stream_of(p))
  return not tail or not before(last[p], tail)
end
if others == 0 then empty = {0} end
for _, p in ipairs(empty) do
  if not look(p) then return {'broken', ''} end
end
local body, at, newest = ARGV[11], 1, {}
local function append(p, fields)
  if not last[p] then look(p) end
  -- mutant: ids are numbered as Redis does
  newest[p] = redis.call('XADD', stream_of(p), next_id(last[p]), unpack(fields, 2))
  last[p] = newest[p]
end
for p = 0, others do newest[p] = '' end
while at <= #body do
  local item, count = {}, nil
  count, at = struct.unpack('<I4', body, at)
  for i = 1, count do item[i], at = struct.unpack('<I4c0', body, at) end
  local what = item[1]
  if what == 'entry' then
    append(0, item)
  elseif what == 'dead letter' then
    redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[8], '*', unpack(item, 2))
  elseif tonumber(what) then
    append(tonumber(what), item)
  elseif what == 'repair' then
    redis.call('HSET', KEYS[7], item[2], item[3])
  elseif what == 'unverified' then
    redis.call('XADD', KEYS[11], '*', unpack(item, 2))
  elseif what == 'judged' then
    redis.call('XDEL', KEYS[11], item[2])
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
for p = 0, others do
  if newest[p] ~= '' then redis.call('SET', tail_of(p), newest[p]) end
end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
return {'ok', newest[0], unpack(newest)}
