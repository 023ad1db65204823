-- KEYS lease; ARGV token, ms. An expired lease that nobody took is ours again: the cursor decides about the rest.
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return owner end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ''
