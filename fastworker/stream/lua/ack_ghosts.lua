-- KEYS stream, ledger. ARGV group, ids...
local acked = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2, #ARGV))
if acked > 0 then redis.call('HINCRBY', KEYS[2], 'ghosts', acked) end
return acked
