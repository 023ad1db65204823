-- KEYS the partitions of the stream. ARGV limit of their sum, then per entry: which one, number of field arguments,
-- fields... All or nothing.
-- include next_id
local entries, at, length, last = 0, 2, 0, {}
while at <= #ARGV do
  entries = entries + 1
  at = at + 2 + tonumber(ARGV[at + 1])
end
for _, stream in ipairs(KEYS) do length = length + redis.call('XLEN', stream) end
if length + entries > tonumber(ARGV[1]) then return 0 end
at = 2
while at <= #ARGV do
  local stop = at + 1 + tonumber(ARGV[at + 1])
  local stream = KEYS[ARGV[at] + 1]
  last[stream] = redis.call('XADD', stream, next_id(last[stream] or newest_id(stream)), unpack(ARGV, at + 2, stop))
  at = stop + 1
end
return entries
