-- KEYS stream, given, reads, tellers, consumers, ledger, marks, the reader's lease, held. ARGV group, beginning of the leases of
-- consumers, entries looked at, who gets what was skipped, 'reader' or 'worker'. Answers how many were given out, the first
-- and the last of them, whether there may be more, and whether an entry is gone that nobody was given.
--
-- The group's last id says what is handed out next, not what was: XGROUP SETID, or XGROUP CREATE with $, moves it past
-- entries that nobody was given. Consumers of ours tell what they were given, before they ack it. So an entry behind the
-- group's last id was given to somebody if it is pending or if somebody told so. What was skipped is made pending for a
-- consumer that is nobody's: workers adopt it. Everything up to `given` is known to be given.
-- Consumers that do not tell (older releases, other workers): while one is at work, the group's last id is believed.
-- A reader gives nothing out, and alone says that something is gone. While none is at work, it is left to the next one for
-- ten minutes: a reader that is started again.
-- include padded
-- include ids
local nothing = {0, '', '', 0, 0}
local group = redis.call('EXISTS', KEYS[1]) == 1 and group_of(KEYS[1], ARGV[1])
if not group then return nothing end
redis.pcall('XACK', KEYS[1], ARGV[1], '0-0')
local time = redis.call('TIME')
local now, last = time[1] * 1000 + math.floor(time[2] / 1000), padded(group['last-delivered-id'])
local at, looked, before_now = string.match(redis.call('GET', KEYS[2]) or '', '^(%S+) (%d+) (%S+)$')
if not at then
  at, looked, before_now = last, now, last
  -- Made by an operator, perhaps with $, and never used.
  if group['consumers'] == 0 and redis.call('EXISTS', KEYS[6]) == 0 then at = padded('0-0') end
end
if last < at then at = last end

local function is_ours(name)
  local told = redis.call('HGET', KEYS[4], name)
  local lease = told and redis.call('GET', ARGV[2] .. name)
  return told and (not lease or lease == told)
end
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local one = {}
  for i = 1, #flat, 2 do one[flat[i]] = flat[i + 1] end
  if one['name'] ~= ARGV[4] and one['idle'] <= now - looked + 1000 and not is_ours(one['name']) then at = last end
end

local reads, flat = {}, redis.call('HGETALL', KEYS[3])
for i = 1, #flat, 2 do reads[#reads + 1] = {flat[i], flat[i + 1]} end
table.sort(reads, function(a, b) return a[1] < b[1] end)
local finish = string.rep('9', 20)
reads[#reads + 1] = {finish, finish}

local marks, lost, gone_ms = redis.call('LRANGE', KEYS[7], 0, 99), 0, 0
local function lost_before(from)
  for _, mark in ipairs(marks) do
    local id = padded(string.match(mark, '^%S+'))
    if id >= from or id > last then return false end
    if id > at then
      local one = plain(id)
      if not redis.call('XRANGE', KEYS[1], one, one)[1] and not redis.call('XPENDING', KEYS[1], ARGV[1], one, one, 1)[1] then
        gone_ms = tonumber(string.match(one, '^%d+'))
        return true
      end
    end
  end
  return false
end
local function pending_in(first, stop)
  local found = {}
  while true do
    local some = redis.call('XPENDING', KEYS[1], ARGV[1], first, stop, 1000)
    for _, one in ipairs(some) do found[one[1]] = true end
    if #some < 1000 then return found end
    first = '(' .. some[#some][1]
  end
end

local budget, skipped, more = tonumber(ARGV[3]), {}, 0
-- Moves `at` through what lies before `from`; false: it has to stop there.
local function pass(from)
  local upto = from == finish and '+' or '(' .. plain(from)
  while at < from do
    local found = redis.call('XRANGE', KEYS[1], '(' .. plain(at), upto, 'COUNT', 1)
    if not found[1] or padded(found[1][1]) > last then return true end
    if padded(found[1][1]) > before_now then return false end
    found = redis.call('XRANGE', KEYS[1], '(' .. plain(at), upto, 'COUNT', math.min(100, budget))
    local pending = pending_in(found[1][1], found[#found][1])
    for _, entry in ipairs(found) do
      local id = padded(entry[1])
      if id > last or id > before_now then return id > last end
      if not pending[entry[1]] then
        if ARGV[5] == 'reader' then return false end
        skipped[#skipped + 1] = entry[1]
      end
      at, budget = id, budget - 1
    end
    if budget <= 0 then
      more = 1
      return false
    end
  end
  return true
end
for _, read in ipairs(reads) do
  local from, upto = read[1], read[2]
  if at < upto then
    -- mutant: what is gone is forgotten while no reader is at work
    if lost_before(from) and (ARGV[5] == 'reader' or redis.call('EXISTS', KEYS[8]) == 1 or now - gone_ms < 600000) then
      lost = 1
      break
    end
    if not pass(from) then break end
    if upto == finish then upto = last end
    at = upto < last and upto or last
  end
  if upto <= at and from ~= finish then redis.call('HDEL', KEYS[3], from) end
end
for first = 1, #skipped, 100 do
  local ids = {unpack(skipped, first, math.min(first + 99, #skipped))}
  for _, word in ipairs({'IDLE', 3600000, 'FORCE', 'JUSTID'}) do ids[#ids + 1] = word end
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, unpack(ids))
end
if skipped[1] then
  redis.call('SADD', KEYS[5], ARGV[4])
  -- Until they are adopted: else they are gone with the group, if somebody destroys it before that.
  local held = redis.call('HGET', KEYS[9], ARGV[4])
  -- mutant: what was skipped is held by nobody
  if not held or padded(skipped[1]) < padded(held) then redis.call('HSET', KEYS[9], ARGV[4], skipped[1]) end
end
redis.call('SET', KEYS[2], at .. ' ' .. string.format('%.0f', now) .. ' ' .. last)
return {#skipped, skipped[1] or '', skipped[#skipped] or '', more, lost}
