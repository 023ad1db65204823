-- KEYS lease, consumers, stream, held, given, tellers, tail, go back. ARGV token, ttl, name, group. At maxmemory, too: it is workers who make room.
-- include go_back
redis.call('XACK', KEYS[3], ARGV[4], '0-0')
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  redis.call('SADD', KEYS[2], ARGV[3])
  redis.call('HSET', KEYS[6], ARGV[3], ARGV[1])
  return 1 + go_back(KEYS[3], KEYS[4], KEYS[5], ARGV[4], ARGV[3], KEYS[7], KEYS[8])
end
return 0
