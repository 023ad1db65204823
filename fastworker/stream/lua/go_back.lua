-- For scripts that take over a dead consumer. What it held is pending for somebody, unless somebody deleted the consumer
-- (XGROUP DELCONSUMER) before it died: then the group goes back there, and whatever is on the stream is given again.
-- include given_up_to
-- include lost
-- include ids
local function go_back(stream, held, given, group, consumer, tail, request)
  local id = redis.call('HGET', held, consumer)
  if not id then return 0 end
  local found = redis.pcall('XPENDING', stream, group, id, id, 1)
  if found.err or found[1] then return 0 end
  redis.call('HDEL', held, consumer)
  -- mutant: the group goes forward to what it has not read
  if before(group_of(stream, group)['last-delivered-id'], id) then return 0 end
  if not redis.call('XRANGE', stream, id, id)[1] then lost(tail, request) end
  local ms = tonumber(string.match(id, '^%d+'))
  local start = ms > 0 and string.format('%.0f-18446744073709551615', ms - 1) or '0-0'
  redis.call('XGROUP', 'SETID', stream, group, start)
  given_up_to(given, start)
  return 1
end
