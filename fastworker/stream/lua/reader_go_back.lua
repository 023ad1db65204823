-- KEYS cursor, lease, the relay's cursor, tail, marks, finished, gaps, go back, then tail, marks and finished of each
-- other partition. ARGV token, cursor expected, cursor after, a gap's text or '', gaps kept, what was asked for, the
-- cursor of an append that nobody saw answered: it is expected, too.
-- What a reader knows of a stream that is not there any more is forgotten. A second time, because nobody saw the first
-- one answered, changes nothing.
local owner = redis.call('GET', KEYS[2])
local cursor = redis.call('GET', KEYS[1]) or ''
if (owner and owner ~= ARGV[1]) or (cursor ~= ARGV[2] and cursor ~= ARGV[7] and cursor ~= ARGV[3]) then return 0 end
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], ARGV[3])
  redis.call('SET', KEYS[3], ARGV[3])
end
redis.call('DEL', KEYS[4], KEYS[5], KEYS[6], unpack(KEYS, 9))
if redis.call('GET', KEYS[8]) == ARGV[6] then redis.call('DEL', KEYS[8]) end
if ARGV[4] ~= '' and redis.call('LINDEX', KEYS[7], 0) ~= ARGV[4] then
  redis.call('LPUSH', KEYS[7], ARGV[4])
  redis.call('LTRIM', KEYS[7], 0, ARGV[5] - 1)
end
return 1
