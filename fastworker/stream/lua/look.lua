-- KEYS members, owners, partitions, then the streams of all known partitions. ARGV token, ms that a member lives, group.
-- Says that this process lives, and takes the partitions of those that do not from them. Answers the members, the
-- owners (number, token, ...), what the reader says of the partitions, and per partition what backlog.lua answers.
-- The first write is one that Redis lets through at maxmemory: workers make room.
-- include backlog_of
redis.call('HDEL', KEYS[2], '')
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now + tonumber(ARGV[2])))
local members, living, owners = {}, {}, {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  if tonumber(flat[i + 1]) > now then
    members[#members + 1], living[flat[i]] = flat[i], true
  else
    redis.call('HDEL', KEYS[1], flat[i])
  end
end
flat = redis.call('HGETALL', KEYS[2])
for i = 1, #flat, 2 do
  if living[flat[i + 1]] then
    owners[#owners + 1], owners[#owners + 2] = flat[i], flat[i + 1]
  else
    redis.call('HDEL', KEYS[2], flat[i])
  end
end
local answer = {members, owners, redis.call('GET', KEYS[3]) or ''}
for i = 4, #KEYS do answer[i] = backlog_of(KEYS[i], ARGV[3]) end
return answer
