-- KEYS lease, cursor, RELAY, the relay's cursor, partitions. ARGV token, cursor after ('' none), host, what is said of the
-- partitions ('' as it is). Moves a cursor under the lease; 0: it is another reader's.
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
if ARGV[4] ~= '' then redis.call('SET', KEYS[5], ARGV[4]) end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[2], KEYS[3])
  return 1
end
redis.call('SET', KEYS[2], ARGV[2])
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[3], ARGV[3])
  redis.call('SET', KEYS[4], ARGV[2])
end
return 1
