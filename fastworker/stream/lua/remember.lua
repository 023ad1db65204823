-- KEYS database, stream, ledger, go back, given, held. ARGV what it was, what it is, group, the entry up to which all is stored ('':
-- not back), JSON for the reader. Answers -1 (somebody else changed it), or how many finished entries are given again.
-- The ledger counts each entry once: those that come again had ended, or are taken from who holds them. Of more than
-- 20,000 the rest is not looked at.
-- include ids
-- include given_up_to
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
  -- Who is said to hold some of them and dies need not make the group go back once more.
  local held = redis.call('HGETALL', KEYS[6])
  for i = 1, #held, 2 do
    if before(at, held[i + 1]) then redis.call('HDEL', KEYS[6], held[i]) end
  end
  given_up_to(KEYS[5], at)
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
  local told, is = cjson.decode(old), cjson.decode(ARGV[5])['seq']
  local was = told['lost'] and math.huge or told['seq']
  if was == cjson.null or (is ~= cjson.null and was <= is) then return again end
end
redis.call('SET', KEYS[4], ARGV[5])
return again
