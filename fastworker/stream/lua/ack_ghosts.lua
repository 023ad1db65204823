-- KEYS stream, ledger, tail, go back. ARGV group, ids...
-- include lost
local acked = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2, #ARGV))
if acked > 0 then
  redis.call('HINCRBY', KEYS[2], 'ghosts', acked)
  lost(KEYS[3], KEYS[4])
end
return acked
