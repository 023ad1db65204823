-- KEYS stream, held, given; ARGV ms that finished entries are kept, how many entries may be on the stream for their sake, a
-- group without which nothing is removed, then the groups that do not count.
-- What a group has finished ends before its smallest pending id, or with its last delivered one; the workers' also with
-- what is known to have been given to somebody.
-- include ids
-- include padded
local function after(id)
  local ms, seq = parts(id)
  if #seq < 16 then seq = string.format('%.0f', tonumber(seq) + 1) end
  return ms .. '-' .. seq
end
if redis.call('EXISTS', KEYS[1]) == 0 then return {0, '', ''} end
local ignored, missing = {}, ARGV[3] ~= ''
for i = 4, #ARGV do ignored[ARGV[i]] = true end
local bound, holder = nil, ''
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
  if group['name'] == ARGV[3] then missing = false end
  if not ignored[group['name']] then
    local upto
    if group['pending'] > 0 then upto = redis.call('XPENDING', KEYS[1], group['name'])[2] end
    if not upto then
      upto = after(group['last-delivered-id'])
    end
    if group['name'] == ARGV[3] then
      local given = string.match(redis.call('GET', KEYS[3]) or '', '^%S+')
      -- mutant: what was skipped is trimmed
      if given and given < padded(upto) then upto = after(plain(given)) end
      for _, id in ipairs(redis.pcall('HVALS', KEYS[2])) do
        if before(id, upto) then upto = id end
      end
    end
    if not bound or before(upto, bound) then bound, holder = upto, group['name'] end
  end
end
if missing then return {0, ARGV[3], ''} end
if not bound then return {0, '', ''} end
local keep = tonumber(ARGV[1])
if keep > 0 then
  local now = redis.call('TIME')
  local young = string.format('%.0f-0', now[1] * 1000 + math.floor(now[2] / 1000) - keep)
  -- What is kept yields to what comes: the oldest go early, a piece at a time.
  local over = math.min(redis.call('XLEN', KEYS[1]) - tonumber(ARGV[2]), 1000)
  if over > 0 then
    local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', over + 1)
    if oldest[over + 1] and before(young, oldest[over + 1][1]) then young = oldest[over + 1][1] end
    if not oldest[over + 1] then young = bound end
  end
  if before(young, bound) then bound = young end
end
return {redis.call('XTRIM', KEYS[1], 'MINID', bound), holder, bound}
