-- KEYS lease, consumers, stream, ledger, held, reads, tellers, given. ARGV token, ttl, name, group, the lowest id that we hold, all of
-- them, what we were given since we told last. Answers how many ghosts there were; -1: the name has another owner.
-- Also sets a lease that Redis lost. XPENDING fails where the group is gone: the next read finds that out and mends it.
-- An id that is pending for nobody stays so: another may have settled it, and only an ack of what is pending is counted. If
-- somebody deleted our consumer, KEYS held keeps what we hold (go_back.lua).
-- An id whose entry somebody trimmed does not come back from XCLAIM, and leaves the pending list (from 7.0 on): a ghost,
-- counted here, because its ack will count nothing. On 6.2 it comes back and its ack counts it.
-- include hold
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return -1 end
redis.pcall('XACK', KEYS[3], ARGV[4], '0-0')
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[7], ARGV[3], ARGV[1])
hold(KEYS[3], KEYS[5], KEYS[6], KEYS[8], ARGV[3], ARGV[5], ARGV[7])
local ours, ghosts = {}, 0
local function renew()
  if #ours == 0 then return end
  local count = #ours
  ours[count + 1] = 'JUSTID'
  ghosts = ghosts + count - #redis.call('XCLAIM', KEYS[3], ARGV[4], ARGV[3], 0, unpack(ours))
  ours = {}
end
for id in string.gmatch(ARGV[6], '%S+') do
  local found = redis.pcall('XPENDING', KEYS[3], ARGV[4], id, id, 1)
  if found.err then return 0 end
  if found[1] and found[1][2] == ARGV[3] then ours[#ours + 1] = id end
  if #ours == 1000 then renew() end
end
renew()
if ghosts > 0 then redis.call('HINCRBY', KEYS[4], 'ghosts', ghosts) end
return ghosts
