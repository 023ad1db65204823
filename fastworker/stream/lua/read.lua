-- KEYS stream. ARGV group, consumer, after (or >), entries, bytes, step. Answers {entries..., as many as asked for or as
-- many bytes}, and whether that was not all.
-- include size_of
local after, limit, bytes, all = ARGV[3], tonumber(ARGV[4]), 0, {}
while #all < limit and bytes < tonumber(ARGV[5]) do
  local step = math.min(tonumber(ARGV[6]), limit - #all)
  if bytes > 0 then step = math.max(1, math.min(step, math.floor((tonumber(ARGV[5]) - bytes) * #all / bytes))) end
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', step, 'STREAMS', KEYS[1], after)
  local found = reply and reply[1] and reply[1][2] or {}
  for _, entry in ipairs(found) do all[#all + 1] = entry end
  bytes = bytes + size_of(found)
  if #found < step then return {all, 0} end
  if after ~= '>' then after = found[#found][1] end
end
return {all, 1}
