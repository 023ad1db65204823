-- KEYS stream, cursor, lease, the relay's cursor, RELAY, dead letters, repairs, gaps, RELAYS, tail, unverified
-- ARGV token, lease ms, cursor expected ('' absent), cursor after ('' as it is), host, entries, stream limit,
-- dead-letter limit, gaps kept, ms now, the chunk's body
-- The body is one argument, because the client packs every argument in Python: per item a count, then so many strings,
-- each after its length; numbers are four bytes, little-endian.
-- The first write is an XADD, or else the SETs: Redis refuses a script's first write when memory is out and lets a
-- script that has written finish, so OOM leaves either all or nothing.
-- An empty stream that does not remember our newest entry is another stream: ours was deleted, renamed or evicted.
-- include ids
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
if last ~= '' then redis.call('SET', KEYS[10], last) end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
return {'ok', last}
