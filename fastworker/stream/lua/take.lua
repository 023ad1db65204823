-- KEYS owners. ARGV token, numbers of partitions... Answers those that nobody had. At maxmemory, too.
redis.call('HDEL', KEYS[1], '')
local taken = {}
for i = 2, #ARGV do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[1]) == 1 then taken[#taken + 1] = tonumber(ARGV[i]) end
end
return taken
