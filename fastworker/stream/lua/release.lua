-- KEYS lease, consumers, stream, held, tellers. ARGV token, name, group.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
local held = redis.pcall('XPENDING', KEYS[3], ARGV[3], '-', '+', 1, ARGV[2])
if not held.err and not held[1] then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[3], ARGV[3], ARGV[2])
  redis.call('SREM', KEYS[2], ARGV[2])
  redis.call('HDEL', KEYS[4], ARGV[2])
  redis.call('HDEL', KEYS[5], ARGV[2])
end
return 1
