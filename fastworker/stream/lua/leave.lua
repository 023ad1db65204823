-- KEYS members, owners. ARGV token, number of a partition or '': this process reads it no longer, or ends.
local flat = redis.call('HGETALL', KEYS[2])
for i = 1, #flat, 2 do
  if flat[i + 1] == ARGV[1] and (ARGV[2] == '' or flat[i] == ARGV[2]) then redis.call('HDEL', KEYS[2], flat[i]) end
end
if ARGV[2] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
