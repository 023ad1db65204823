-- For scripts that take over a dead consumer. What it held is pending for somebody, unless somebody deleted the consumer
-- (XGROUP DELCONSUMER) before it died: then the group goes back there, and whatever is on the stream is given again.
-- include given_up_to
-- include lost
local function go_back(stream, held, given, group, consumer, tail, request)
  local id = redis.call('HGET', held, consumer)
  if not id then return 0 end
  local found = redis.pcall('XPENDING', stream, group, id, id, 1)
  if found.err or found[1] then return 0 end
  redis.call('HDEL', held, consumer)
  if not redis.call('XRANGE', stream, id, id)[1] then lost(tail, request) end
  local ms = tonumber(string.match(id, '^%d+'))
  local before = ms > 0 and string.format('%.0f-18446744073709551615', ms - 1) or '0-0'
  redis.call('XGROUP', 'SETID', stream, group, before)
  given_up_to(given, before)
  return 1
end
