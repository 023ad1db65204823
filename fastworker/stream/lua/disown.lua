-- For scripts that end entries: who else is said to hold one of them holds it no longer. So it is where an entry that was
-- adopted on a server, and is pending for its first owner on the one that took its place, is acked there; else the group
-- would go back to it when that owner is found dead (go_back.lua).
local function other_holders(held, consumer)
  local flat, others = redis.call('HGETALL', held), {}
  for i = 1, #flat, 2 do
    if flat[i] ~= consumer then others[#others + 1] = {flat[i], flat[i + 1]} end
  end
  return others
end
local function disown(stream, group, held, others, ids, first, last)
  for _, other in ipairs(others) do
    for i = first, last do
      -- mutant: what another acked is still held
      if ids[i] == other[2] then
        local rest = redis.call('XPENDING', stream, group, '-', '+', 1, other[1])[1]
        if rest then redis.call('HSET', held, other[1], rest[1]) else redis.call('HDEL', held, other[1]) end
        break
      end
    end
  end
end
