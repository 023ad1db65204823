-- KEYS stream, marks, finished, held, go back, given, cursor. ARGV the workers' group, a new mark or '', marks kept, the
-- first unread id at the last look or '', the seq and host up to which all is appended or '', the newest removed one that
-- is known, the cursor as the reader left it or ''. Answers whether an unread entry is gone, the newest finished mark, the
-- first unread id, to where the reader has to go back because PostgreSQL did, the newest removed one, and the cursor if it
-- is behind the reader's, else ''.
-- A cursor that is behind: this is an older state, of a replica that took its master's place. What the reader knows of
-- marks and unread entries is of another one, and what was lost with its cursor is no loss: it is appended again.
-- Workers read in order and only what they finished is trimmed: a mark that they have not reached, and that is not on the
-- stream, was removed by somebody else, or the stream with it. What is pending they hold. From 7.0 on a stream says which
-- is the newest entry that XDEL removed: unread, if it lies behind the first unread one.
-- include ids
local cursor = redis.call('GET', KEYS[7]) or ''
local function is_behind() return tonumber(cursor) and tonumber(ARGV[7]) and tonumber(cursor) < tonumber(ARGV[7]) end
-- mutant: an older state is judged by what was known of the newer one
if is_behind() then return {0, '', '', '', '', cursor} end
if ARGV[2] ~= '' then
  if redis.call('LLEN', KEYS[2]) >= tonumber(ARGV[3]) then redis.call('RPOP', KEYS[2]) end
  redis.call('RPUSH', KEYS[2], ARGV[2])
end
local exists = redis.call('EXISTS', KEYS[1]) == 1
local group = exists and group_of(KEYS[1], ARGV[1])
local read, held = group and group['last-delivered-id'] or '0-0', nil
if group and group['pending'] > 0 then held = redis.call('XPENDING', KEYS[1], ARGV[1])[2] end
for _, id in ipairs(redis.call('HVALS', KEYS[4])) do
  if not held or before(id, held) then held = id end
end
-- What was skipped is not finished.
-- include padded
local given = string.match(redis.call('GET', KEYS[6]) or '', '^%S+')
local finished = given and given < padded(read) and plain(given) or read
local mark = redis.call('LINDEX', KEYS[2], 0)
local function id_of(text) return string.match(text, '^%S+') end
local asked = redis.call('EXISTS', KEYS[5]) == 1 -- then what is finished stays known, until the reader has gone back
while mark and not asked do
  local id = id_of(mark)
  if before(finished, id) or (held and not before(id, held)) then break end
  redis.call('SET', KEYS[3], redis.call('LPOP', KEYS[2]))
  mark = redis.call('LINDEX', KEYS[2], 0)
end
local unread = exists and redis.call('XRANGE', KEYS[1], '(' .. read, '+', 'COUNT', 1)[1]
local function gone(id)
  return before(read, id) and not (exists and redis.call('XRANGE', KEYS[1], id, id)[1])
end
local broken = mark and gone(id_of(mark)) or ARGV[4] ~= '' and gone(ARGV[4])
local removed = ''
if group and unread then
  local info = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #info, 2 do if info[i] == 'max-deleted-entry-id' then removed = info[i + 1] end end
  broken = broken or removed ~= '' and removed ~= ARGV[6] and before(unread[1], removed)
end
-- Of the marks, too, that lie behind one which somebody holds.
if not broken and mark and (held or finished ~= read) then
  for _, one in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    local id = id_of(one)
    if before(read, id) then
      broken = gone(id)
      break
    end
  end
end
-- A partition that gets few events says how far it is by having none left.
-- mutant: an idle partition is further than it is
if ARGV[5] ~= '' and finished == read and not (broken or mark or unread or held) then
  redis.call('SET', KEYS[3], read .. ' ' .. ARGV[5])
end
return {broken and 1 or 0, redis.call('GET', KEYS[3]) or '', unread and unread[1] or '',
  redis.call('GET', KEYS[5]) or '', removed, ''}
