-- For scripts that know KEYS held and reads: the lowest id that a consumer holds then ('' none), and what it was given
-- since it told last: first and last id of each read, between spaces. Told before or with the ack, never after it.
-- include padded
local function hold(held, reads, consumer, id, told)
  if id == '' then redis.call('HDEL', held, consumer) else redis.call('HSET', held, consumer, id) end
  for first, last in string.gmatch(told, '(%S+) (%S+)') do redis.call('HSET', reads, padded(first), padded(last)) end
end
