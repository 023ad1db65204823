-- KEYS stream, given, reads, tellers, consumers, ledger, tail, go back, held. ARGV group, beginning of the leases of
-- consumers, entries looked at, who gets what was skipped, 'reader' or 'worker'. Answers how many were given out, the first
-- and the last of them, and whether there may be more.
--
-- The group's last id says what is handed out next, not what was: XGROUP SETID, or XGROUP CREATE with $, moves it past
-- entries that nobody was given. Consumers of ours tell what they were given, before they ack it. So an entry behind the
-- group's last id was given to somebody if it is pending or if somebody told so. What was skipped is made pending for a
-- consumer that is nobody's: workers adopt it. Everything up to `given` is known to be given.
-- Consumers that do not tell (older releases, other workers): while one is at work, the group's last id is believed.
-- The numbers in the ids of ours tell how many entries there were (next_id): what is neither here nor pending nor told was
-- removed by somebody before anybody was given it. A reader of ours reads it again. It gives nothing out itself.
-- include padded
-- include ids
-- include lost
-- include next_id
local nothing = {0, '', '', 0}
local group = redis.call('EXISTS', KEYS[1]) == 1 and group_of(KEYS[1], ARGV[1])
if not group then return nothing end
redis.pcall('XACK', KEYS[1], ARGV[1], '0-0')
local time = redis.call('TIME')
now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = padded(group['last-delivered-id'])
local at, looked, before_now = string.match(redis.call('GET', KEYS[2]) or '', '^(%S+) (%d+) (%S+)$')
local function just_before(id)
  local ms, number = parts(id)
  if number ~= '0' then return padded(ms .. '-' .. string.format('%.0f', tonumber(number) - 1)) end
  return padded(string.format('%.0f-18446744073709551615', tonumber(ms) - 1))
end
-- Whatever was removed before the first entry that there is, and was given before or not asked for, is nobody's loss.
local function beginning()
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  return first and just_before(first[1]) or padded(newest_id(KEYS[1]))
end
local zero = padded('0-0')
if not at then
  at, looked, before_now = last, now, last
  -- Made by an operator, perhaps with $, and never used.
  if group['consumers'] == 0 and redis.call('EXISTS', KEYS[6]) == 0 then at = zero end
  if at == zero then at = beginning() end
elseif last < at then -- sent back
  local first = beginning()
  if first < last then first = last end
  if first < at then at = first end
end

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

-- Two ids that follow each other here; numbers that were never an entry's tell nothing.
local function step(a, b)
  local from, upto = tonumber(string.sub(a, 22)), tonumber(string.sub(b, 22))
  local missing = upto - from - 1
  if missing <= 0 or upto > 2 ^ 52 or (from == 0 and a ~= zero) then return end
  local held = redis.call('XPENDING', KEYS[1], ARGV[1], '(' .. plain(a), '(' .. plain(b), math.min(missing, 20000))
  -- mutant: what was trimmed between two looks of the reader is lost
  if #held < missing then lost(KEYS[7], KEYS[8]) end
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
      step(at, id)
      if not pending[entry[1]] then
        if ARGV[5] == 'reader' then
          at = just_before(entry[1])
          return false
        end
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
    if not pass(from) then break end
    if from > last then from, upto = last, last end
    if at < from then step(at, from) end
    if at < upto then at = upto < last and upto or last end
  end
  if upto <= at and read[1] ~= finish then redis.call('HDEL', KEYS[3], read[1]) end
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
return {#skipped, skipped[1] or '', skipped[#skipped] or '', more}
