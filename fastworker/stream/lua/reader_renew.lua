-- KEYS lease; ARGV token, ms. An expired lease that nobody took is ours again: the cursor decides about the rest.
-- One that never expires is no lease: a copy of Redis forgot how long it was. It runs out, unless its owner lives.
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
  return owner
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ''
