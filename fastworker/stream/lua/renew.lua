-- KEYS lease, consumers, stream, ledger, held, reads, tellers, given. ARGV token, ttl, name, group, the lowest id that we hold, all of
-- them, what we were given since we told last, the server's run as we know it, and an id up to which nothing is restored.
-- Answers ghosts, how many were restored, and the run.
-- Also restores a lease that Redis lost, and what left the pending list without us: whoever deletes our consumer (XGROUP
-- DELCONSUMER) takes what it holds out of it, and nobody would get that again if we died now. What another consumer took
-- over is its own. XPENDING fails where the group is gone: the next read finds that out and mends it.
-- An id whose entry somebody trimmed does not come back from XCLAIM, and leaves the pending list (from 7.0 on): a ghost,
-- counted here, because its ack will count nothing. On 6.2 it comes back and its ack counts it.
-- A server with an older state (a replica, or it restarted) may not know that we read something: it gives that to others,
-- who finish it. So what we read from another run is never restored.
-- include run_id
-- include ids
-- include hold
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {-1, 0, ''} end
redis.pcall('XACK', KEYS[3], ARGV[4], '0-0')
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[7], ARGV[3], ARGV[1])
hold(KEYS[5], KEYS[6], KEYS[8], ARGV[3], ARGV[5], ARGV[7])
local run = run_id()
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
  if found.err then return {0, 0, run} end
  if not found[1] then missing[#missing + 1] = id
  elseif found[1][2] == ARGV[3] then ours[#ours + 1] = id end
  if #ours == 1000 then renew() end
end
renew()
local restored = 0
-- Where the lease had run out, others may have adopted and finished what we hold.
-- mutant: what was read from another run is restored
if not holder or run ~= ARGV[8] then missing = {} end
local group = missing[1] and group_of(KEYS[3], ARGV[4])
for _, id in ipairs(missing) do
  -- Beyond the group's last id it comes again by itself: Redis came back with older data.
  if not before(group['last-delivered-id'], id) and before(ARGV[9], id) then
    restored = restored + #redis.call('XCLAIM', KEYS[3], ARGV[4], ARGV[3], 0, id, 'FORCE', 'JUSTID')
  end
end
if ghosts > 0 then redis.call('HINCRBY', KEYS[4], 'ghosts', ghosts) end
return {ghosts, restored, run}
