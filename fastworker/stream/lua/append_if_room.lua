-- KEYS the partitions of the stream. ARGV limit of their sum, then per entry: which one, number of field arguments,
-- fields... All or nothing.
local entries, at, length = 0, 2, 0
while at <= #ARGV do
  entries = entries + 1
  at = at + 2 + tonumber(ARGV[at + 1])
end
for _, stream in ipairs(KEYS) do length = length + redis.call('XLEN', stream) end
if length + entries > tonumber(ARGV[1]) then return 0 end
at = 2
while at <= #ARGV do
  local stop = at + 1 + tonumber(ARGV[at + 1])
  redis.call('XADD', KEYS[ARGV[at] + 1], '*', unpack(ARGV, at + 2, stop))
  at = stop + 1
end
return entries
