-- KEYS owners. ARGV token, numbers of partitions... Answers those that nobody had. At maxmemory, too.
redis.call('HDEL', KEYS[1], '')
local taken = {}
for i = 2, #ARGV do
  if not redis.call('HGET', KEYS[1], ARGV[i]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[1])
    taken[#taken + 1] = tonumber(ARGV[i])
  end
end
return taken
