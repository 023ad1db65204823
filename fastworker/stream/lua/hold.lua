-- For scripts that know KEYS held, reads and given: the lowest id that a consumer holds then ('' none), and what it was given
-- since it told last: first and last id of each read, between spaces. Told before or with the ack, never after it.
-- include padded
local function hold(held, reads, given, consumer, id, told)
  if id == '' then redis.call('HDEL', held, consumer) else redis.call('HSET', held, consumer, id) end
  if told == '' then return end
  local known = string.match(redis.call('GET', given) or '', '^%S+') or ''
  for first, last in string.gmatch(told, '(%S+) (%S+)') do
    first, last = padded(first), padded(last)
    -- What is read back is told alone, perhaps after the read that it came with.
    if known < last and (redis.call('HGET', reads, first) or '') < last then redis.call('HSET', reads, first, last) end
  end
end
