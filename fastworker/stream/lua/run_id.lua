-- Names this run of this server: another one has restarted, or took the place of a server that is gone, and may have an
-- older state. '' where it does not tell.
local function run_id()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
end
