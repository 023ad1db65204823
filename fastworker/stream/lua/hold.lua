-- For scripts that know KEYS stream, held, reads and given: the lowest id that a consumer holds then ('' none), and what it
-- was given since it told last: first and last id of each read, between spaces. Told before or with the ack, never after it.
-- After a `?` some of it may have been given by a server whose place this one took: only what is here counts.
-- include padded
local function hold(stream, held, reads, given, consumer, id, told)
  if id == '' then redis.call('HDEL', held, consumer) else redis.call('HSET', held, consumer, id) end
  if told == '' then return end
  local known = string.match(redis.call('GET', given) or '', '^%S+') or ''
  local doubtful = string.sub(told, 1, 1) == '?'
  for first, last in string.gmatch(told, '(%d%S*) (%S+)') do
    local one = padded(last)
    -- mutant: what an old master gave is missed on the new one
    if known < one and not (doubtful and not redis.call('XRANGE', stream, last, last)[1]) then
      first = padded(first)
      -- What is read back is told alone, perhaps after the read that it came with.
      if (redis.call('HGET', reads, first) or '') < one then redis.call('HSET', reads, first, one) end
    end
  end
end
