-- For scripts by which a group goes back: what it was given is known up to there.
-- include padded
local function given_up_to(key, id)
  local known = redis.call('GET', key)
  if not known then return end
  local was, rest = string.match(known, '^(%S+)(.*)$')
  if padded(id) < was then redis.call('SET', key, padded(id) .. rest) end
end
