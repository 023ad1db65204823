-- For scripts that know KEYS held: the lowest id that a consumer holds now ('' none).
local function hold(held, consumer, id)
  if id == '' then redis.call('HDEL', held, consumer) else redis.call('HSET', held, consumer, id) end
end
