-- For scripts that append. The second number of an id goes on from entry to entry, so that two ids tell how many entries
-- there were between them. (With `*`, Redis begins at 0 again in each millisecond.)
local now
local function next_id(last)
  if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  local ms, number = string.match(last, '^(%d+)-(%d+)$')
  if #number > 15 then return '*' end
  if tonumber(ms) < now then ms = string.format('%.0f', now) end
  return ms .. '-' .. string.format('%.0f', tonumber(number) + 1)
end
local function newest_id(stream)
  local info = redis.pcall('XINFO', 'STREAM', stream)
  for i = 1, #info, 2 do if info[i] == 'last-generated-id' then return info[i + 1] end end
  return '0-0'
end
