-- For scripts that end entries: who else is said to hold one of them holds it no longer. So it is where an entry that was
-- adopted on a server, and is pending for its first owner on the one that took its place, is acked there; else the group
-- would go back to it when that owner is found dead (go_back.lua). After the last ack of the script, so that what is held
-- then is pending.
local function disown(stream, group, held, consumer, ended)
  local flat = redis.call('HGETALL', held)
  for i = 1, #flat, 2 do
    local other, id = flat[i], flat[i + 1]
    if other ~= consumer then
      for at = 1, #ended do
        -- mutant: what another acked is still held
        if ended[at] == id then
          local rest = redis.call('XPENDING', stream, group, '-', '+', 1, other)[1]
          if rest then redis.call('HSET', held, other, rest[1]) else redis.call('HDEL', held, other) end
          break
        end
      end
    end
  end
end
