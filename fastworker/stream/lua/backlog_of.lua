-- How many entries wait to be given to the group, and how many are not finished.
-- include ids
local function backlog_of(stream, name)
  local length = redis.call('XLEN', stream)
  local group = redis.call('EXISTS', stream) == 1 and group_of(stream, name)
  local lag, pending = length, 0
  if group then
    pending = group['pending']
    lag = group['lag']
    if not lag then -- this server does not count
      local more = redis.call('XRANGE', stream, '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
      lag = more and length or 0
    end
  end
  return {lag, lag + pending}
end
