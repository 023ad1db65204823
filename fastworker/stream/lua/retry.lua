-- KEYS dead letters, stream. ARGV letter id, fields of the entry... Appends and removes together, or neither:
-- a retry that is cut off and repeated finds no letter and does nothing.
-- include next_id
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return 0 end
redis.call('XADD', KEYS[2], next_id(newest_id(KEYS[2])), unpack(ARGV, 2, #ARGV))
return redis.call('XDEL', KEYS[1], ARGV[1])
