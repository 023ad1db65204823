-- KEYS stream. ARGV limit, then per entry: number of field arguments, fields... All or nothing.
local entries, at = 0, 2
while at <= #ARGV do
  entries = entries + 1
  at = at + 1 + tonumber(ARGV[at])
end
if redis.call('XLEN', KEYS[1]) + entries > tonumber(ARGV[1]) then return 0 end
at = 2
while at <= #ARGV do
  local stop = at + tonumber(ARGV[at])
  redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, stop))
  at = stop + 1
end
return entries
