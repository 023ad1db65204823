-- KEYS stream, consumers, lease of the other, ledger, held, given, tail, go back. ARGV group, from, to, idle, count, bytes, step,
-- how long a lease is: one that never expires (a copy of Redis forgot it) runs out, unless its owner lives.
-- Ids whose entry was trimmed come back from XCLAIM as nothing (from 7.0 they also leave the pending list, before
-- that they have to be acked): ghosts, counted once because one script finds, acks and counts them.
-- include go_back
-- include size_of
if redis.call('EXISTS', KEYS[3]) == 1 then
  if redis.call('PTTL', KEYS[3]) < 0 then redis.call('PEXPIRE', KEYS[3], ARGV[8]) end
  return {0, 0, {}}
end
if go_back(KEYS[1], KEYS[5], KEYS[6], ARGV[1], ARGV[2], KEYS[7], KEYS[8]) == 1 then return {0, -1, {}} end
local found = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[4], '-', '+', ARGV[5], ARGV[2])
if #found == 0 then
  if redis.call('SISMEMBER', KEYS[2], ARGV[2]) == 1 then
    local held = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
    if not held[1] then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
      redis.call('SREM', KEYS[2], ARGV[2])
      redis.call('HDEL', KEYS[5], ARGV[2])
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
    lost(KEYS[7], KEYS[8])
    redis.call('XACK', KEYS[1], ARGV[1], id)
    ghosts = ghosts + 1
  end
end
if ghosts > 0 then redis.call('HINCRBY', KEYS[4], 'ghosts', ghosts) end
-- What is left waits for the next piece: if somebody destroys the group before it, the group goes back there.
-- mutant: what waits to be adopted is held by nobody
local rest = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])[1]
if rest then redis.call('HSET', KEYS[5], ARGV[2], rest[1]) else redis.call('HDEL', KEYS[5], ARGV[2]) end
return {more and tonumber(ARGV[5]) or #ids, ghosts, entries}
